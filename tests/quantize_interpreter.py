"""A program: the activation quantizer in Triton's interpreter (`interpreter.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from interpreter import report  # first of all: it asks for the interpreter

# isort: split
import torch
import triton.language as tl
from gpu import quantize_cases as cases
from gpu.quantize_cases import Case
from torch import Tensor

from bitwright.kernels import split_ops
from bitwright.kernels.triton import quantize as module
from bitwright.kernels.triton.quantize import QuantizeConfig, quantize

LANES = [Case(bits, B, 300, 0, "ascending", dtype=d) for bits in (4, 8) for B in (500, 2000) for d in cases.DTYPES]
PARTS = [
    Case(4, 1300, 40, order="shuffled", clip=0.9),
    Case(8, 1300, 0, dtype=torch.float32),
    Case(4, 3072, 17, 1024, "ascending"),
    Case(8, 2560, 5, 512, "first", dtype=torch.float16),
]


def run(*arguments: object, tiles: QuantizeConfig | None = None) -> tuple[Tensor, ...]:
    """The kernel on CPU tensors, called like the operator."""
    x, base_idx, outlier_idx, bits, block, clip = arguments
    out = split_ops._allocated(x, base_idx, outlier_idx)
    quantize(x, base_idx, outlier_idx, bits, block, clip, out, tiles)
    return out


def check_norm(case: Case, tiles: QuantizeConfig | None = None) -> None:
    """Activations that are small integers: their squares have one sum, in any order."""
    x, base_idx, outlier_idx, *rest = cases.operands(case)
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(-9, 10, x.shape, generator=generator).to(case.dtype)
    weight = (torch.rand(case.K, generator=generator) + 0.5).to(case.dtype)
    out = split_ops._allocated(x, base_idx, outlier_idx)
    for once in (False, True):
        quantize(x, base_idx, outlier_idx, *rest, out, tiles, norm={"weight": weight, "eps": 1e-5, "once": once})
        expected = split_ops.rms_norm_quantize(x, weight, 1e-5, base_idx, outlier_idx, *rest, once)
        cases.compare(out, expected, f"norm {case}, once {once}")
    residual = torch.randint(-9, 10, x.shape, generator=generator).to(case.dtype)
    total = torch.empty_like(x)
    norm = {"weight": weight, "eps": 1e-5, "once": True, "residual": residual, "total": total}
    quantize(x, base_idx, outlier_idx, *rest, out, tiles, norm=norm)
    expected = split_ops.add_rms_norm_quantize(x, residual, weight, 1e-5, base_idx, outlier_idx, *rest, True)
    cases.compare(out, expected[:4], f"norm of a sum {case}")
    assert torch.equal(total, expected[4]), f"sum {case}"


def check_silu(case: Case, tiles: QuantizeConfig | None = None) -> None:
    """Gates are 0 or so large that exponentials do not matter: implementations of those differ."""
    x, base_idx, outlier_idx, *rest = cases.operands(case)
    generator = torch.Generator().manual_seed(3)
    gates = torch.tensor([0.0, 40.0, -200.0, 100.5, 64.25])[torch.randint(5, x.shape, generator=generator)]
    wide = torch.full((case.M, 2 * case.K + 9), torch.nan, dtype=case.dtype)[:, : 2 * case.K]  # rows apart
    wide[:, : case.K], wide[:, case.K :] = gates.to(case.dtype), x
    out = split_ops._allocated(x, base_idx, outlier_idx)
    quantize(wide, base_idx, outlier_idx, *rest, out, tiles, silu=True)
    expected = split_ops.silu_mul_quantize(wide, base_idx, outlier_idx, *rest)
    cases.compare(out, expected, f"silu {case}")
    plain = split_ops.quantize_activations(x * gates.clamp(min=0).to(case.dtype), base_idx, outlier_idx, *rest)
    cases.compare(out, plain, f"silu {case}, twin")


def check_shuffles(case: Case) -> None:
    """The rotation as a GPU does it, which takes its time here."""
    try:
        module.INTERPRET = tl.constexpr(False)
        cases.check(run, case)
    finally:
        module.INTERPRET = tl.constexpr(True)


def all_checks() -> dict[str, Callable[[], None]]:
    """Every kind of problem, rows in one piece and in several, the norm before it, the shuffles of a rotation."""
    narrow = [case for case in cases.shapes() if case.M * case.K < 1 << 17]
    checks = {f"matrix {case}": partial(cases.check, run, case) for case in cases.matrix()}
    checks |= {f"shape {case}": partial(cases.check, run, case) for case in narrow}
    for case in PARTS:
        tiles = QuantizeConfig(2 if case.block < 1024 else 1, max(1, case.block // 512), whole=False)
        checks[f"part {case}"] = partial(cases.check, partial(run, tiles=tiles), case)
    for case in LANES:
        for lane in (4, 16):
            tiles = QuantizeConfig(2, 64 // lane, whole=True, lane=lane)
            checks[f"lane {lane} {case}"] = partial(cases.check, partial(run, tiles=tiles), case)
        tiles = QuantizeConfig(4, 8, whole=True, lane=4, shared=True)
        checks[f"shared {case}"] = partial(cases.check, partial(run, tiles=tiles), case)
    checks["empty"] = partial(cases.check, run, Case(4, 96, 8, M=0))
    for dtype in cases.DTYPES:
        case = Case(4, 600, 40, 8, "shuffled", 0.9, dtype, M=3)
        checks[f"norm {case}"] = partial(check_norm, case)
        tiles = QuantizeConfig(1, 8, whole=True, lane=4, shared=True)
        checks[f"norm {replace(case, block=0)} shared"] = partial(check_norm, replace(case, block=0), tiles)
        checks[f"norm {case} in parts"] = partial(check_norm, case, QuantizeConfig(1, 1, whole=False))
    for order, dtype in ((o, d) for o in cases.ORDERS for d in cases.DTYPES):
        case = Case(8 if order == "first" else 4, 600, 40, 8 if order == "shuffled" else 0, order, dtype=dtype)
        checks[f"silu {case}"] = partial(check_silu, case)
        if order != "first":
            tiles = QuantizeConfig(1, 8, whole=True, lane=4, shared=True)
            checks[f"silu {replace(case, block=0)} shared"] = partial(check_silu, replace(case, block=0), tiles)
        checks[f"silu {case} in parts"] = partial(check_silu, case, QuantizeConfig(2, 2, whole=False, lane=4))
    for case in (Case(8, 512, block=512, M=2), Case(4, 1024, 3, 1024, "shuffled", M=1)):
        checks[f"shuffle {case}"] = partial(check_shuffles, case)
    return checks


if __name__ == "__main__":
    report(all_checks())
