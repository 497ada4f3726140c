"""Problems for packed GPU kernels and what exactly must come out, for any kernel with these two functions:

    linear(x, fragments, bias) -> [M, N]        experts(x, offsets, fragments) -> [T, N]

*Exact* problems have integer activations, integer zero points and scales that are powers of two: every sum is an
integer multiple of 1/4 that float32 holds exactly, so the result is known to the last bit whatever the order of the
additions. `check_...` functions raise AssertionError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitwright.kernels.fragments import Fragments, Kind, dequantize_rows, pack, random, stack
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import WeightScheme

Linear = Callable[[Tensor, Fragments, Tensor | None], Tensor]
Experts = Callable[..., Tensor]

BITS = (4, 3, 2, 8)
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """x [M, K] times a weight [N, K]; float_scales: scales in float32, another dtype than the activations'."""

    bits: int
    group_size: int | None
    symmetric: bool = True
    dtype: torch.dtype = torch.bfloat16
    M: int = 5
    N: int = 72
    K: int = 320
    bias: bool = False
    float_scales: bool = False

    @property
    def kind(self) -> Kind:
        """As kernels are chosen for it."""
        group_size = min(self.group_size or self.K, self.K)
        return Kind(self.N, self.K, self.bits, group_size, self.dtype, not self.symmetric, self.bias)

    def __str__(self) -> str:
        parts = [
            f"w{self.bits}-{'row' if self.group_size is None else f'g{self.group_size}'}",
            "" if self.symmetric else "asym",
            str(self.dtype).removeprefix("torch."),
            f"{self.M}x{self.N}x{self.K}",
            "bias" if self.bias else "",
            "fp32-scales" if self.float_scales else "",
        ]
        return "-".join(p for p in parts if p)


def matrix() -> list[Case]:
    """Every bits × group × symmetry × dtype, with tails in M, N and K where the group allows."""
    cases = []
    for bits in BITS:
        for group_size in (32, 64, 128, 256, None):
            for symmetric in (True, False):
                for dtype in DTYPES:
                    bias = symmetric == (dtype == torch.bfloat16)
                    cases.append(Case(bits, group_size, symmetric, dtype, K=424, N=200, bias=bias))
    return cases


def shapes() -> list[Case]:
    """Sizes around the edges of blocks and tiles, few and many tokens; groups that end inside a column block."""
    wide = Case(4, 128, symmetric=False, N=200, K=384)
    sizes = [replace(wide, M=M) for M in (1, 16, 17, 33, 64, 65, 128, 129, 300, 520)]
    tails = [Case(4, 64, M=3, N=N, K=K) for N, K in ((1, 64), (16, 72), (17, 1024), (130, 1), (64, 33))]
    odd = [Case(bits, g, symmetric=False, M=20, K=416) for bits in BITS for g in (96, 192)]
    floats = [Case(bits, 32, symmetric=False, float_scales=True, M=40) for bits in BITS]
    long = [Case(bits, 128, M=2, N=16, K=4096) for bits in BITS]
    many = [Case(bits, 64, symmetric=False, M=1030, N=264, K=192) for bits in BITS]
    return sizes + tails + odd + floats + long + many


def weight(case: Case, seed: int = 0, powers: bool = True) -> QuantizedTensor:
    """A random weight of the case on the CPU, all codes and zero points of its grid; powers: scales ±2^-2 .. ±2^2."""
    scheme = WeightScheme(case.bits, case.group_size, case.symmetric)
    generator = torch.Generator().manual_seed(seed)
    grid = (case.N, scheme.num_groups(case.K))
    codes = torch.randint(scheme.qmin, scheme.qmax + 1, (case.N, case.K), generator=generator).to(torch.int8)
    zero = torch.randint(scheme.qmin, scheme.qmax + 1, grid, generator=generator).to(torch.int8)
    if powers:
        sign = torch.randint(0, 2, grid, generator=generator) * 2 - 1
        scale = 2.0 ** torch.randint(-2, 3, grid, generator=generator) * sign
    else:
        scale = torch.randn(grid, generator=generator) * 0.02
    scale = scale.to(torch.float32 if case.float_scales else case.dtype)
    return QuantizedTensor(codes, scale, None if case.symmetric else zero, scheme)


def integers(M: int, K: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Activations -1, 0 and 1: a sum of 4096 products of theirs with codes up to 255 · 4 stays below 2^24 / 4."""
    return torch.randint(-1, 2, (M, K), generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(x: Tensor, qt: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias in integers (of quarters, held in float64), rounded once to the dtype of x."""
    device = "cuda" if torch.cuda.is_available() else "cpu"  # float64 holds these integers exactly, anywhere
    quarters = x.to(device, torch.float64) @ (qt.dequantize(torch.float64).to(device) * 4).t()
    if bias is not None:
        quarters += bias.to(device, torch.float64) * 4
    assert len(quarters) == 0 or quarters.abs().max() < 1 << 24, "not exact in float32"
    return (quarters / 4).to(x.dtype).cpu()


def check_exact(linear: Linear, case: Case, device: str = "cuda") -> None:
    """Bit equality with sums of integers, and nothing changed that was given."""
    qt = weight(case)
    f = pack(qt, case.dtype)
    x = integers(case.M, case.K, case.dtype)
    bias = torch.arange(case.N).remainder(17).sub(8).to(case.dtype) if case.bias else None
    expected = exact(x, qt, bias)
    given = on(f, device)
    y = linear(x.to(device), given, None if bias is None else bias.to(device))
    assert y.dtype == case.dtype
    assert_equal(y, expected, str(case))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(given.tensors, f.tensors, strict=True)), "weights changed"


