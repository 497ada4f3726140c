"""GPTQ against a column-by-column float64 twin with the explicit inverse, and against what it promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from algorithm_oracles import (
    SAFE,
    Rounded,
    correlated,
    damped64,
    gptq_oracle,
    hessian,
    objective,
    rng,
    visiting_order,
)
from torch import Tensor

from bitwright.algorithms.gptq import GPTQOptions, GPTQResult, column_order, gptq
from bitwright.algorithms.hessian import damped, factorize
from bitwright.algorithms.rtn import rtn
from bitwright.algorithms.sweep import column_sweep
from bitwright.errors import SchemeError
from bitwright.scheme import WeightScheme

N = 24

# order, static_groups
ORDERS = [(True, True), ("group", True), ("group", False), (False, True), (False, False)]
# K, group_size, block_size: group below, at and above the lazy block, ragged tails, no multiples at all, one column
SHAPES = [
    (96, 16, 64),
    (96, 32, 32),
    (96, 48, 16),
    (100, 16, 32),
    (90, 40, 24),
    (70, 64, 128),
    (64, None, 16),
    (1, None, 128),
]


def problem(K: int, seed: int = 0, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """W [N, K] with rows of unequal size and a few large weights, H [K, K]."""
    W = torch.randn(N, K, generator=rng(seed)) * torch.exp(torch.randn(N, 1, generator=rng(seed + 1)))
    W[:, ::7] *= 2.5
    return W, hessian(correlated(tokens, K, seed + 2))


def solve(W: Tensor, H: Tensor, scheme: WeightScheme, **options: object) -> GPTQResult:
    return gptq(W, H, scheme, GPTQOptions.parse({"rounds": 0, "search": "minmax", "weighting": "none"} | options))


def assert_same(got: GPTQResult, want: Rounded, least: float = 0.7) -> None:
    """Codes, scales and zero points equal on every row that float32 must round alike, which are nearly all."""
    safe = want.safe
    assert safe.mean() >= least, f"only {safe.sum()} of {len(safe)} rows have a margin above {SAFE}"
    t = got.tensor
    np.testing.assert_array_equal(t.scale.double().numpy()[safe], want.scale[safe])
    if t.zero_point is not None:
        np.testing.assert_array_equal(t.zero_point.numpy()[safe], want.zero_point[safe])
    np.testing.assert_array_equal(t.codes.numpy()[safe], want.codes[safe])


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("order,static", ORDERS)
def test_equals_the_oracle(order: str, static: bool, shape: tuple, symmetric: bool) -> None:
    K, g, block = shape
    W, H = problem(K)
    scheme = WeightScheme(4, g, symmetric)
    want = gptq_oracle(W, H, scheme, order=order, static_groups=static)
    got = solve(W, H, scheme, act_order=order, static_groups=static, block_size=block)
    assert_same(got, want)
    # The oracle itself must be worth comparing with: feedback changed the codes.
    if K > 1:
        plain = gptq_oracle(W, H, scheme, order=order, static_groups=static, feedback=False)
        assert (plain.codes != want.codes).mean() > 0.05


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("order,static", ORDERS)
def test_equals_the_oracle_at_all_bits(order: str, static: bool, bits: int, symmetric: bool) -> None:
    W, H = problem(100, seed=bits)
    scheme = WeightScheme(bits, 24, symmetric)
    want = gptq_oracle(W, H, scheme, order=order, static_groups=static)
    assert_same(solve(W, H, scheme, act_order=order, static_groups=static, block_size=32), want)


@pytest.mark.parametrize("weighting", ["none", "hessian", "inverse"])
@pytest.mark.parametrize("order,static", ORDERS)
def test_equals_the_oracle_with_searched_grids(order: str, static: bool, weighting: str) -> None:
    """The search sees the right columns of the right (original or updated) weights with the right importance."""
    W, H = problem(72, seed=5)
    scheme = WeightScheme(3, 16)
    arguments = {"static_groups": static, "search": "mse", "weighting": weighting}
    want = gptq_oracle(W, H, scheme, order=order, **arguments)
    got = solve(W, H, scheme, block_size=24, act_order=order, **arguments)
    # Two candidate scales of nearly the same error may swap in float32, on few rows.
    same = (got.tensor.scale.double().numpy() == want.scale).all(1) & want.safe
    assert same.mean() >= 0.7
    np.testing.assert_array_equal(got.tensor.codes.numpy()[same], want.codes[same])


@pytest.mark.parametrize("order,static", ORDERS)
def test_a_single_row_and_dead_columns(order: str, static: bool) -> None:
    W, _ = problem(60, seed=3)
    X = correlated(300, 60, seed=4)
    dead = [0, 7, 8, 9, 30, *range(40, 50), 59]  # a whole group of 10 among them
    X[:, dead] = 0
    H = hessian(X)
    W[:, dead] = 1e4  # must neither be stored nor stretch any grid
    scheme = WeightScheme(4, 10, symmetric=False)
    want = gptq_oracle(W, H, scheme, order=order, static_groups=static)
    got = solve(W, H, scheme, act_order=order, static_groups=static, block_size=16)
    assert_same(got, want)
    assert not got.tensor.dequantize()[:, dead].any()
    assert got.tensor.dequantize().abs().max() < 100
    alone = solve(W[2:3], H, scheme, act_order=order, static_groups=static, block_size=16)
    if want.safe[2]:
        np.testing.assert_array_equal(alone.tensor.codes.numpy(), want.codes[2:3])


def test_current_weights_are_the_conditional_optimum() -> None:
    """A second oracle, without any recursion: when column j is visited, the free columns stand at the minimiser of the
    objective given the columns already rounded, t_R + (t_F - q_F) H_FR H_RR^-1; grids are those of these weights."""
    W, H = problem(60, seed=9)
    scheme = WeightScheme(3, 16)
    got = solve(W, H, scheme, act_order=False, static_groups=False, block_size=8).tensor
    want = gptq_oracle(W, H, scheme, order=False)
    Hd, T, Q = damped64(H, 0.01, 0.05), W.double().numpy(), got.dequantize().double().numpy()
    moved = 0
    for j in range(0, 60, 16):
        current = T[:, j:]
        if j:
            current = current + np.linalg.solve(Hd[j:, j:], Hd[j:, :j] @ (T[:, :j] - Q[:, :j]).T).T
        top = np.abs(current[:, :16]).max(1) / scheme.qmax
        stale = np.abs(T[:, j : j + 16]).max(1) / scheme.qmax
        scale = got.scale[:, j // 16].double().numpy()
        np.testing.assert_allclose(scale[want.safe], top[want.safe], rtol=2**-8)
        moved += int((np.abs(stale / scale - 1) > 2**-7).sum())
    assert moved > N  # the original weights would have given other grids


@pytest.mark.parametrize("order,static", ORDERS)
@pytest.mark.parametrize("K,g", [(130, 32), (130, None), (96, 24)])
def test_lazy_blocks_do_not_matter(order: str, static: bool, K: int, g: int | None) -> None:
    W, H = problem(K, seed=11)
    scheme = WeightScheme(4, g)
    safe = gptq_oracle(W, H, scheme, order=order, static_groups=static).safe
    assert safe.mean() >= 0.7
    results = [
        solve(W, H, scheme, act_order=order, static_groups=static, block_size=b).tensor for b in (1, 16, 32, 128, K)
    ]
    for other in results[1:]:
        assert torch.equal(other.codes[safe], results[0].codes[safe])
        assert torch.equal(other.scale[safe], results[0].scale[safe])


@pytest.mark.parametrize("starts", [None, [0, 10, 17, 40], list(range(0, 53, 5))])
def test_sweep_hands_out_current_columns_and_their_loss(starts: list[int] | None) -> None:
    """Straight against the recursion: what `project` sees at column j (and, at a group's start, the whole group) is up
    to date, and the loss it returns is the objective on the H whose factor was given."""
    W, H = problem(53, seed=2)
    factor = factorize(H, torch.arange(53), 0.01)
    assert factor is not None
    seen: dict[int, np.ndarray] = {}
    ends = dict(zip(starts, [*starts[1:], 53], strict=True)) if starts else {}

    def project(j: int, Wt: Tensor) -> Tensor:
        seen[j] = Wt[j : ends.get(j, j + 1)].double().numpy().T.copy()
        return (Wt[j] / 0.7).round() * 0.7

    before = W.clone()
    Q, loss = column_sweep(W, factor.U, project, block_size=8, starts=starts)
    assert torch.equal(W, before)
    w, inverse = W.double().numpy().copy(), np.linalg.inv(damped64(H, 0.01, 0))
    for j in range(53):
        np.testing.assert_allclose(w[:, j : j + seen[j].shape[1]], seen[j], atol=1e-4)
        w -= np.outer((w[:, j] - Q[:, j].double().numpy()) / inverse[j, j], inverse[j])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    np.testing.assert_allclose(loss.numpy(), objective(Q, W, damped64(H, 0.01, 0)), rtol=1e-3)


def test_sweep_without_rounding_changes_nothing() -> None:
    W, H = problem(40)
    factor = factorize(H, torch.arange(40), 0.01)
    assert factor is not None
    Q, loss = column_sweep(W, factor.U, lambda j, Wt: Wt[j].clone(), block_size=16)
    assert torch.equal(Q, W) and not loss.any()


@pytest.mark.parametrize("g", [None, 8, 10])
@pytest.mark.parametrize("order", [False, True, "group"])
def test_order_of_columns(order: str, g: int | None) -> None:
    H = torch.diag(torch.rand(37, generator=rng(3)))
    H[5, 5] = H[20, 20] = H[21, 21] = 0.5  # ties keep their order
    got = column_order(H, g, order).tolist()
    assert got == visiting_order(H.double().numpy(), g, order)
    assert sorted(got) == list(range(37))


# ------------------------------------------------------------------------------------------------- what it is good for


def held_out_error(Q: Tensor, W: Tensor, X: Tensor) -> float:
    out = (X.double() @ (Q - W).double().T).square().sum()
    return float(out / (X.double() @ W.double().T).square().sum())


@pytest.mark.parametrize("bits,most", [(4, 0.5), (3, 0.5), (2, 0.6)])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("order,static", [(True, True), ("group", False)])
def test_beats_round_to_nearest_on_unseen_inputs(
    order: str, static: bool, symmetric: bool, bits: int, most: float
) -> None:
    X = correlated(1500, 96, seed=21)
    W = torch.randn(64, 96, generator=rng(22))
    scheme = WeightScheme(bits, 32, symmetric)
    options = GPTQOptions(act_order=order, static_groups=static, rounds=0)
    theirs = held_out_error(rtn(W, scheme).dequantize(), W, X[1000:])
    ours = held_out_error(gptq(W, hessian(X[:1000]), scheme, options).tensor.dequantize(), W, X[1000:])
    assert ours < most * theirs


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("g", [None, 24])
def test_polish_never_worsens_a_row(bits: int, symmetric: bool, g: int | None) -> None:
    """Rounds of polish may only lower the damped objective, scales rounded to storage included."""
    W, H = problem(100, seed=31)
    scheme = WeightScheme(bits, g, symmetric)
    Hd = damped64(H, 0.01, 0.05)
    losses = [objective(solve(W, H, scheme, search="mse", rounds=r).tensor.dequantize(), W, Hd) for r in (0, 1, 3)]
    assert (losses[1] <= losses[0] * (1 + 1e-5)).all()
    assert (losses[2] <= losses[1] * (1 + 1e-5)).all()
    if bits <= 3:
        assert losses[1].sum() < 0.995 * losses[0].sum()


def test_polish_runs_by_default_where_it_pays() -> None:
    W, H = problem(64, seed=32)
    for bits, rounds in ((2, 1), (3, 1), (4, 0), (8, 0)):
        default = gptq(W, H, WeightScheme(bits, 16))
        explicit = gptq(W, H, WeightScheme(bits, 16), GPTQOptions(rounds=rounds))
        assert torch.equal(default.tensor.codes, explicit.tensor.codes)
        other = gptq(W, H, WeightScheme(bits, 16), GPTQOptions(rounds=1 - rounds))
        assert not torch.equal(default.tensor.codes, other.tensor.codes)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
def test_result_is_as_stored(scale_dtype: torch.dtype) -> None:
    """Scales in the storage dtype, arguments untouched, loss and energy those of the dequantized tensor."""
    W, H = problem(64, seed=41)
    W0, H0 = W.clone(), H.clone()
    result = gptq(W, H, WeightScheme(3, 16), scale_dtype=scale_dtype)
    assert torch.equal(W, W0) and torch.equal(H, H0)
    assert result.tensor.scale.dtype == scale_dtype
    Q = result.tensor.dequantize()
    np.testing.assert_allclose(result.loss.numpy(), objective(Q, W, H), rtol=1e-3)
    np.testing.assert_allclose(result.energy.numpy(), objective(0 * Q, W, H), rtol=1e-4)
    assert result.fallback is None and result.damp_percent == 0.01


# ------------------------------------------------------------------------------------------------- asymmetric target


@pytest.mark.parametrize("order", [True, "group", False])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_target_moves_by_the_correction(strength: float, order: str) -> None:
    """The result is the oracle's for T = W + strength * D H^-1, formed in float64 from the damped H."""
    W, H = problem(48, seed=51)
    D = 3 * torch.randn(N, 48, generator=rng(52))
    inverse = np.linalg.inv(damped64(H, 0.01, 0.05))
    T = W.double().numpy() + strength * D.double().numpy() @ inverse
    scheme = WeightScheme(4, 16)
    options = GPTQOptions(target_strength=strength, act_order=order, search="minmax", weighting="none")
    result = gptq(W, H, scheme, options, correction=D)
    assert_same(result, gptq_oracle(torch.from_numpy(T), H, scheme, order=order, static_groups=True))
    np.testing.assert_allclose(result.energy.numpy(), objective(0 * T, T, H), rtol=1e-3)
    np.testing.assert_allclose(result.loss.numpy(), objective(result.tensor.dequantize(), T, H), rtol=1e-3)
    moved = gptq_oracle(W, H, scheme, order=order, static_groups=True).codes != result.tensor.codes.numpy()
    assert (moved.mean() > 0.3) == (strength > 0)


def test_full_strength_recovers_the_best_linear_predictor() -> None:
    """With many tokens and 8 bits the weights become the regression of the original outputs on the inputs seen."""
    tokens, K = 20000, 40
    Y = correlated(tokens, K, seed=61, strong=1.0)
    X = Y + 0.4 * Y.std() * torch.randn(tokens, K, generator=rng(62)) + 0.2 * Y.roll(1, 1)
    W = torch.randn(N, K, generator=rng(63))
    outputs = Y.double() @ W.double().T
    best = torch.linalg.lstsq(X.double(), outputs).solution.T
    D = ((Y - X).double() @ W.double().T).T @ X.double() / tokens
    options = GPTQOptions(damp_percent=1e-6, shrinkage=0.0, target_strength=1.0)
    Q = gptq(W, hessian(X), WeightScheme(8, 8), options, correction=D.float()).tensor.dequantize().double()

    def error(weights: Tensor) -> float:
        return float((X.double() @ weights.double().T - outputs).square().mean())

    assert error(Q) < 1.001 * error(best)
    assert error(best) < 0.8 * error(W)
    half = gptq(W, hessian(X), WeightScheme(8, 8), GPTQOptions(target_strength=0.5), correction=D.float())
    assert error(Q) < error(half.tensor.dequantize()) < error(W)


def test_dead_columns_stay_zero_under_a_correction() -> None:
    W, _ = problem(32)
    X = correlated(200, 32)
    X[:, 3] = 0
    D = torch.randn(N, 32, generator=rng(1))
    result = gptq(W, hessian(X), WeightScheme(4, 8), GPTQOptions(target_strength=1.0), correction=D)
    assert not result.tensor.dequantize()[:, 3].any()


# ------------------------------------------------------------------------------------------------- trouble with H


def rotated(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    K = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(K, K, generator=rng(seed), dtype=torch.float64)).Q
    H = basis @ torch.diag(eigenvalues.double()) @ basis.T
    return ((H + H.T) / 2).float()


@pytest.mark.parametrize("least,needed", [(0.001, 0.01), (-0.03, 0.1), (-0.3, 1.0)])
def test_damping_rises_until_it_helps_and_is_reported(least: float, needed: float) -> None:
    eigenvalues = torch.linspace(0.5, 1.5, 32)
    eigenvalues[0] = least
    H = rotated(eigenvalues)
    W = torch.randn(8, 32, generator=rng(0))
    result = gptq(W, H, WeightScheme(4, 16), GPTQOptions(shrinkage=0.0))
    assert result.damp_percent == needed and result.fallback is None
    same = gptq(W, H, WeightScheme(4, 16), GPTQOptions(shrinkage=0.0, damp_percent=needed))
    assert torch.equal(result.tensor.codes, same.tensor.codes)


def test_singular_hessian_without_damping() -> None:
    """Fewer tokens than columns: H has no inverse, and damping starts from nothing."""
    X = correlated(5, 40)
    W = torch.randn(8, 40, generator=rng(0))
    result = gptq(W, hessian(X), WeightScheme(4, 8), GPTQOptions(damp_percent=0.0, shrinkage=0.0))
    assert result.fallback is None and 0 < result.damp_percent <= 1
    assert torch.isfinite(result.tensor.scale.float()).all()
    theirs = rtn(W, WeightScheme(4, 8)).dequantize()
    assert held_out_error(result.tensor.dequantize(), W, X) < 0.5 * held_out_error(theirs, W, X)


@pytest.mark.parametrize("kind", ["infinite", "infinite off the diagonal", "nan", "negative", "indefinite"])
def test_fallback_when_there_is_no_factor(kind: str) -> None:
    K = 24
    H = rotated(torch.linspace(0.5, 1.5, K))
    if kind == "infinite":
        H[3, 3] = float("inf")
    elif kind == "infinite off the diagonal":
        H[3, 5] = H[5, 3] = float("inf")
    elif kind == "nan":
        H[3, 5] = H[5, 3] = float("nan")
    elif kind == "negative":
        H = -5 * H
    else:
        H = rotated(torch.cat([torch.tensor([-3.0]), torch.linspace(0.5, 1.5, K - 1)]))
    W = torch.randn(8, K, generator=rng(0))
    scheme = WeightScheme(3, 8, symmetric=False)
    result = gptq(W, H, scheme)
    assert result.fallback is not None and result.fallback.startswith("rtn: ")
    plain = rtn(W, scheme)
    assert torch.equal(result.tensor.codes, plain.codes) and torch.equal(result.tensor.scale, plain.scale)


def test_hessian_of_zeros_is_round_to_nearest_of_nothing() -> None:
    """No input ever arrives: every column is dead."""
    result = gptq(torch.randn(4, 16, generator=rng(0)), torch.zeros(16, 16), WeightScheme(4, 8))
    assert not result.tensor.dequantize().any() and result.fallback is None


# ------------------------------------------------------------------------------------------------- options


def test_unknown_option_lists_the_known_ones() -> None:
    with pytest.raises(SchemeError, match=r"'dampening'.*block_size.*damp_percent.*shrinkage"):
        GPTQOptions.parse({"dampening": 0.1})


def test_activation_order_needs_static_groups() -> None:
    with pytest.raises(SchemeError, match="act_order=group"):
        GPTQOptions.parse({"act_order": True, "static_groups": False})


def test_options_reach_the_solver() -> None:
    W, H = problem(64, seed=71)
    scheme = WeightScheme(3, 16)
    base = gptq(W, H, scheme)
    for change in ({"damp_percent": 0.3}, {"shrinkage": 0.5}, {"act_order": False}, {"search": "minmax"}):
        other = gptq(W, H, scheme, GPTQOptions.parse(change))
        assert not torch.equal(other.tensor.codes, base.tensor.codes), change
    Hd = damped64(H, 0.02, 0.1)
    np.testing.assert_allclose(damped(H, 0.02, 0.1).numpy(), Hd, rtol=1e-6)
