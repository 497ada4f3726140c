"""The Triton kernels without a GPU: run in the interpreter, and compiled for GPUs that are not here.

The interpreter checks indices and arithmetic, with plain operations in place of PTX; `tests/gpu` has the whole matrix.
The compiler's output tells what a GPU would do: that Hopper's tensor cores take weights from registers, straight from
the arithmetic that unpacks them, and that nothing spills.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from interpreted import assert_checks

triton = pytest.importorskip("triton")

import sass  # noqa: E402
from gpu import cases  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from bitwright.errors import SchemeError  # noqa: E402
from bitwright.kernels.fragments import pack  # noqa: E402
from bitwright.kernels.triton import dequantize, experts, gemm  # noqa: E402
from bitwright.kernels.triton.config import Config, config, expert_config, max_tiles  # noqa: E402

BITS = (2, 3, 4, 8)
ALIGNED = ("x", "words", "plane", "scale", "zero", "out", "partial", "arrived", "bias", "N", "K")


@pytest.mark.parametrize("kind", ["exact", "one-hot", "no tokens", "experts", "dequantize", "sort"])
def test_in_the_interpreter(kind: str) -> None:
    assert_checks(
        "triton_interpreter",
        kind,
        {"exact": 25, "one-hot": 4, "no tokens": 1, "experts": 8, "dequantize": 6, "sort": 5}[kind],
    )


@pytest.mark.parametrize("count", [32, 1024])
def test_sorting_by_expert_compiles_for_hopper(count: int, tmp_path: Path) -> None:
    from bitwright.kernels.triton.routing import sort_kernel

    names = sort_kernel.arg_names
    signature = {"index": "*i64", "offsets": "*i32", "tokens": "*i64", "places": "*i64"}
    signature |= dict.fromkeys(("count", "k", "experts"), "i32") | dict.fromkeys(("BLOCK", "COUNT"), "constexpr")
    constants = {(names.index("BLOCK"),): 8, (names.index("COUNT"),): count}
    source = ASTSource(sort_kernel, {n: signature[n] for n in names}, constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    (tmp_path / "kernel.ptx").write_text(made.asm["ptx"])
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    command = [ptxas, "-v", "--gpu-name=sm_90a", tmp_path / "kernel.ptx", "-o", tmp_path / "kernel.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "0 bytes spill stores" in said, said


def compiled(
    kernel: Any, capability: int, tiles: Config, bits: int, group: int, zero: bool = False, dtype: str = "bf16"
) -> Any:
    """`kernel` compiled for sm_`capability`; what `linear` would compile for a large aligned weight."""
    pointers = {"words": "*i32", "plane": "*i32", "scale": f"*{dtype}", "out": f"*{dtype}", "N": "i32", "K": "i32"}
    optional = {"x": f"*{dtype}", "offsets": "*i32", "M": "i32", "E": "i32"}
    types = pointers | {n: t for n, t in optional.items() if n in kernel.arg_names}
    values = {"BITS": bits, "GROUP": group, "BN": tiles.BN, "BM": tiles.BM, "BK": tiles.BK, "ASM": True}
    values |= {"SPLIT": tiles.split_k > 1, "EVEN": True, "STREAM": True, "EXPERTS": 8, "bias": None}
    if zero:
        types["zero"] = f"*{dtype}"
    if tiles.split_k > 1:
        types |= {"partial": "*fp32", "arrived": "*i32"}
    names = kernel.arg_names
    constants = {n: values.get(n) for n in names if n not in types}
    source = ASTSource(
        kernel,
        {n: types.get(n, "constexpr") for n in names},
        {(names.index(n),): value for n, value in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in ALIGNED if n in types},
    )
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def loop_of(ptx: str) -> str:
    """The block of PTX that multiplies: from its label to the last wgmma."""
    first, last = ptx.index("wgmma.mma_async"), ptx.rindex("wgmma.mma_async")
    return ptx[ptx.rindex("\n$L__BB", 0, first) : last]


def spills(ptx: str, arch: str, folder: Path) -> list[int]:
    """Bytes of spill stores and loads, by Triton's own ptxas."""
    (folder / "kernel.ptx").write_text(ptx)
    command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={arch}", "kernel.ptx", "-o", "kernel.cubin"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    found = re.findall(r"(\d+) bytes spill", done.stderr + done.stdout)
    assert found, done.stderr
    return [int(n) for n in found]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("M", [1, 2048])
def test_hopper_multiplies_from_registers(bits: int, M: int, tmp_path: Path) -> None:
    """Few and many tokens, with zero points for half of them."""
    tiles = config(M, 8192, 8192, bits, (9, 0), 132)
    ptx = compiled(gemm.linear_kernel, 90, tiles, bits, 128, zero=bits in (3, 8)).asm["ptx"]
    loop = loop_of(ptx)
    products = re.findall(r"wgmma\.mma_async\S+ *\{[^}]*\}, *(\{?)", loop)
    assert len(products) >= tiles.BK // 16 - 1
    assert all(brace == "{" for brace in products), "left operand in shared memory"
    assert "st.shared" not in loop and "stmatrix" not in loop and "shfl" not in loop, "weights move between lanes"
    assert spills(ptx, "sm_90a", tmp_path) == [0, 0]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("M", [1, 32, 64, 256, 2048])
