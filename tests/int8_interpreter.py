"""A program: the int8 kernels in Triton's interpreter (`interpreter.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from interpreter import report  # first of all: it asks for the interpreter

# isort: split
import torch
from gpu import cases, int8_cases
from gpu.int8_cases import Case

from bitwright.kernels.triton import int8
from bitwright.kernels.triton.config import Config

FP16 = torch.float16
SMALL = Config(BN=32, BM=16, BK=128, warps=4, stages=2)
SHORT = replace(SMALL, BK=64)
SPLIT = replace(SMALL, split_k=3)
EMPTY = replace(SMALL, BK=64, split_k=5)  # of six steps: two a program, nothing for the last two


def linears() -> dict[str, Callable[[], None]]:
    """Widths, tails, outliers, biases, dtypes and parts of K, such that each meets each width."""
    checks = {}
    for bits, activation_bits in ((4, 4), (4, 8), (8, 8)):
        kind = Case(bits, activation_bits)
        for case, tiles in (
            (replace(kind, M=3, N=40, B=200), SMALL),
            (replace(kind, M=3, N=40, B=384, bias=True), SPLIT),
            (replace(kind, M=18, N=33, B=300, O=8, dtype=FP16), SPLIT),
            (replace(kind, M=2, N=17, B=260, O=40, bias=True), EMPTY),
            (replace(kind, M=17, N=70, B=33, O=80), SHORT),
            (replace(kind, M=3, N=20, B=120, O=130), SPLIT),
            (replace(kind, M=3, N=20, B=250, O=60, bias=True), replace(SPLIT, split_k=2)),
            (replace(kind, M=1, N=1, B=1, O=16, dtype=FP16, bias=True), SMALL),
        ):
            run = partial(int8.linear, tiles=tiles)
            checks[f"linear {case} {tiles.BK}x{tiles.split_k}"] = partial(int8_cases.check, run, case, "cpu")
        close = int8_cases.large(replace(kind, M=9, N=48, B=130, O=100, bias=True))
        checks[f"close {close}"] = partial(int8_cases.check, partial(int8.linear, tiles=SMALL), close, "cpu")
    for M in (0, 5, 130):
        case = Case(4, 4, M=M, N=70, B=160, O=16)
        checks[f"linear with its own tiles {case}"] = partial(int8_cases.check, int8.linear, case, "cpu")
    longest = Case(8, 8, M=1, N=1, B=131_071)
    checks["linear of extremes"] = partial(extremes, longest)
    checks["linear of extremes at 4 bits"] = partial(extremes, replace(longest, bits=4))
    return checks


def extremes(case: Case) -> None:
    """The largest sum there is: every code the lowest, over the widest input that is allowed."""
    given = list(int8_cases.operands(case))
    lowest, tiles = -(1 << (case.bits - 1)), replace(SMALL, BN=16, BK=128)
    codes = torch.full((1, case.B), lowest, dtype=torch.int8)
    given[0][:, : case.B] = -128
    if case.bits == 4:
        given[4] = int8_cases.int8_fragments.pack(codes)
    else:
        given[4][:, : case.B] = -128
    given[1], given[5] = torch.ones(1), torch.ones(1)
    y = int8.linear(*given, tiles=tiles)
    cases.assert_equal(y, torch.tensor([[-128.0 * lowest * case.B]]).to(case.dtype), str(case))


def ends() -> dict[str, Callable[[], None]]:
    """The second half alone, for sums that another product made."""
    checks = {}
    for case in (
        Case(M=3, N=40),
        Case(M=70, N=65, O=16, bias=True),
        Case(activation_bits=8, bits=8, M=2, N=70, B=64, O=40, dtype=FP16),
        Case(M=0, N=16),
        Case(M=20, N=70, B=64, O=130, bias=True),
        Case(M=130, N=150, B=64, O=80),
    ):
        checks[f"finish {case}"] = partial(int8_cases.check_finish, int8.finish, case, "cpu")
    return checks


if __name__ == "__main__":
    report(linears() | ends())
