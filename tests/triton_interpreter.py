"""A program: the Triton kernels for 16-bit activations in Triton's interpreter (`interpreter.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from interpreter import report  # first of all: it asks for the interpreter

# isort: split
import torch
from gpu import cases
from gpu.cases import Case

from bitwright.kernels.fragments import dequantize, pack, stack
from bitwright.kernels.triton import dequantize as dense
from bitwright.kernels.triton import experts, gemm, routing
from bitwright.kernels.triton.config import Config

BF16, FP16 = torch.bfloat16, torch.float16
SMALL = Config(BN=32, BM=16, BK=64, warps=4, stages=2)
SPLIT = replace(SMALL, split_k=2)
DEEP = replace(SMALL, BK=128)


def linears() -> dict[str, Callable[[], None]]:
    """All bit widths and kinds of groups; a choice of dtypes, tiles and tails such that each meets each width."""
    checks = {}
    for bits in cases.BITS:
        for case, tiles in (
            (Case(bits, 128, True, BF16, M=3, N=136, K=200, bias=True), SPLIT),
            (Case(bits, 32, False, BF16, M=3, N=40, K=100), SMALL),
            (Case(bits, 96, False, FP16, M=2, N=72, K=200), DEEP),
            (Case(bits, 64, False, BF16, M=2, N=32, K=128, float_scales=True), DEEP),
            (Case(bits, None, True, FP16, M=18, N=16, K=75), SMALL),
            (Case(bits, 256, True, BF16, M=1, N=9, K=320), SPLIT),
        ):
            checks[f"exact {case} {tiles.BK}x{tiles.split_k}"] = partial(
                cases.check_exact, partial(gemm.linear, tiles=tiles), case, "cpu"
            )
    case = Case(4, 64, False, M=33, N=70, K=160)
    checks["exact with its own tiles"] = partial(cases.check_exact, gemm.linear, case, "cpu")
    wide = replace(SMALL, BM=64)
    for bits, dtype in zip(cases.BITS, (BF16, FP16, BF16, FP16), strict=True):
        case = Case(bits, 32, False, dtype, N=32, K=64)
        checks[f"one-hot {case}"] = partial(cases.check_one_hot, partial(gemm.linear, tiles=wide), case, "cpu")
    checks["no tokens"] = no_tokens
    return checks


def no_tokens() -> None:
    f = pack(cases.weight(Case(4, 64)), BF16)
    assert gemm.linear(torch.empty(0, 320, dtype=BF16), f).shape == (0, 72)


def stacks() -> dict[str, Callable[[], None]]:
    """Empty experts first, last and in the middle, tiles that are full and tiles that are not."""
    checks = {}
    kinds = ((4, 72, SMALL), (3, 20, SPLIT), (2, 20, SMALL), (8, 136, SPLIT), (3, 72, DEEP))
    for bits, N, tiles in kinds:
        case = Case(bits, 64, bits != 8, N=N, K=136)
        run = partial(experts.linear, tiles=tiles)
        checks[f"experts {case}"] = partial(cases.check_experts, run, case, (0, 3, 0, 17, 1, 0), 2, "cpu")
    case = Case(4, 32, False, FP16, N=40, K=64)
    for counts in ((0, 0, 0), (16, 16), (5,), (1,) * 9):
        checks[f"experts {counts}"] = partial(cases.check_experts, experts.linear, case, counts, 0, "cpu")
    return checks


def denses() -> dict[str, Callable[[], None]]:
    """The weight read back whole, one and a stack of them."""

    def check(case: Case) -> None:
        weights = [pack(cases.weight(case, seed=e, powers=False), case.dtype) for e in range(2)]
        cases.assert_equal(dense.dequantize(weights[0], case.dtype), dequantize(weights[0], case.dtype), str(case))
        both = torch.stack([dequantize(w, case.dtype) for w in weights])
        cases.assert_equal(dense.dequantize(stack(weights), case.dtype), both, f"stack of {case}")

    kinds = [Case(bits, 96, False, BF16, N=200 if bits == 4 else 72, K=100) for bits in cases.BITS]
    kinds += [Case(3, None, True, FP16, K=75), Case(8, 32, False, BF16, K=64, float_scales=True)]
    return {f"dequantize {case}": partial(check, case) for case in kinds}


def sorts() -> dict[str, Callable[[], None]]:
    """Choices by expert, some of none, in fewer and more programs than there are offsets."""
    sizes = ((1, 2, 8), (5, 1, 3), (7, 4, 128), (40, 3, 5), (128, 8, 64))
    return {f"sort {size}": partial(cases.check_sort, routing.sort, *size, "cpu") for size in sizes}


if __name__ == "__main__":
    report(linears() | stacks() | denses() | sorts())
