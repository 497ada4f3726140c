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
from bitwright.kernels.triton.quantize import SPAN, WHOLE, QuantizeConfig, quantize_config  # noqa: E402

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
    ("kind", "least"), [("matrix", 72), ("shape", 20), ("part", 4), ("empty", 1), ("norm", 6), ("shuffle", 2)]
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
            c = quantize_config(M, columns, block, PROCESSORS)
            assert 1 <= c.warps <= 32 and c.warps & (c.warps - 1) == 0 and c.repeats & (c.repeats - 1) == 0
            assert c.repeats * SPAN % max(block, 1) == 0, "a block lies in two warps"
            assert c.whole == (columns <= WHOLE) and (not c.whole or c.columns >= columns)
            assert c.repeats <= 2, "more columns a lane than have registers"


def compiled(c: QuantizeConfig, bits: int, block: int, dtype: str, gather: bool, norm: bool = False) -> Any:
    """What `quantize` compiles for sm_90, for a large aligned input with outliers."""
    names = kernel.quantize_kernel.arg_names
    types = {"x": f"*{dtype}", "outlier_idx": "*i32", "codes": "*i8", "scale": "*fp32", "zero": "*i32"}
    types |= {"outliers": f"*{dtype}", "clip": "fp32", "eps": "fp32"} | dict.fromkeys(
        ("stride", "K", "B", "Bp", "O", "Op"), "i32"
    )
    types |= ({"base_idx": "*i32"} if gather else {}) | ({"weight": f"*{dtype}"} if norm else {})
    values = {"BITS": bits, "BLOCK": block, "WIDTH": SPAN, "WARPS": c.warps, "REPEATS": c.repeats, "WHOLE": c.whole}
    values |= {"OUTLIERS": 256, "FMA": True, "base_idx": None, "weight": None}
    source = ASTSource(
        kernel.quantize_kernel,
        {n: types.get(n, "constexpr") for n in names},
        {(names.index(n),): values[n] for n in names if n not in types},
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
    c = quantize_config(M, columns, block, PROCESSORS)
    made = compiled(c, bits, block, dtype, gather)
    ptx = made.asm["ptx"]
    assert made.metadata.shared <= 4 * 32 * 2, "values travel through shared memory"
    assert ptx.count("st.shared") <= 4 and ptx.count("bar.sync") <= 6
    # 16 codes a store; 16-byte loads of the input, or of the indices where it is gathered.
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == c.repeats
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) >= 2 * c.repeats
    lanes = min(max(block.bit_length() - 5, 0), 5)  # the first four of log2(block) steps are within a lane
    assert ptx.count("shfl.sync") >= 16 * c.repeats * lanes * (1 if c.whole else 2)
    # No division but the correctly rounded one, no fused product but the four of each quotient, nothing flushed.
    assert "div.full" not in ptx and "div.approx" not in ptx and ".ftz" not in ptx
    assert ptx.count("fma.rn.f32") == 4 * 16 * c.repeats
    assert spilled(ptx, tmp_path) == [0, 0]


@pytest.mark.parametrize(("M", "columns", "bits"), [(1, 4096, 4), (4096, 8192, 8), (4096, 16384, 4)])
def test_hopper_with_a_norm_in_front(M: int, columns: int, bits: int, tmp_path: Path) -> None:
    c = quantize_config(M, columns, 0, PROCESSORS)
    made = compiled(c, bits, 0, "bf16", gather=True, norm=True)
    assert made.metadata.shared <= 4 * 32 * 2
    assert spilled(made.asm["ptx"], tmp_path) == [0, 0]


def spilled(ptx: str, folder: Path) -> list[int]:
    """Bytes of spill stores and loads, by Triton's own ptxas."""
    (folder / "kernel.ptx").write_text(ptx)
    command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    found = re.findall(r"(\d+) bytes spill", said)
    assert found, said
    return [int(n) for n in found]
