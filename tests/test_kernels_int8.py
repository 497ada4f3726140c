"""The int8 tensor core path without a GPU: stored order, operators, kernels interpreted, and compiled for Hopper."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import int8_cases
from gpu.int8_cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import assert_checks

from bitwright.errors import SchemeError
from bitwright.kernels import int8_fragments, int8_ops
from bitwright.kernels.int8_fragments import MAX_COLUMNS, padded

triton = pytest.importorskip("triton")

import sass  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from bitwright.kernels.triton import int8  # noqa: E402
from bitwright.kernels.triton.config import Config, shared_memory  # noqa: E402
from bitwright.kernels.triton.int8_config import choose, choose_end, outlier_step  # noqa: E402

CPU = torch.device("cpu")
HOPPER = (9, 0)
PROCESSORS = 132

# --- the stored order


@settings(max_examples=40, deadline=None)
@given(N=st.integers(0, 70), B=st.integers(1, 300), seed=st.integers(0, 99))
def test_codes_come_back(N: int, B: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (N, B), generator=generator).to(torch.int8)
    before = codes.clone()
    blocks = int8_fragments.pack(codes)
    assert tuple(blocks.shape) == (-(-N // 16), padded(B) // 64, 512) and blocks.dtype == torch.int8
    assert torch.equal(int8_fragments.unpack(blocks, N, B), codes)
    assert torch.equal(codes, before)
    whole = int8_fragments.unpack(blocks, blocks.shape[0] * 16, padded(B))
    assert not whole[N:].any() and not whole[:, B:].any()
    index = torch.randint(max(N, 1), (min(N, 5),), generator=generator)
    assert torch.equal(int8_fragments.unpack_rows(blocks, index, B), codes[index])


def test_pieces_give_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(-8, 8, (100, 200)).to(torch.int8)
    whole = int8_fragments.pack(codes)
    monkeypatch.setattr(int8_fragments, "_CHUNK", 1)
    assert torch.equal(int8_fragments.pack(codes), whole)
    assert torch.equal(int8_fragments.unpack(whole, 100, 200), codes)


def test_the_order_is_the_one_stated() -> None:
    codes = torch.randint(-8, 8, (16, 128), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    block = int8_fragments.pack(codes)[0, 1].tolist()
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for w1 in range(2):
            for w0 in range(2):
                for b in range(4):
                    byte = block[16 * lane + 8 * w1 + 4 * w0 + b] & 0xFF
                    column = 64 + 32 * w1 + 16 * w0 + 4 * t + b
                    assert byte & 15 == int(codes[g, column]) & 15
                    assert byte >> 4 == int(codes[g + 8, column]) & 15


# --- the operators


@pytest.mark.parametrize("case", [Case(), Case(8, 8, M=2, O=24, bias=True), Case(4, 8, O=16), Case(M=0)], ids=str)
def test_opcheck(case: Case) -> None:
    torch.library.opcheck(int8_ops.int8_linear, int8_cases.operands(case))
    torch.library.opcheck(int8_ops.int8_finish, int8_cases.finish_operands(case))


@pytest.mark.parametrize("case", [Case(M=2, N=3, B=70, O=3, bias=True), Case(8, 8, M=2, N=3, B=5)], ids=str)
def test_the_operator_is_the_formula(case: Case) -> None:
    given = int8_cases.operands(case)
    codes, scale, zero, outliers, weight, weight_scale, _, weight_outliers, bias, *_ = given
    rows = int8_fragments.unpack(weight, case.N, case.B) if case.bits == 4 else weight[:, : case.B]
    y = int8_ops.int8_linear(*given)
    for m in range(case.M):
        for n in range(case.N):
            pairs = zip(codes[m].tolist(), rows[n].tolist(), strict=False)
            total = sum((c - int(zero[m])) * w for c, w in pairs)
            value = (
                torch.tensor(float(total)) * scale[m] * weight_scale[n]
                + outliers[m].float() @ weight_outliers[n].float()
                + (0 if bias is None else bias[n].float())
            )
            assert y[m, n] == value.to(case.dtype)


def test_operands_that_do_not_fit_are_refused() -> None:
    given = int8_cases.operands(Case(O=16))
    names = [argument.name for argument in int8_ops.int8_linear._schema.arguments]
    for name, value, message in (
        ("bits", 3, "of 4 or 8 bits, not of 3"),
        ("B", MAX_COLUMNS + 1, f"{MAX_COLUMNS + 1} base columns.*16-bit activations"),
        ("B", 0, "0 base columns"),
        ("N", 200, r"weight must be .*\[13, 6, 512\]"),
        ("B", 64, r"codes must be .*\[5, 128\]"),
        ("codes", given[0].float(), "not torch.float32"),
    ):
        changed = list(given)
        changed[names.index(name)] = value
        with pytest.raises(SchemeError, match=message):
            int8_ops.int8_linear(*changed)
    operands = dict(zip(names, given, strict=True))
    for name, value in (
        ("scale", operands["scale"].double()),
        ("zero", operands["zero"][1:]),
        ("outliers", operands["outliers"][:, 1:]),
        ("weight_outliers", operands["weight_outliers"].half()),
        ("weight_scale", operands["weight_scale"][None]),
    ):
        rest = {n: operands[n] for n in names[1:4] + names[5:9]} | {name: value}
        with pytest.raises(SchemeError, match=f"{name} must be contiguous"):
            int8_ops.check_rest(*rest.values(), 5, 72, torch.bfloat16, CPU)
    with pytest.raises(SchemeError, match=r"not torch\.float32"):
        int8_ops.check_rest(*rest.values(), 5, 72, torch.float32, CPU)
    rest = {n: operands[n] for n in names[1:4] + names[5:9]}
    int8_ops.check_rest(*rest.values(), 5, 72, torch.bfloat16, CPU)
    rest["row_sums"] = rest["row_sums"].to("meta")
    with pytest.raises(SchemeError, match="row_sums is on meta, the codes on cpu; move the linear there"):
        int8_ops.check_rest(*rest.values(), 5, 72, torch.bfloat16, CPU)
    moved = [t.to("meta") if name == "weight" else t for name, t in zip(names, given, strict=True)]
    for operator in (int8_ops._cpu_linear, int8_ops._cuda_linear):
        with pytest.raises(SchemeError, match="the weight is on meta, the codes on cpu"):
            operator(*moved)


# --- the kernels


@pytest.mark.parametrize("kind", ["linear", "close", "finish"])
def test_in_the_interpreter(kind: str) -> None:
    assert_checks("int8_interpreter", kind, {"linear": 23, "close": 3, "finish": 6}[kind])


def test_ptx_gives_sixteen_times_each_code() -> None:
    """The statement run by hand: every pair of nibbles, in every byte of a register."""
    for byte in range(256):
        low, high = byte & 15, byte >> 4
        word = byte | (byte ^ 0xFF) << 8 | byte << 16 | (byte ^ 0x5A) << 24
        registers = {"$2": word}
        for line in int8.SIXTEENFOLD.value.strip("{} ").split("; "):
            operation, *names = line.rstrip(";").replace(",", "").split()
            if operation == ".reg":
                continue
            target, a, b = names
            shift = {"shl.b32": True, "and.b32": False}[operation]
            registers[target] = registers[a] << int(b, 0) & 0xFFFFFFFF if shift else registers[a] & int(b, 0)
        for name, nibbles in (("$0", low), ("$1", high)):
            for place, mask in ((0, 0), (1, 15), (2, 0), (3, 0xA if name == "$0" else 5)):
                code = nibbles ^ mask
                assert registers[name] >> (8 * place) & 0xFF == (16 * (code - 16 * (code >> 3))) & 0xFF


def compiled(c: Config, bits: int, O: int, capability: int = 90, kind: str = "bf16") -> Any:
    """The kernel compiled for sm_`capability` with a bias, as `linear` would for large aligned operands."""
    kernel = int8.int8_kernel
    types = {name: "i32" for name in ("M", "N", "Bp", "O")}
    types |= {"codes": "*i8", "weight": "*i8", "scale": "*fp32", "weight_scale": "*fp32", "zero": "*i32"}
    types |= {"row_sums": "*i32"} | {n: f"*{kind}" for n in ("outliers", "weight_outliers", "bias", "out")}
    if c.split_k > 1:
        types |= {"sums": "*i32", "outlier_sums": "*fp32", "arrived": "*i32"}
    values = {"BITS": bits, "BN": c.BN, "BM": c.BM, "BK": c.BK, "OK": outlier_step(O, c.BM)}
    values |= {"SPLIT": c.split_k > 1, "STREAM": c.BM <= 64}
    return build(kernel, types, values, c.warps, c.stages, capability)


def build(kernel: Any, types: dict[str, str], values: dict[str, Any], warps: int, stages: int, capability: int) -> Any:
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {n: types.get(n, "constexpr") for n in names},
        {(names.index(n),): values.get(n) for n in names if n not in types},
        {(names.index(n),): [["tt.divisibility", 16]] for n in types if n != "M"},
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def assembled(ptx: str, folder: Path) -> str:
    """What ptxas says about a kernel."""
    (folder / "kernel.ptx").write_text(ptx)
    command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stderr + done.stdout


def every_choice() -> list[tuple[Config, int]]:
    """Configurations that differ in code, and the weight's bits."""
    found = {}
    for bits in (4, 8):
        for M in (1, 17, 33, 65, 300, 2048, 8192):
            for N in (64, 4096, 8192, 28672):
                for B in (128, 3840, 28672):
                    c = choose(M, N, B, 256, bits, HOPPER, PROCESSORS)
                    found[bits, c.BN, c.BM, c.stages, c.split_k > 1] = c, bits
    return list(found.values())


