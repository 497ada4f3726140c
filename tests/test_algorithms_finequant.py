"""The ladder against its rule worked by hand, the budget against every combination."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from algorithm_oracles import rng
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitwright.algorithms.finequant import (
    LADDER,
    Choice,
    FineQuantOptions,
    allocate,
    choices,
    common_group_sizes,
    group_sizes,
    ladder,
    range_ratio,
)
from bitwright.algorithms.rtn import rtn
from bitwright.errors import SchemeError
from bitwright.scheme import WeightScheme


def spiky(N: int, K: int, share: float, size: float, seed: int = 0) -> Tensor:
    """Gaussian weights of which a share is `size` times larger."""
    g = rng(seed)
    W = torch.randn(N, K, generator=g)
    return torch.where(torch.rand(N, K, generator=g) < share, size * W, W)


def ratio_by_hand(rows: list[list[float]], g: int) -> float:
    """R(g): mean over rows and groups of the group's largest weight over the row's."""
    found = []
    for row in rows:
        top = max(abs(w) for w in row)
        for i in range(0, len(row), g):
            found.append(max(abs(w) for w in row[i : i + g]) / top if top else 1.0)
    return sum(found) / len(found)


def ladder_by_hand(W: Tensor, sizes: list[int], alpha: float) -> int | None:
    """The module's rule in words: step to the next finer size while the bits of range gained exceed alpha times the
    scale bits it costs per weight; stop at the first step that does not pay."""
    rows, K = W.double().tolist(), W.shape[1]
    here: int | None = None
    for g in sizes:
        gain = math.log2(ratio_by_hand(rows, here or K) / ratio_by_hand(rows, g))
        if gain <= alpha * (16 / g - 16 / (here or K)):
            return here
        here = g
    return here


# ------------------------------------------------------------------------------------------------- ladder


def test_ladder_of_one_row_worked_by_hand() -> None:
    """K = 64: R(64) = 1. One large weight in one group of 32: R(32) = (1 + 1/4)/2 = 0.625, a gain of 0.678 bits for
    16/32 - 16/64 = 0.25 bits: the step is taken up to alpha 2.71. All equal: no gain, not taken even for nothing."""
    W = torch.ones(1, 64)
    W[0, 3] = 4.0
    assert range_ratio(W, None) == 1.0
    assert range_ratio(W, 32) == pytest.approx(0.625)
    for alpha, want in ((0.0, 32), (1.0, 32), (2.7, 32), (2.72, None)):
        assert ladder([W], FineQuantOptions(alpha=alpha)) == want
    assert ladder([torch.ones(3, 64)], FineQuantOptions(alpha=0.0)) is None


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("K,sizes", [(1024, [512, 256, 128, 64, 32]), (576, [192, 96, 64, 48, 32]), (100, [])])
def test_ladder_follows_its_rule(K: int, sizes: list[int], alpha: float) -> None:
    for seed, (share, size) in enumerate([(0.0, 1), (0.002, 8), (0.02, 8), (0.005, 30)]):
        W = spiky(8, K, share, size, seed)
        assert ladder([W], FineQuantOptions(alpha=alpha)) == ladder_by_hand(W, sizes, alpha)


def test_ladder_tells_spiky_from_plain() -> None:
    """What it is for: rows spoilt by a few large weights get finer groups than Gaussian ones."""
    plain, spoilt = spiky(32, 1024, 0, 1), spiky(32, 1024, 0.002, 20)
    assert (ladder([spoilt], FineQuantOptions(alpha=3.0)) or 1024) < (
        ladder([plain], FineQuantOptions(alpha=3.0)) or 1024
    )


@settings(max_examples=25, deadline=None)
@given(
    K=st.sampled_from([64, 96, 192, 512, 1024]),
    share=st.floats(0, 0.05),
    size=st.floats(1, 50),
    alphas=st.tuples(st.floats(0, 6), st.floats(0, 6)),
    seed=st.integers(0, 99),
)
def test_larger_alpha_is_never_finer(K: int, share: float, size: float, alphas: tuple[float, float], seed: int) -> None:
    W = spiky(4, K, share, size, seed)
    low, high = (ladder([W], FineQuantOptions(alpha=a)) or K for a in sorted(alphas))
    assert low <= high


def test_a_stack_shares_one_size_by_its_rows() -> None:
    """Experts of one stack: the statistic is over all their rows, whatever their number per expert."""
    a, b = spiky(6, 256, 0.01, 10, 1), spiky(18, 256, 0.0, 1, 2)
    for alpha in (0.5, 1.0, 1.5, 2.0, 3.0, 4.0):
        options = FineQuantOptions(alpha=alpha)
        assert ladder([a, b], options) == ladder([torch.cat([a, b])], options)


def test_matrices_of_two_widths_share_one_size() -> None:
    """gate/up [., 192] and down [., 320] of one stack: sizes that divide both; a scale per row costs 16 bits for every
    row, whatever its width. One spike of 8 in rows of ones: R(g) is (1 + (G - 1) / 8) / G for G groups."""
    up, down = torch.ones(10, 192), torch.ones(6, 320)
    up[:, 5], down[:, 7] = 8.0, 8.0
    options = FineQuantOptions(groups=(96, 80, 64, 32))
    assert common_group_sizes([up, down], options) == [None, 64, 32]

    def ratio(g: int) -> float:
        return sum(rows * (1 + (K // g - 1) / 8) / (K // g) for rows, K in ((10, 192), (6, 320))) / 16

    per_row = 16 * 16 / (10 * 192 + 6 * 320)  # scale bits per weight with one scale per row
    first = math.log2(1 / ratio(64)) / (16 / 64 - per_row)
    second = math.log2(ratio(64) / ratio(32)) / (16 / 32 - 16 / 64)
    assert second < first
    for alpha, want in ((0.99 * second, 32), (1.01 * second, 64), (0.99 * first, 64), (1.01 * first, None)):
        got = ladder([up, down], FineQuantOptions(alpha=alpha, groups=(96, 80, 64, 32)))
        assert got == want == ladder([down, up], FineQuantOptions(alpha=alpha, groups=(96, 80, 64, 32)))
    found = {
        c.scheme.group_size: c.bits for c in choices([up, down], True, FineQuantOptions(bits=(4,), groups=(96, 64)))
    }
    assert found == {None: 4 * 3840 + 16 * 16, 64: 4 * 3840 + 16 * 3840 // 64}


@pytest.mark.parametrize("K", [32, 48, 100, 384, 576, 960, 1000, 1536, 4096])
def test_only_divisors_unless_ragged(K: int) -> None:
    sizes = group_sizes(K, FineQuantOptions())
    assert sizes[0] is None and sizes[1:] == sorted((g for g in LADDER if g < K and K % g == 0), reverse=True)
    assert group_sizes(K, FineQuantOptions(ragged=True))[1:] == [g for g in LADDER if g < K]
    own = FineQuantOptions(groups=(16, 8, 16, 4096))
    assert group_sizes(K, own)[1:] == [g for g in (16, 8) if K % g == 0]


def test_ladder_may_take_ragged_groups() -> None:
    W = spiky(8, 100, 0.05, 30)
    assert ladder([W], FineQuantOptions()) is None
    ragged = ladder([W], FineQuantOptions(ragged=True, alpha=0.1))
    assert ragged == ladder_by_hand(W, [96, 64, 48, 32], 0.1) and ragged is not None


def test_range_ratio_of_ragged_groups_and_rows_of_zeros() -> None:
    W = spiky(5, 50, 0.1, 9)
    assert range_ratio(W, 32) == pytest.approx(ratio_by_hand(W.tolist(), 32), rel=1e-5)
    W[2] = 0
    assert range_ratio(W, 16) == pytest.approx(ratio_by_hand(W.tolist(), 16), rel=1e-5)
    assert ladder([torch.zeros(4, 64)], FineQuantOptions()) is None


# ------------------------------------------------------------------------------------------------- choices


@pytest.mark.parametrize("symmetric", [True, False])
def test_choices_are_measured(symmetric: bool) -> None:
    """Bits counted by hand, errors those of the rounded matrices (all rows of them, being few)."""
    matrices = [spiky(12, 96, 0.02, 6, 1), spiky(12, 96, 0, 1, 2)]
    found = choices(matrices, symmetric, FineQuantOptions(bits=(3, 4), groups=(48, 32, 30)))
    assert [(c.scheme.bits, c.scheme.group_size) for c in found] == list(itertools.product((3, 4), (None, 48, 32)))
    for c in found:
        groups = 96 // (c.scheme.group_size or 96)
        per_group = 16 if symmetric else 16 + c.scheme.bits
        assert c.bits == 24 * (96 * c.scheme.bits + groups * per_group)
        error = 0.0
        for W in matrices:
            Q = rtn(W, c.scheme).dequantize()
            error += W.numel() * float((Q - W).double().square().sum() / W.double().square().sum())
        assert c.error == pytest.approx(error, rel=1e-4)
    by = {(c.scheme.bits, c.scheme.group_size): c.error for c in found}
    assert by[4, 32] < by[4, None] and by[4, 32] < by[3, 32]


def test_choices_of_many_rows_stand_for_all() -> None:
    W = spiky(1000, 64, 0.01, 6)
    c = choices([W], True, FineQuantOptions(bits=(4,), groups=()))[0]
    whole = rtn(W, WeightScheme(4)).dequantize()
    assert c.error == pytest.approx(W.numel() * float((whole - W).square().sum() / W.square().sum()), rel=0.2)
    assert choices([torch.zeros(4, 64)], True, FineQuantOptions())[0].error == 0


# ------------------------------------------------------------------------------------------------- budget


def instance(seed: int, units: int, kind: str) -> dict[str, list[Choice]]:
    """Units of unequal size and sensitivity; errors fall fourfold per bit ("plain"), or are any numbers ("wild")."""
    r = random.Random(f"{seed}{kind}")
    out = {}
    for u in range(units):
        K, N = r.choice([64, 96, 128, 256, 576]), r.choice([32, 64, 128, 512])
        sensitivity, tail = math.exp(r.gauss(0, 0.7)), r.uniform(0, 1.2)
        options = []
        for bits in r.choice([(4, 8), (3, 4), (2, 3, 4)]):
            for g in group_sizes(K, FineQuantOptions(groups=(128, 64, 32))):
                scheme = WeightScheme(bits, g)
                error = sensitivity * 4.0**-bits * ((g or K) / 32) ** tail if kind == "plain" else r.random()
                options.append(Choice(scheme, scheme.bits_per_weight(K) * N * K, error))
        r.shuffle(options)
        out[f"layer{u}"] = options
    return out


def spent(chosen: dict[str, Choice]) -> float:
    return sum(c.bits for c in chosen.values())


def error_of(chosen: dict[str, Choice]) -> float:
    return sum(c.error for c in chosen.values())


@pytest.mark.parametrize("kind", ["plain", "wild"])
def test_allocation_against_every_combination(kind: str) -> None:
    exact, trials = 0, 120
    for seed in range(trials):
        units = instance(seed, 2 + seed % 3, kind)
        r = random.Random(seed)
        low = sum(min(c.bits for c in options) for options in units.values())
        high = sum(max(c.bits for c in options) for options in units.values())
        budget = low + r.random() * (high - low)
        chosen = allocate(units, budget)
        assert list(chosen) == list(units) and all(chosen[name] in options for name, options in units.items())
        assert spent(chosen) <= budget
        best = min(
            sum(c.error for c in combination)
            for combination in itertools.product(*units.values())
            if sum(c.bits for c in combination) <= budget
        )
        assert error_of(chosen) >= best * (1 - 1e-12)
        assert error_of(chosen) <= 1.05 * best
        exact += error_of(chosen) <= best * (1 + 1e-9)
    assert exact >= 0.95 * trials


def test_allocation_of_many_units() -> None:
    """Near the bound that any allocation obeys (Lagrange: min over choices of error + price * (bits - budget))."""
    units = instance(5, 150, "plain")
    low = sum(min(c.bits for c in options) for options in units.values())
    high = sum(max(c.bits for c in options) for options in units.values())
    last = math.inf
    for share in (0.1, 0.4, 0.8):
        budget = low + share * (high - low)
        chosen = allocate(units, budget)
        assert 0.995 * budget <= spent(chosen) <= budget
        bound = max(
            sum(min(c.error + price * c.bits for c in options) for options in units.values()) - price * budget
            for price in (math.exp(x / 4) for x in range(-100, 0))
        )
        assert error_of(chosen) <= 1.03 * bound
        assert error_of(chosen) < last
        last = error_of(chosen)


def test_budget_at_its_ends() -> None:
    units = instance(3, 4, "plain")
    low = sum(min(c.bits for c in options) for options in units.values())
    assert spent(allocate(units, low)) == low
    best = sum(min(c.error for c in options) for options in units.values())
    assert error_of(allocate(units, 1e12)) == pytest.approx(best)
    for name, c in allocate(units, 1e12).items():  # no bits are spent for nothing
        assert c.bits == min(x.bits for x in units[name] if x.error == c.error)
    with pytest.raises(SchemeError, match=rf"budget of {low - 1:.0f} bits.*need {low:.0f}.*fewer bits or coarser"):
        allocate(units, low - 1)
    assert allocate({}, 10.0) == {}


def test_budget_prefers_the_sensitive_matrix() -> None:
    cheap, dear = (Choice(WeightScheme(b), b * 100.0, 4.0**-b) for b in (4, 8))
    worse = [Choice(c.scheme, c.bits, 10 * c.error) for c in (cheap, dear)]
    chosen = allocate({"plain": [cheap, dear], "sensitive": worse}, 1200)
    assert (chosen["plain"].scheme.bits, chosen["sensitive"].scheme.bits) == (4, 8)


# ------------------------------------------------------------------------------------------------- options


def test_options() -> None:
    got = FineQuantOptions.parse({"alpha": 2.0, "bits": [3, 4], "groups": [64, 32], "ragged": True, "budget": 4.5})
    assert got == FineQuantOptions(2.0, 4.5, (3, 4), (64, 32), True)
    hash(got)  # lists became tuples
    with pytest.raises(SchemeError, match=r"'beta'; known: alpha, bits, budget, groups, ragged"):
        FineQuantOptions.parse({"beta": 1})


def test_zero_points_are_one_more_choice_and_are_paid_for() -> None:
    W = spiky(24, 96, 0.02, 6, 3)
    plain = choices([W], True, FineQuantOptions(bits=(4,), groups=(32,)))
    more = choices([W], True, FineQuantOptions(bits=(4,), groups=(32,), zero_points=True))
    assert more[: len(plain)] == plain
    extra = more[len(plain) :]
    assert [c.scheme.symmetric for c in extra] == [False] * len(plain)
    assert [c.bits - p.bits for c, p in zip(extra, plain, strict=True)] == [24 * 4, 24 * 3 * 4]
