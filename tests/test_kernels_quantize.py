"""The activation quantizer: its operator, and its kernel in the interpreter and through the compiler for Hopper."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted import assert_checks
from torch import Tensor

triton = pytest.importorskip("triton")

from gpu import quantize_cases as cases  # noqa: E402
from gpu.quantize_cases import Case  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from bitwright.activations import quantize_asymmetric, quantize_symmetric, rotate  # noqa: E402
from bitwright.errors import SchemeError  # noqa: E402
from bitwright.kernels import split_ops  # noqa: E402
from bitwright.kernels.triton import quantize as kernel  # noqa: E402
from bitwright.kernels.triton.quantize import WHOLE, QuantizeConfig, quantize_config  # noqa: E402

PROCESSORS = 132


@pytest.mark.parametrize("case", [c for c in cases.matrix() if c.B < 1000], ids=str)
def test_the_operator_is_the_definition(case: Case) -> None:
    x, base_idx, outlier_idx, bits, block, clip = cases.operands(case)
    codes, scale, zero, outliers = split_ops.quantize_activations(x, base_idx, outlier_idx, bits, block, clip)
    base = x[:, : case.B] if base_idx is None else x[:, base_idx.long()]
    base = rotate(base, block) if block else base
    if bits == 8:
        wanted, of_token = quantize_symmetric(base)
        assert not zero.any()
    else:
        wanted, of_token, zeros = quantize_asymmetric(base, clip)
        assert torch.equal(zero, zeros[:, 0].int()) and zero.any()
    assert torch.equal(codes[:, : case.B], wanted) and not codes[:, case.B :].any()
    torch.testing.assert_close(scale, of_token[:, 0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(outliers[:, : case.O], x[:, outlier_idx.long()], rtol=0, atol=0, equal_nan=True)
    assert not outliers[:, case.O :].any()
    assert codes.shape == (12, -(-case.B // 128) * 128) and outliers.shape == (12, -(-case.O // 16) * 16)
    assert (codes.dtype, scale.dtype, zero.dtype) == (torch.int8, torch.float32, torch.int32)
    assert outliers.dtype == case.dtype


def test_a_token_of_zeros_and_no_tokens() -> None:
    for bits in (4, 8):
        codes, scale, zero, _ = split_ops.quantize_activations(torch.zeros(1, 9), None, index([]), bits, 0, 1.0)
        assert not codes.any() and scale.tolist() == [1] and zero.tolist() == [0]
        shapes = [t.shape for t in split_ops.quantize_activations(torch.zeros(0, 9), None, index([8]), bits, 0, 1.0)]
        assert shapes == [(0, 128), (0,), (0,), (0, 16)]


@pytest.mark.parametrize(
    "case", [Case(4, 96, 5, 32, "shuffled", 0.9, M=2), Case(8, 40, M=1), Case(8, 40, 3, M=0)], ids=str
)
def test_opcheck(case: Case) -> None:
    torch.library.opcheck(split_ops.quantize_activations, cases.operands(case))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_a_norm_in_front_is_that_of_llama(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, *rest = cases.operands(Case(4, 90, 6, order="shuffled", clip=0.9, dtype=dtype, M=2))
    norm = LlamaRMSNorm(96, eps=1e-5).to(dtype)
    weight = norm.weight.data.copy_(torch.rand(96, generator=torch.Generator().manual_seed(1)) + 0.5)
    got = split_ops.rms_norm_quantize(x, weight, 1e-5, *rest)
    wanted = split_ops.quantize_activations(norm(x).detach(), *rest)
    assert all(map(torch.equal, got, wanted))
    torch.library.opcheck(split_ops.rms_norm_quantize, (x, weight, 1e-5, *rest))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("once", [False, True])
def test_a_sum_and_its_norm_in_front(dtype: torch.dtype, once: bool) -> None:
    from bitwright.kernels.elementwise import add_norm

    x, *rest = cases.operands(Case(4, 90, 6, order="shuffled", clip=0.9, dtype=dtype, M=2))
    generator = torch.Generator().manual_seed(1)
    residual, weight = (torch.rand(shape, generator=generator).to(dtype) + 0.5 for shape in (x.shape, (96,)))
    *got, total = split_ops.add_rms_norm_quantize(x, residual, weight, 1e-5, *rest, once)
    normed, summed = add_norm(x, residual, weight, None, 1e-5, False)
    assert torch.equal(total, summed) and torch.equal(total, (x.float() + residual.float()).to(dtype))
    assert all(map(torch.equal, got, split_ops.rms_norm_quantize(total, weight, 1e-5, *rest, once)))
    if once:
        assert all(map(torch.equal, got, split_ops.quantize_activations(normed, *rest)))
    torch.library.opcheck(split_ops.add_rms_norm_quantize, (x, residual, weight, 1e-5, *rest, once))
    torch.library.opcheck(split_ops.rms_norm_quantize, (x, weight, 1e-5, *rest, once))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_a_gate_in_front(dtype: torch.dtype) -> None:
    from bitwright.kernels.elementwise import silu_mul

    _, *rest = cases.operands(Case(8, 90, 6, order="ascending", dtype=dtype, M=3))
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(1)).to(dtype) * 3
    got = split_ops.silu_mul_quantize(x, *rest)
    assert all(map(torch.equal, got, split_ops.quantize_activations(silu_mul(x), *rest)))
    torch.library.opcheck(split_ops.silu_mul_quantize, (x, *rest))


def test_sums_and_gates_that_do_not_fit_are_refused() -> None:
    x, weight, rest = torch.zeros(2, 8), torch.ones(8), (None, index([7]), 8, 0, 1.0)
    for residual in (torch.zeros(2, 7), torch.zeros(2, 8).half(), torch.zeros(1, 8)):
        for add in (split_ops.add_rms_norm_quantize, split_ops._cuda_add_norm_quantize):
            with pytest.raises(SchemeError, match=r"alike, not float32 \[2, 8\] and a residual of "):
                add(x, residual, weight, 1e-5, *rest)
    for run in (split_ops.silu_mul_quantize, split_ops._cuda_silu_quantize):
        with pytest.raises(SchemeError, match=r"must be \[M, 2 K\], not float32 \[2, 9\]"):
            run(torch.zeros(2, 9), *rest)
        with pytest.raises(SchemeError, match="do not make up an input of 9"):
            run(torch.zeros(2, 18), index([0]), *rest[1:])


@pytest.mark.parametrize("weight", [torch.ones(7), torch.ones(8).bfloat16()], ids=["narrow", "bf16"])
def test_norms_that_do_not_fit_are_refused(weight: Tensor) -> None:
    for run in (split_ops.rms_norm_quantize, split_ops._cuda_norm_quantize):
        with pytest.raises(SchemeError, match=r"float32 \[2, 8\] activations needs a weight of that dtype and \[8\]"):
            run(torch.zeros(2, 8), weight, 1e-5, None, index([7]), 8, 0, 1.0)


def index(columns: list[int]) -> Tensor:
    return torch.tensor(columns, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.float64)}, r"not float64 \[2, 8\]"),
        ({"x": torch.zeros(8)}, r"not float32 \[8\]"),
        ({"outlier_idx": torch.tensor([3])}, r"outlier_idx must be int32.*not int64 \[1\]"),
        ({"base_idx": index([0, 1, 2])}, "3 base and 1 outlier columns do not make up an input of 8"),
        ({"outlier_idx": index(list(range(8)))}, "0 base and 8 outlier"),
        ({"bits": 16}, "4 or 8 bits, not 16"),
        ({"block": 4}, "blocks of 4 does not fit 7 base columns"),
        ({"block": 7}, "blocks of 7"),
        ({"x": torch.zeros(2, 2049), "block": 2048}, "up to 1024"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_refusals_say_why(change: dict[str, Any], message: str) -> None:
    values = {"x": torch.zeros(2, 8), "base_idx": None, "outlier_idx": index([7]), "bits": 8, "block": 0, "clip": 1.0}
    for run in (split_ops.quantize_activations, split_ops._cuda_quantize):
        with pytest.raises(SchemeError, match=message):
            run(*(values | change).values())


@pytest.mark.parametrize(
    ("kind", "least"),
    {
        "matrix": 72,
        "shape": 20,
        "part": 4,
        "lane": 24,
        "shared": 12,
        "empty": 1,
        "norm": 9,
        "silu": 24,
        "shuffle": 2,
    }.items(),
)
def test_in_the_interpreter(kind: str, least: int) -> None:
    assert_checks("quantize_interpreter", kind, least)


@pytest.mark.parametrize("block", [0, 1, 64, 512, 1024])
def test_programs_cover_their_token(block: int) -> None:
    for M in (1, 528, 529, 100_000):
        for B in (1, 128, 512, 513, 4096, 11008, WHOLE, WHOLE + 128, 28672, 65536):
            if block and B % block:
                continue
            columns = -(-B // 128) * 128
            for gather, silu in ((False, False), (True, False), (False, True), (True, True)):
                c = quantize_config(M, columns, block, PROCESSORS, gather, silu)
                assert 1 <= c.warps <= 32 and c.warps & (c.warps - 1) == 0 and c.repeats & (c.repeats - 1) == 0
                assert c.repeats * c.lane * 32 % max(block, 1) == 0, "a block lies in two warps"
                assert c.lane == (4 if gather and not block else 16), "columns of a lane lie apart"
                assert c.shared == (gather and not block and columns <= WHOLE)
                assert not c.shared or c.columns * 4 <= 1 << 16, "more float32 than there is shared memory for"
                assert c.whole == (columns <= WHOLE)
                assert not c.whole or c.columns >= columns
                assert c.repeats * c.lane <= 32, "more columns a lane than have registers"


def compiled(
    c: QuantizeConfig,
    bits: int,
    block: int,
    dtype: str,
    gather: bool,
    before: str = "",
    once: bool = False,
    aligned: bool = True,
) -> Any:
    """What `quantize` compiles for sm_90, for a large aligned input with outliers; before: "norm", "add" or "silu"."""
    names = kernel.quantize_kernel.arg_names
    types = {"x": f"*{dtype}", "outlier_idx": "*i32", "codes": "*i8", "scale": "*fp32", "zero": "*i32"}
    types |= {"outliers": f"*{dtype}", "clip": "fp32", "eps": "fp32"} | dict.fromkeys(
        ("stride", "K", "B", "Bp", "O", "Op"), "i32"
    )
    types |= {"base_idx": "*i32"} if gather else {}
    types |= {"weight": f"*{dtype}"} if before in ("norm", "add") else {}
    types |= dict.fromkeys(("residual", "total"), f"*{dtype}") if before == "add" else {}
    values = {"BITS": bits, "BLOCK": block, "LANE": c.lane, "WARPS": c.warps, "REPEATS": c.repeats, "WHOLE": c.whole}
    values |= {
        "SHARED": c.shared,
        "OUTLIERS": 256,
        "FMA": True,
        "SILU": before == "silu",
        "ONCE": once,
        "ALIGNED": aligned,
    }
    source = ASTSource(
        kernel.quantize_kernel,
        {n: types.get(n, "constexpr") for n in names},
        {(names.index(n),): values.get(n) for n in names if n not in types},
        {(names.index(n),): [["tt.divisibility", 16]] for n in types if n not in ("clip", "eps")},
    )
    options = {"num_warps": c.warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize("gather", [False, True], ids=["first", "gather"])
@pytest.mark.parametrize(
    ("M", "columns", "bits", "block", "dtype"),
    [
        (1, 4096, 4, 0, "bf16"),
        (1, 4096, 8, 1024, "bf16"),
        (1, 16384, 8, 0, "fp16"),
        (4096, 4096, 8, 0, "bf16"),
        (4096, 4096, 4, 1024, "bf16"),
        (4096, 16384, 4, 0, "fp16"),
        (4096, 16384, 4, 1024, "bf16"),
        (4096, 28672, 8, 0, "bf16"),
        (4096, 28672, 4, 1024, "fp16"),
        (1, 65536, 4, 0, "bf16"),
        (4096, 8192, 4, 256, "fp32"),
    ],
)
def test_hopper_keeps_a_token_in_registers(
    M: int, columns: int, bits: int, block: int, dtype: str, gather: bool, tmp_path: Path
) -> None:
    """From load to store no value changes its lane but through the shuffles of a rotation, and nothing spills."""
    c = quantize_config(M, columns, block, PROCESSORS, gather)
    made = compiled(c, bits, block, dtype, gather)
    ptx = made.asm["ptx"]
    held = c.repeats * c.lane
    if c.shared:
        check_gather(made, c, 2)
    else:
        assert made.metadata.shared <= 4 * 32 * 2, "values travel through shared memory"
        assert ptx.count("st.shared") <= 4 and ptx.count("bar.sync") <= 6
    # The codes of a lane are one store; 16-byte loads of the input, or of the indices where it is gathered.
    assert len(re.findall(rf"st\.global\.{'v4.' if c.lane == 16 else ''}b32", ptx)) >= c.repeats
    assert "st.global.b8" not in ptx and ("st.global.v4" in ptx) == (c.lane == 16)
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) >= held // 8
    lanes = min(max(block.bit_length() - 5, 0), 5)  # the first four of log2(block) steps are within a lane
    assert ptx.count("shfl.sync") >= held * lanes * (1 if c.whole else 2)
    # No division but the correctly rounded one, no fused product but the four of each quotient, nothing flushed.
    assert "div.full" not in ptx and "div.approx" not in ptx and ".ftz" not in ptx
    assert ptx.count("fma.rn.f32") == 4 * held
    few, many = (0, 0) if c.warps < 32 else (100, 100)  # a token of 32 warps is held at the price of some
    stored, loaded = spilled(ptx, tmp_path)
    assert stored <= few and loaded <= many


@pytest.mark.parametrize(("M", "columns", "bits"), [(1, 4096, 4), (4096, 8192, 8), (4096, 16384, 4)])
@pytest.mark.parametrize("before", ["norm", "add"])
def test_hopper_with_a_norm_in_front(M: int, columns: int, bits: int, before: str, tmp_path: Path) -> None:
    c = quantize_config(M, columns, 0, PROCESSORS, gather=True)
    made = compiled(c, bits, 0, "bf16", gather=True, before=before, once=before == "add")
    check_gather(made, c, 2)
    assert spilled(made.asm["ptx"], tmp_path) == [0, 0]


def test_rows_that_begin_anywhere_are_loaded_a_column_at_a_time() -> None:
    """What is promised to the compiler overrides what it knows: without the promise there must be none."""
    c = QuantizeConfig(8, 8, True, 4, True)
    for before in ("", "silu", "add"):
        ptx = compiled(c, 4, 0, "bf16", gather=True, before=before, aligned=False).asm["ptx"]
        assert ptx.count("ld.global.b16") >= c.repeats * c.lane * {"": 1, "silu": 2, "add": 3}[before]


@pytest.mark.parametrize("shared", [False, True])
def test_a_sum_is_stored_before_it_is_read(shared: bool) -> None:
    """By a program of several warps: there is a barrier in between, and no read-only cache, which would not know."""
    c = QuantizeConfig(8, 8, True, 4, shared)
    ptx = compiled(c, 4, 0, "bf16", gather=True, before="add").asm["ptx"]
    stored, gathered = ptx.rindex("st.global.v2" if shared else "st.global.v4"), ptx.index("ld.global.b16")
    assert stored < ptx.rindex("bar.sync", 0, gathered) and "ld.global.nc" not in ptx


@pytest.mark.parametrize("gather", [False, True], ids=["first", "gather"])
@pytest.mark.parametrize(("M", "columns", "dtype"), [(4096, 11008, "bf16"), (2048, 28672, "fp16")])
def test_hopper_with_a_gate_in_front(M: int, columns: int, dtype: str, gather: bool, tmp_path: Path) -> None:
    """A gate takes one exponential and one reciprocal, nothing else dear; a long token makes its products twice."""
    c = quantize_config(M, columns, 0, PROCESSORS, gather, silu=True)
    made = compiled(c, 8, 0, dtype, gather, "silu")
    ptx = made.asm["ptx"]
    if c.shared:
        check_gather(made, c, 2)
    assert spilled(ptx, tmp_path) == [0, 0]
    values = c.repeats * c.lane * (1 if c.whole else 2) + -(-256 // (c.warps * 32))  # outliers too
    assert values <= ptx.count("ex2.approx.ftz") == ptx.count("rcp.approx.ftz") <= values + 8
    assert "div.full" not in ptx and "ex2.approx.f32" not in ptx


def check_gather(made: Any, c: QuantizeConfig, itemsize: int) -> None:
    """A token goes through shared memory once, in wide stores, and no base column is loaded alone."""
    ptx, held = made.asm["ptx"], c.repeats * c.lane
    assert made.metadata.shared == c.columns * itemsize
    assert ptx.count("ld.shared.b16") == held
    assert ptx.count("ld.global.b16") <= 3 * -(-256 // (c.warps * 32)), "outliers, their other factors and weights"


def spilled(ptx: str, folder: Path) -> list[int]:
    """Bytes of spill stores and loads, by Triton's own ptxas."""
    (folder / "kernel.ptx").write_text(ptx)
    command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    found = re.findall(r"(\d+) bytes spill", said)
    assert found, said
    return [int(n) for n in found]