@pytest.mark.parametrize(("c", "bits"), every_choice(), ids=str)
def test_hopper(c: Config, bits: int, tmp_path: Path) -> None:
    made = compiled(c, bits, O=256)
    ptx = made.asm["ptx"]
    assert made.metadata.shared <= shared_memory(HOPPER)
    first, last = ptx.index(".s32.s8.s8"), ptx.rindex(".s32.s8.s8")
    loop = ptx[ptx.rindex("\n$L__BB", 0, first) : last]
    products = re.findall(r"wgmma\.mma_async\S+\.s32\.s8\.s8 *\{[^}]*\}, *(\{[^}]*\}|%\w+),", ptx)
    assert len(products) >= c.BK // 32
    # Four registers a thread of 4-bit weights, a descriptor of shared memory for those of 8.
    assert all(left.count("%") == (4 if bits == 4 else 1) and (left[0] == "{") == (bits == 4) for left in products)
    moves = ("st.shared", "stmatrix", *(["shfl"] if bits == 4 else []))  # at 8 bits a warp tells its lanes its number
    assert not any(move in loop for move in moves), "weights move between lanes"
    # Outliers go on top of the registers that hold the sum, and no product is fused with a sum before them.
    assert re.search(r"wgmma\.mma_async\S+\.f32\.bf16\.bf16", ptx)
    assert "fma.rn.f32" not in ptx and "mul.rn.f32" in ptx
    said = assembled(ptx, tmp_path)
    assert [int(n) for n in re.findall(r"(\d+) bytes spill", said)] == [0, 0], said
    assert "wgmma" not in said, said  # it would warn of products made one after the other
    text = sass.disassembled(made.asm["cubin"], tmp_path)
    assert len(sass.loops(text)) == 2  # base columns and outliers
    assert not sass.overwritten(text)


