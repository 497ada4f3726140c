"""Polishing steps against one-column-at-a-time and one-row-at-a-time float64 twins."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from algorithm_oracles import correlated, damped64, hessian, objective, rng
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitwright.algorithms.descent import coordinate_descent, proxy_loss, refit_scales
from bitwright.numerics import choose_grid, encode
from bitwright.qtensor import spread
from bitwright.scheme import WeightScheme


def rounded(K: int, bits: int, g: int | None, symmetric: bool = True, seed: int = 0, N: int = 16) -> tuple[Tensor, ...]:
    """T, damped H, and round-to-nearest: Q, levels, scale, lo, hi, all [N, K], and the scales [N, G]."""
    T = torch.randn(N, K, generator=rng(seed))
    H = torch.from_numpy(damped64(hessian(correlated(200, K, seed)), 0.01, 0.05)).float()
    scheme = WeightScheme(bits, g, symmetric)
    grid = choose_grid(T, scheme, "minmax")
    zero = torch.zeros_like(grid.scale) if grid.zero_point is None else grid.zero_point
    scale, zero = (spread(x, g or K, K) for x in (grid.scale, zero))
    levels = encode(T, grid) - zero
    return T, H, levels * scale, levels, scale, scheme.qmin - zero, scheme.qmax - zero, grid.scale


def naive_descent(Q: Tensor, T: Tensor, H: Tensor, scale: Tensor, lo: Tensor, hi: Tensor, passes: int) -> tuple:
    """values and the least distance to a rounding tie per row, float64: the whole gradient anew for each column."""
    q, t, h, s, low, high = (x.double().numpy() for x in (Q, T, H, scale, lo, hi))
    q = q.copy()
    margin = np.full(len(q), np.inf)
    for _ in range(passes):
        for j in range(q.shape[1]):
            gradient = (q - t) @ h[:, j]
            level = (q[:, j] - gradient / h[j, j]) / s[:, j]
            inside = (level > low[:, j] - 0.5) & (level < high[:, j] + 0.5)
            ends = np.minimum(np.abs(level - low[:, j] + 0.5), np.abs(level - high[:, j] - 0.5))
            margin = np.minimum(margin, np.where(inside, np.abs(level - np.floor(level) - 0.5), ends))
            q[:, j] = np.clip(np.round(level), low[:, j], high[:, j]) * s[:, j]
    return q, margin


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("K,g,block", [(150, 32, 64), (64, None, 64), (50, 20, 16), (9, 8, 64), (1, None, 4)])
def test_descent_equals_the_naive_one(K: int, g: int | None, block: int, bits: int, symmetric: bool) -> None:
    T, H, Q, _, scale, lo, hi, _ = rounded(K, bits, g, symmetric, seed=K + bits)
    for passes in (1, 2):
        want, margin = naive_descent(Q, T, H, scale, lo, hi, passes)
        got = coordinate_descent(Q, T, H, scale, lo, hi, passes=passes, block_size=block)
        safe = margin > 2e-4
        assert safe.mean() >= 0.6
        np.testing.assert_allclose(got.numpy()[safe], want[safe], rtol=1e-6, atol=1e-7)
    if K > 9 and bits < 8:
        assert (want != Q.double().numpy()).mean() > 0.05  # there was something to do


@settings(max_examples=25, deadline=None)
@given(
    K=st.integers(1, 90),
    bits=st.sampled_from([2, 3, 4]),
    symmetric=st.booleans(),
    passes=st.integers(0, 3),
    seed=st.integers(0, 999),
)
def test_descent_only_goes_down_and_stays_on_the_grid(
    K: int, bits: int, symmetric: bool, passes: int, seed: int
) -> None:
    T, H, Q, _, scale, lo, hi, _ = rounded(K, bits, 16, symmetric, seed, N=6)
    arguments = [x.clone() for x in (Q, T, H)]
    losses = [objective(Q, T, H)]
    for p in range(1, passes + 1):
        new = coordinate_descent(Q, T, H, scale, lo, hi, passes=p, block_size=32)
        losses.append(objective(new, T, H))
        levels = new / scale
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
        assert (levels.round() >= lo).all() and (levels.round() <= hi).all()
    for before, after in pairwise(losses):
        assert (after <= before * (1 + 1e-5) + 1e-9).all()
    assert all(torch.equal(x, y) for x, y in zip(arguments, (Q, T, H), strict=True))
    if passes == 0:
        assert torch.equal(coordinate_descent(Q, T, H, scale, lo, hi, passes=0), Q)


def test_descent_ends_where_no_single_code_can_be_better() -> None:
    T, H, Q, _, scale, lo, hi, _ = rounded(24, 3, 8, seed=4, N=4)
    end = coordinate_descent(Q, T, H, scale, lo, hi, passes=50)
    base = objective(end, T, H)
    for j in range(24):
        for step in (-1, 1):
            other = end.clone()
            other[:, j] = (((end / scale).round() + step).clamp(lo, hi) * scale)[:, j]
            assert (objective(other, T, H) >= base * (1 - 1e-5)).all()


def test_descent_takes_negative_scales() -> None:
    T, H, Q, levels, scale, lo, hi, _ = rounded(40, 3, 8, seed=6)
    flipped = coordinate_descent(-Q, -T, H, -scale, lo, hi, passes=2)
    torch.testing.assert_close(flipped, -coordinate_descent(Q, T, H, scale, lo, hi, passes=2))
    assert levels.any()


# ------------------------------------------------------------------------------------------------- scales


def naive_refit(levels: Tensor, T: Tensor, H: Tensor, g: int) -> np.ndarray:
    """Scales [N, G]: per row, least squares in the metric of H through its float64 root."""
    N, K = levels.shape
    G = -(-K // g)
    root = np.linalg.cholesky(H.double().numpy()).T  # H = root^T root
    out = np.zeros((N, G))
    for n in range(N):
        B = np.zeros((K, G))
        for k in range(K):
            B[k, k // g] = float(levels[n, k])
        out[n] = np.linalg.lstsq(root @ B, root @ T[n].double().numpy(), rcond=None)[0]
    return out


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("K,g", [(64, 16), (70, 16), (41, 8), (30, None), (12, 32)])
def test_refit_is_the_least_squares_of_each_row(K: int, g: int | None, bits: int, symmetric: bool) -> None:
    T, H, Q, levels, _, _, _, scale = rounded(K, bits, g, symmetric, seed=K)
    new = refit_scales(levels, T, H, scale, g)
    want = naive_refit(levels, T, H, g or K)
    np.testing.assert_allclose(new.double().numpy(), want, rtol=2e-3, atol=2e-4)
    before = objective(Q, T, H)
    after = objective(levels * spread(new, g or K, K), T, H)
    best = objective(levels.double().numpy() * np.repeat(want, g or K, axis=1)[:, :K], T, H)
    assert (after <= before * (1 + 1e-6)).all()
    np.testing.assert_allclose(after, best, rtol=1e-3)
    assert after.sum() < 0.999 * before.sum()


def test_refit_leaves_what_it_cannot_improve() -> None:
    """Groups of zeros keep their scale; a row at its optimum keeps all of them."""
    T, H, _, levels, _, _, _, scale = rounded(32, 4, 8)
    levels = levels.clone()
    levels[3] = 0
    levels[5, 8:16] = 0
    new = refit_scales(levels, T, H, scale, 8)
    assert torch.equal(new[3], scale[3]) and new[5, 1] == scale[5, 1]
    assert not torch.equal(new[5], scale[5])
    exact = levels * spread(scale, 8, 32)
    assert torch.equal(refit_scales(levels, exact, H, scale, 8), scale)


def test_proxy_loss() -> None:
    T, H, Q, *_ = rounded(33, 3, 8)
    np.testing.assert_allclose(proxy_loss(Q, T, H).numpy(), objective(Q, T, H), rtol=1e-4)
    X = correlated(500, 33, seed=9)
    outputs = (X.double() @ (Q - T).double().T).square().mean(0)
    np.testing.assert_allclose(proxy_loss(Q, T, hessian(X)).numpy(), outputs.numpy(), rtol=1e-3)