def test_weights_stay_until_they_are_multiplied(bits: int, M: int, tmp_path: Path) -> None:
    made = compiled(gemm.linear_kernel, 90, config(M, 8192, 8192, bits, (9, 0), 132), bits, 128, zero=bits == 3)
    text = sass.disassembled(made.asm["cubin"], tmp_path)
    assert len(sass.loops(text)) == 1
    assert not sass.overwritten(text)


def test_what_changes_too_early_is_found() -> None:
    loop = """
.L_x_0:
        /*0000*/                   MOV R8, R2 ;
        /*0010*/                   HGMMA.64x8x16.F32.BF16 R24, R4, gdesc[UR4], R24, gsb0 ;
        /*0020*/                   HGMMA.64x8x16.F32.BF16 R24, R8, gdesc[UR4], R24, gsb0 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0040*/                   IMAD.WIDE R6, R0, 0x2, R10 ;
        /*0050*/              @!P0 BRA `(.L_x_0) ;
"""
    assert sass.overwritten(loop) == ["MOV R8, R2"]
    assert not sass.overwritten(loop.replace("0x1 ", "0x0 "))
    assert sass.overwritten(loop.replace("R6, R0", "R10, R0")) == ["MOV R8, R2", "IMAD.WIDE R10, R0, 0x2, R10"]


@pytest.mark.parametrize("bits", BITS)
def test_hopper_experts(bits: int, tmp_path: Path) -> None:
    tiles = expert_config(16, 8, 4096, 4096, bits, (9, 0), 132)
    made = compiled(experts.experts_kernel, 90, tiles, bits, 32, zero=bits == 2, dtype="fp16")
    ptx = made.asm["ptx"]
    assert not sass.overwritten(sass.disassembled(made.asm["cubin"], tmp_path))
    assert "st.shared" not in loop_of(ptx)
    assert spills(ptx, "sm_90a", tmp_path) == [0, 0]


@pytest.mark.parametrize("bits", BITS)
def test_ampere(bits: int) -> None:
    tiles = config(64, 4096, 4096, bits, (8, 0), 108)
    made = compiled(gemm.linear_kernel, 80, tiles, bits, 64, zero=bits == 4)
    assert "mma.sync" in made.asm["ptx"]
    assert made.metadata.shared <= 163 * 1024


@pytest.mark.parametrize("bits", BITS)
def test_dense_weights_leave_in_whole_lines(bits: int) -> None:
    tiles = Config(64, 16, 128, 4, 3)
    ptx = compiled(dequantize.dequantize_kernel, 90, tiles, bits, 128).asm["ptx"]
    stores = re.findall(r"st\.global\S*", ptx)
    assert stores and all(".v4.b32" in store for store in stores), stores


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("bits", BITS)
def test_tiles_fit_and_cover(capability: tuple[int, int], bits: int) -> None:
    """Every problem: tiles the kernels can take, in memory that the GPU has, and no more parts of K than steps."""
    limit = {(7, 5): 64, (8, 0): 163, (9, 0): 227, (10, 0): 227}.get(capability, 99) * 1024
    for M in (1, 16, 17, 64, 65, 128, 129, 2048, 100_000):
        for N, K in ((1, 1), (64, 4096), (4096, 64), (4096, 4096), (57344, 8192), (2048, 49152)):
            c = config(M, N, K, bits, capability, 132)
            assert c.BN % (16 * c.warps) == 0 and c.BK % 64 == 0
            assert c.stages >= 2 and c.stages * (c.BM * c.BK * 2 + c.BN * c.BK * bits // 8) <= limit
            assert c.BM >= M or c.BM >= 128
            assert 1 <= c.split_k <= max(1, -(-K // c.BK) // 2)
    assert config(1, 4096, 4096, bits, (9, 0), 132).split_k > 1 == config(4096, 8192, 8192, bits, (9, 0), 132).split_k


@pytest.mark.parametrize("counts", [(0,), (1, 0, 5), (16, 16), (17, 1, 0, 40), (1,) * 12, (0, 0, 3)])
def test_slots_suffice(counts: tuple[int, ...]) -> None:
    for BM in (1, 16, 64):
        assert sum(-(-c // BM) for c in counts) <= max_tiles(sum(counts), len(counts), BM)


def test_refusals_say_why() -> None:
    import torch

    f = pack(cases.weight(cases.Case(4, 64, K=128)), torch.bfloat16)
    x = torch.zeros(2, 128, dtype=torch.bfloat16)
    with pytest.raises(SchemeError, match=r"not torch\.float32"):
        gemm.linear(x.float(), f)
    with pytest.raises(SchemeError, match=r"\[2, 64\].*\[M, 128\]"):
        gemm.linear(x[:, :64], f)
    with pytest.raises(SchemeError, match=r"scales are torch\.bfloat16"):
        gemm.linear(x.half(), f)
    with pytest.raises(SchemeError, match="one weight"):
        experts.linear(x, torch.zeros(2, dtype=torch.int32), f)
    with pytest.raises(SchemeError, match=r"not torch\.float32"):
        dequantize.dequantize(f, torch.float32)
    with pytest.raises(SchemeError, match="group size 40"):
        gemm.linear(x, pack(cases.weight(cases.Case(4, 40, K=128)), torch.bfloat16))