@pytest.mark.parametrize("M", [1, 32, 64, 2048])
def test_the_end_alone_compiles(M: int, tmp_path: Path) -> None:
    integers = ("M", "N", "O", "columns", "sums_stride", "out_stride")
    types = {name: "i32" for name in integers} | {"sums": "*i32", "zero": "*i32", "row_sums": "*i32"}
    types |= {"scale": "*fp32", "weight_scale": "*fp32"}
    types |= {n: "*fp16" for n in ("outliers", "weight_outliers", "out")}
    c = choose_end(M, 8192, 256)
    made = build(int8.finish_kernel, types, {"BN": c.BN, "BM": c.BM, "OK": c.BK}, c.warps, c.stages, 90)
    ptx = made.asm["ptx"]
    assert "fma.rn.f32" not in ptx
    assert re.search(r"wgmma\.mma_async\S+\.f32\.f16\.f16", ptx)
    assert "ld.global.v4.b32" in ptx, "sums are loaded one by one"
    assert 2 * made.metadata.shared <= shared_memory(HOPPER)
    said = assembled(ptx, tmp_path)
    assert [int(n) for n in re.findall(r"(\d+) bytes spill", said)] == [0, 0], said
    assert int(re.search(r"Used (\d+) registers", said)[1]) * 32 * c.warps * 2 <= 65536, said
    assert not sass.overwritten(sass.disassembled(made.asm["cubin"], tmp_path))


@pytest.mark.parametrize("bits", [4, 8])
def test_ampere(bits: int) -> None:
    """The same kernel on mma.sync."""
    c = choose(300, 4096, 4096, 0, bits, (8, 0), 108)
    made = compiled(c, bits, 0, capability=80)
    assert re.search(r"mma\.sync\S+\.s32\.s8\.s8", made.asm["ptx"])
    assert made.metadata.shared <= shared_memory((8, 0))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
def test_tiles_fit_and_cover(capability: tuple[int, int], bits: int) -> None:
    for M in (1, 16, 17, 64, 65, 128, 129, 2048, 100_000):
        for N, B in ((1, 1), (64, 4096), (4096, 64), (4096, 4096), (57344, 8192), (2048, 49152)):
            c = choose(M, N, B, 256, bits, capability, PROCESSORS)
            assert c.BN % (16 * c.warps) == 0 and padded(B) % c.BK == 0
            assert c.stages >= 2 and c.stages * (c.BM * c.BK + c.BN * c.BK * bits // 8) <= shared_memory(capability)
            assert c.stages * outlier_step(256, c.BM) * 2 * (c.BM + c.BN) <= shared_memory(capability)
            assert c.BM >= M or c.BM >= 128
            steps = padded(B) // c.BK + 256 // outlier_step(256, c.BM)
            assert 1 <= c.split_k <= max(1, steps // 2)
            tiles = -(-N // c.BN) * -(-M // c.BM)
            assert c.split_k == 1 or M <= 64 or tiles < PROCESSORS
    assert choose(1, 4096, 4096, 0, bits, HOPPER, 132).split_k > 1
    assert choose(4096, 8192, 8192, 0, bits, HOPPER, 132) == Config(128, 256, 128, 8, 3)