def check_large_weight(linear: Linear, M: int) -> None:
    """More than 2^31 bytes of words: the last rows are right."""
    N, K = 140_032, 16384
    f = random(N, K, 8, 128, True, torch.bfloat16, "cuda")
    assert f.words[0].nbytes > 1 << 31
    x = torch.randn(M, K, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).bfloat16()
    rows = torch.arange(N - 100, N, device="cuda")
    expected = x.double() @ dequantize_rows(f, rows, torch.float32).double().t()
    torch.testing.assert_close(linear(x, f, None)[:, rows].double(), expected, rtol=2e-2, atol=2e-2)


def check_one_hot(linear: Linear, case: Case, device: str = "cuda") -> None:
    """One token per input reads the weight back column by column, rounded once from scales of any value."""
    qt = weight(case, seed=2, powers=False)
    y = linear(torch.eye(case.K, dtype=case.dtype, device=device), on(pack(qt, case.dtype), device), None)
    assert_equal(y.t(), qt.dequantize(case.dtype), str(case))


def check_experts(experts: Experts, case: Case, counts: tuple[int, ...], beyond: int = 0, device: str = "cuda") -> None:
    """Every expert's rows against its own weight; `beyond` more rows than the offsets speak of."""
    weights = [weight(case, seed=e) for e in range(len(counts))]
    total = sum(counts)
    x = integers(total + beyond, case.K, case.dtype)
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    expected = [exact(part, qt) for part, qt in zip(x[:total].split(counts), weights, strict=True) if len(part)]
    f = on(stack([pack(qt, case.dtype) for qt in weights]), device)
    y = experts(x.to(device), offsets.to(device), f)
    assert tuple(y.shape) == (total + beyond, case.N)
    if total:
        assert_equal(y[:total], torch.cat(expected), f"{case} {counts}")


def check_sort(sort: Callable[[Tensor, int], tuple[Tensor, ...]], M: int, k: int, E: int, device: str = "cuda") -> None:
    """`sort_by_expert` of M tokens against a list of tuples, sorted; experts from E on are none."""
    index = torch.randint(0, E + 2, (M, k), generator=torch.Generator().manual_seed(M))
    offsets, tokens, places = sort(index.to(device), E)
    assert (offsets.dtype, tokens.dtype, places.dtype) == (torch.int32, torch.int64, torch.int64)
    order = sorted((e, i) for i, e in enumerate(index.flatten().tolist()))
    assert offsets.tolist() == [sum(e < first for e, _ in order) for first in range(E + 1)]
    assert tokens.tolist() == [i // k for _, i in order]
    assert [order[place][1] for place in places.tolist()] == list(range(M * k))


def check_error(linear: Linear, case: Case) -> None:
    """Against float64: no more than 1.2 times the error of cuBLAS on the weight rounded to the dtype.

    Few tokens may meet the weight unrounded, so they are measured from the weight as it is; many from the rounded one.
    """
    qt = weight(case, seed=3, powers=False)
    x = torch.randn(case.M, case.K, generator=torch.Generator().manual_seed(4)).to(case.dtype).cuda()
    dense = qt.dequantize(case.dtype).cuda()
    weight_of = qt.dequantize(torch.float64).cuda() if case.M <= 64 else dense.double()
    exact = x.double() @ weight_of.t()
    ours = linear(x, on(pack(qt, case.dtype), "cuda"), None)
    limit = 1.2 * relative(x @ dense.t(), exact)
    assert relative(ours, exact) <= limit, f"{case}: {relative(ours, exact):.3e} > {limit:.3e}"


def check_repeats(linear: Linear, case: Case, times: int = 20) -> None:
    """The same bits every time."""
    f = on(pack(weight(case, powers=False), case.dtype), "cuda")
    x = torch.randn(case.M, case.K, device="cuda").to(case.dtype)
    first = linear(x, f, None)
    for _ in range(times):
        assert torch.equal(linear(x, f, None), first)


def check_graph(run: Callable[[Tensor], Tensor], x: Tensor, others: list[Tensor]) -> None:
    """Captured on one input and replayed on others, several calls to a graph: what eager calls give."""
    held = x.clone()
    run(held)  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [run(held) for _ in range(3)]
    for other in others:
        held.copy_(other)
        for y in results:
            y.fill_(float("nan"))
        graph.replay()
        expected = run(other)
        for y in results:
            assert torch.equal(y, expected)


def on(f: Fragments, device: str) -> Fragments:
    """The same weight on another device."""
    zero = None if f.zero is None else f.zero.to(device)
    return replace(f, words=tuple(w.to(device) for w in f.words), scale=f.scale.to(device), zero=zero)


def relative(y: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`."""
    return float((y.double() - expected).norm() / expected.norm())


def assert_equal(y: Tensor, expected: Tensor, what: str) -> None:
    """Bit equality (0 and -0 are equal), saying where it fails."""
    y = y.cpu()
    if y.shape != expected.shape:
        raise AssertionError(f"{what}: shape {tuple(y.shape)}, expected {tuple(expected.shape)}")
    wrong = (y != expected).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        found = f"first at {at}: {y[at].item()} instead of {expected[at].item()}"
        raise AssertionError(f"{what}: {len(wrong)} of {y.numel()} differ, {found}")


@contextmanager
def poisoned() -> Iterator[None]:
    """Within, memory from torch.empty is NaN (its integers -1), as if it held what somebody left there."""
    original = torch.empty

    def empty(*args: object, **kwargs: object) -> Tensor:
        made = original(*args, **kwargs)  # type: ignore[call-overload]
        return made.fill_(float("nan") if made.is_floating_point() else -1)

    torch.empty = empty  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty = original
