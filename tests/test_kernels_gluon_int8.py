"""The Hopper kernel for quantized activations where there is no GPU: tiles, and what it compiles to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if not triton.__version__.startswith("3.6."):
    pytest.skip("the kernel is written for the Gluon of Triton 3.6", allow_module_level=True)

import sass  # noqa: E402
from hopper import Assembled, assemble, tensor  # noqa: E402

from bitwright.kernels.gluon import int8  # noqa: E402
from bitwright.kernels.gluon.int8 import Config, choose  # noqa: E402
from bitwright.kernels.int8_fragments import STEP  # noqa: E402

PROCESSORS = 132
CHOICES = [
    choose(M, N, O, bits, bias, PROCESSORS)
    for M, N in ((65, 8192), (2048, 4096), (2048, 4100))
    for O in (0, 256)
    for bits in (4, 8)
    for bias in (False, True)
]


def compiled(c: Config, kind: str, folder: Path) -> Assembled:
    """A configuration for sm_90, outliers and results of `kind`."""
    from bitwright.kernels.gluon.int8_kernel import int8_gemm

    tokens = tensor("i8", [c.BM, STEP], int8.CODES)
    words = tensor("i32", [c.BN // 16, 2 * STEP], int8.WORDS)
    columns = int8.outlier_layout(c.OK) if c.OK else None
    signature = {
        "weight_desc": words if c.BITS == 4 else tensor("i8", [c.BN, STEP], int8.CODES),
        "x_desc": tokens,
        "weight_outliers_desc": tensor(kind, [c.BN, c.OK], columns) if c.OK else tokens,
        "outliers_desc": tensor(kind, [c.BM, c.OK], columns) if c.OK else tokens,
        "out_desc": tensor(kind, [min(c.BM, 32), 64 * c.REST], int8.RESULTS) if c.TMA_OUT else tokens,
        "out": f"*{kind}",
        "scale": "*fp32",
        "zero": "*i32",
        "weight_scale": "*fp32",
        "row_sums": "*i32",
        "bias": f"*{kind}",
        **{name: "i32" for name in ("M", "N", "steps", "outlier_steps")},
    }
    aligned = ("out", "scale", "zero", "weight_scale", "row_sums", "bias")
    return assemble(int8_gemm, signature, c, aligned, {"maxnreg": c.MAXNREG, "enable_fp_fusion": False}, folder)


@pytest.mark.parametrize("c", CHOICES, ids=str)
def test_compiles_without_spills_for_hopper(c: Config, tmp_path: Path) -> None:
    kind = "fp16" if c.BIAS else "bf16"
    made = compiled(c, kind, tmp_path)
    ptx, said, spilled, shared = made.ptx, made.said, made.spilled, made.shared
    # Results written value by value need addresses; a few numbers kept aside after the loop cost nothing.
    assert spilled <= (0 if c.TMA_OUT else 128)
    assert shared <= 227 << 10
    assert "wgmma" not in said, said  # a warning would say that products wait for each other
    products = re.findall(r"wgmma\.mma_async\S+\.s32\.s8\.s8 *\{[^}]*\}, *(\{[^}]*\}|%\w+),", ptx)
    # Four registers a thread of 4-bit weights, a descriptor of shared memory for those of 8.
    assert products and all(left.count("%") == (4 if c.BITS == 4 else 1) for left in products)
    assert "prmt" not in ptx, "bytes of codes are put together one by one"
    # Outliers go on top of the registers that hold the sum, and no product is fused with a sum before them.
    assert bool(re.search(r"wgmma\.mma_async\S+\.f32\.(bf16\.bf16|f16\.f16)", ptx)) == (c.OK > 0)
    assert "fma.rn.f32" not in ptx and "mul.rn.f32" in ptx
    code = sass.disassembled(made.cubin, tmp_path)
    assert sass.loops(code) and not sass.overwritten(code), "a register changes that a product may be reading"


def test_few_tiles_are_left_to_programs_that_share_them() -> None:
    """As measured: 8192 outputs are enough at 128 tokens; the keys of grouped heads need many more."""
    assert int8.fills(128, 8192, PROCESSORS) and not int8.fills(64, 8192, PROCESSORS)
    assert int8.fills(1024, 1024, PROCESSORS) and not int8.fills(512, 1024, PROCESSORS)


def test_tiles_follow_the_rounds_of_programs() -> None:
    """Half tiles where whole ones would leave programs idle, whole ones where there is work for several rounds."""
    assert choose(256, 8192, 256, 4, False, PROCESSORS).BM == 64
    assert choose(256, 12288, 256, 4, False, PROCESSORS).BM == 128
    assert choose(512, 12288, 256, 4, False, PROCESSORS).BM == 64
    assert choose(2048, 8192, 256, 4, False, PROCESSORS).BM == 128


@pytest.mark.parametrize("c", CHOICES, ids=str)
def test_a_stage_holds_a_step_of_outliers(c: Config) -> None:
    """They take the memory of a step of base columns, of the weight and of the tokens."""
    assert 2 * c.OK * c.BN <= c.BN * STEP * c.BITS // 8 and 2 * c.OK * c.BM <= c.BM * STEP
    assert 2 <= c.NS <= c.stages_that_fit
    assert (4 * int8.NWG + 4) * 32 * c.MAXNREG <= 65536
