"""Problems for the int8 kernels: operands as an input would be quantized and a weight packed, and what must come out.

The operators' CPU programs are the reference. Integer sums, scales and zero points leave one result to the last bit.
Where there are outliers, scales are powers of two and everything else is a small integer (`exact`): then every sum is
one that float32 holds, and the order of additions changes nothing either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitwright.kernels import int8_fragments
from bitwright.kernels.int8_ops import OUTLIER_STEP, int8_finish, int8_linear
from gpu import cases

Linear = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """w`bits`a`activation_bits` of M tokens, N outputs, B base columns and O outliers."""

    bits: int = 4
    activation_bits: int = 4
    M: int = 5
    N: int = 72
    B: int = 320
    O: int = 0
    bias: bool = False
    dtype: torch.dtype = torch.bfloat16
    exact: bool = True

    def __str__(self) -> str:
        ends = ("-bias" if self.bias else "") + ("" if self.exact else "-random")
        kind = str(self.dtype).removeprefix("torch.")
        return f"w{self.bits}a{self.activation_bits}-{self.M}x{self.N}x{self.B}-o{self.O}-{kind}{ends}"


def matrix() -> list[Case]:
    """Widths × outliers × bias × dtype, with tails everywhere; few tokens and many."""
    made = []
    for bits, activation_bits in ((4, 4), (4, 8), (8, 8)):
        for O in (0, 8, 16, 40, 80):
            for dtype in (torch.bfloat16, torch.float16):
                for M in (3, 70):
                    bias = (O > 8) == (dtype == torch.bfloat16)
                    made.append(Case(bits, activation_bits, M, 200, 424, O, bias, dtype))
    return made


def operands(case: Case, seed: int = 0) -> tuple[Any, ...]:
    """Arguments of `int8_linear` on the CPU."""
    g = torch.Generator().manual_seed(seed)
    M, N, B, O = case.M, case.N, case.B, case.O

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=g)

    top = 7 if case.activation_bits == 4 else 127
    if O and case.exact:
        top = min(top, (1 << 23) // (B << (case.bits - 1)))  # wider sums would not be exact in float32
    codes = integers(-top - (top == 7), top, M, B).to(torch.int8)
    zero = integers(-8, 7, M).to(torch.int32) if case.activation_bits == 4 else torch.zeros(M, dtype=torch.int32)
    weight = integers(-(1 << (case.bits - 1)), (1 << (case.bits - 1)) - 1, N, B).to(torch.int8)
    if O and case.exact:
        scale, weight_scale = torch.full((M,), 0.5), 2.0 ** integers(-1, 1, N) * (integers(0, 1, N) * 2 - 1)
        outliers, weight_outliers = integers(-8, 8, M, O).to(case.dtype), integers(-8, 8, N, O).to(case.dtype)
        assert top > 0, "too wide to be exact in float32"
    else:
        scale, weight_scale = torch.rand(M, generator=g) + 0.01, torch.randn(N, generator=g) * 0.01
        outliers = torch.randn(M, O, generator=g).to(case.dtype)
        weight_outliers = (torch.randn(N, O, generator=g) * 0.1).to(case.dtype)
    bias = (integers(-8, 8, N) if O and case.exact else torch.randn(N, generator=g)).to(case.dtype)
    more = -O % OUTLIER_STEP
    return (
        pad(codes, (0, int8_fragments.padded(B) - B)),
        scale,
        zero,
        pad(outliers, (0, more)),
        int8_fragments.pack(weight) if case.bits == 4 else pad(weight, (0, int8_fragments.padded(B) - B)),
        weight_scale.to(torch.float32),
        weight.sum(1, dtype=torch.int32),
        pad(weight_outliers, (0, more)),
        bias if case.bias else None,
        case.bits,
        N,
        B,
        case.dtype,
    )


def finish_operands(case: Case, seed: int = 0) -> tuple[Any, ...]:
    """Arguments of `int8_finish` on the CPU: a slab of a longer output, sums of more rows and columns than wanted."""
    codes, scale, zero, outliers, _, weight_scale, row_sums, weight_outliers, bias, _, N, _, dtype = operands(
        case, seed
    )
    limit = 1 << (20 if case.O else 30)
    sums = torch.randint(-limit, limit, (N + 5, len(codes) + 27), generator=torch.Generator().manual_seed(seed + 1))
    out = torch.full((len(codes), N + 48), torch.nan, dtype=dtype)[:, 16 : N + 16]
    if not len(codes):
        out = torch.empty(0, N, dtype=dtype)  # opcheck cannot copy a view of nothing
    return out, sums.to(torch.int32), scale, zero, outliers, weight_scale, row_sums, weight_outliers, bias


def on(arguments: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    return tuple(a.to(device) if isinstance(a, Tensor) else a for a in arguments)


def check(linear: Linear, case: Case, device: str = "cuda") -> None:
    """`linear` (of `triton.int8`, or the operator) against the CPU program, to the last bit where there is one."""
    given = operands(case)
    moved = on(given, device)
    y = linear(*moved)
    compare(y, int8_linear(*given), case)
    for a, b in zip(moved, given, strict=True):
        assert not isinstance(b, Tensor) or torch.equal(a.cpu(), b), "an operand changed"


def check_finish(finish: Linear, case: Case, device: str = "cuda") -> None:
    given = finish_operands(case)
    around = torch.full((case.M + 1, case.N + 48), torch.nan, dtype=case.dtype, device=device)
    out = around[: case.M, 16 : case.N + 16]
    finish(out, *on(given[1:], device))
    int8_finish(*given)
    compare(out, given[0], case)
    out.fill_(torch.nan)
    assert around.isnan().all(), "written beside the slab"


def compare(y: Tensor, expected: Tensor, case: Case) -> None:
    assert y.dtype == case.dtype
    if case.O and not case.exact:
        assert torch.isfinite(y).all()
        torch.testing.assert_close(y.cpu(), expected, rtol=2 * torch.finfo(case.dtype).eps, atol=1e-3)
    else:
        cases.assert_equal(y, expected, str(case))


def large(case: Case) -> Case:
    """The case with numbers of any value: nothing about sums with outliers is exact."""
    return replace(case, exact=False)
