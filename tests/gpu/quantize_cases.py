"""Inputs for the activation quantizer, and what exactly must come out: the operator's CPU program, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.kernels import split_ops

Quantize = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ORDERS = ("first", "ascending", "shuffled")


@dataclass(frozen=True)
class Case:
    """B base and O outlier columns; order: "first" (base columns are the first B, nothing is gathered), "ascending"
    (outliers anywhere between them) or "shuffled". stride: distance between rows, None = B + O."""

    bits: int
    B: int
    O: int = 0
    block: int = 0
    order: str = "first"
    clip: float = 1.0
    dtype: torch.dtype = torch.bfloat16
    M: int = 12
    stride: int | None = None

    @property
    def K(self) -> int:
        return self.B + self.O

    def __str__(self) -> str:
        parts = [f"a{self.bits}-{self.M}x{self.B}+{self.O}", self.order, str(self.dtype).removeprefix("torch.")]
        parts += [f"rot{self.block}"] if self.block else []
        parts += [f"clip{self.clip}"] if self.clip != 1 else []
        return "-".join(parts + ([f"stride{self.stride}"] if self.stride else []))


def matrix() -> list[Case]:
    """Every bits × dtype × order × rotation, with tails everywhere."""
    return [
        Case(bits, B, O, block, order, 0.85 if bits == 4 and order == "shuffled" else 1.0, dtype)
        for bits in (8, 4)
        for dtype in DTYPES
        for order in ORDERS
        for B, O, block in ((100, 7, 0), (96, 0, 32), (1024, 33, 1024), (1536, 16, 512))
    ]


def shapes() -> list[Case]:
    """Widths around the edges of lanes, warps, parts and padding; rows apart; every block; one token and many."""
    found = [Case(4, B, O, order="ascending") for B, O in ((1, 0), (1, 1), (127, 16), (128, 15), (129, 1), (512, 300))]
    found += [Case(8, B, 8, order="shuffled") for B in (511, 512, 513, 4096, 8192, 11008)]
    found += [Case(4, B, 1030, order="shuffled", clip=0.3) for B in (16256, 16384, 16385, 28672)]
    found += [Case(8, 64 * n, block=n) for n in (1, 2, 4, 8, 16, 128, 256)]
    found += [Case(4, 27648, 1024, 1024, "shuffled", 0.9), Case(8, 64512, 1024, 1024, "first")]
    found += [Case(bits, 65536 - 64, 64, order="ascending", M=3) for bits in (4, 8)]
    found += [Case(4, 200, 8, order="first", stride=1000), Case(8, 256, 16, order="shuffled", stride=273)]
    found += [Case(4, 640, 16, 128, "shuffled", M=M) for M in (1, 2, 129, 700)]
    return found


def operands(case: Case, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor | None, Tensor, int, int, float]:
    """Arguments of the operator. The first tokens are peculiar, unless there are less than
    three: zeros, ties, one sign, extremes, NaN and Inf."""
    g = torch.Generator().manual_seed(seed)
    M, K, O = case.M, case.K, case.O
    columns = torch.randperm(K, generator=g) if case.order != "first" else torch.arange(K).roll(O)
    outlier_idx, base = columns[:O].sort().values, columns[O:]
    base_idx = None if case.order == "first" else base.to(torch.int32)
    if case.order == "ascending":
        base_idx = base.sort().values.to(torch.int32)
    x = torch.randn(M, K, generator=g) * torch.exp(torch.randn(M, 1, generator=g))
    x[:, outlier_idx] *= 30
    ties = torch.randint(-16, 15, (K,), generator=g) / 2
    ties[:2] = torch.tensor([-8.0, 7.0] if case.bits == 4 else [-127.0, 127.0])[:K]
    # A scale below the normal floats; for 16 bits not quite, as the interpreter misreads bf16 that are not normal.
    tiny = 2.0**-122 if case.dtype == torch.float32 else 2.0**-105
    if M >= 3:
        one = x[0].clone()
        peculiar = [torch.zeros(K), ties, one.abs(), -one.abs() - 1, one * tiny, one * 2.0**90, one * 60000]
        peculiar += [torch.where(torch.arange(K) == K // 2, v, one) for v in (torch.inf, torch.nan, -torch.nan)]
        x[: len(peculiar)] = torch.stack(peculiar)[:M]
    whole = torch.zeros(M, case.stride or K, dtype=case.dtype)
    whole[:, :K] = x.to(case.dtype)
    x = whole.to(device)[:, :K]
    moved = None if base_idx is None else base_idx.to(device)
    return x, moved, outlier_idx.to(device, torch.int32), case.bits, case.block, case.clip


def check(quantize: Quantize, case: Case, device: str = "cpu") -> None:
    """Raises AssertionError unless `quantize`, called like the operator, gives what the CPU program gives."""
    compare(quantize(*operands(case, device)), split_ops.quantize_activations(*operands(case)), str(case))


def compare(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], what: str) -> None:
    """Bit equality but for the payload of NaN, and for what belongs to tokens whose scale is NaN or Inf."""
    got = tuple(t.cpu() for t in got)
    for name, a, b in zip(("codes", "scale", "zero", "outliers"), got, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), f"{what}: {name} is {a.dtype} {list(a.shape)}"
    fine = expected[1].isfinite()
    for name, a, b in zip(("codes", "scale", "zero"), got, expected, strict=False):
        wrong = (a[fine] != b[fine]).nonzero()
        assert not len(wrong), f"{what}: {len(wrong)} {name} differ, the first at {wrong[0].tolist()} of finite tokens"
    scale, wanted = got[1][~fine], expected[1][~fine]
    assert torch.equal(scale.isnan(), wanted.isnan()) and torch.equal(scale.isinf(), wanted.isinf()), f"{what}: scale"
    assert torch.equal(got[3].nan_to_num(1.5), expected[3].nan_to_num(1.5)), f"{what}: outliers"
