"""H and its factor against float64 linear algebra."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from algorithm_oracles import correlated, damped64, hessian, rng

from bitwright.algorithms.hessian import Gram, damped, factorize


@pytest.mark.parametrize("K", [1, 7, 287, 288, 289, 576, 600])
def test_gram_is_the_mean_of_outer_products(K: int) -> None:
    """Widths around the tile; several additions of unequal length, an empty one (an expert without tokens) too."""
    X = correlated(50, K, seed=K)
    gram = Gram(K)
    for part in (X[:1], X[1:30], X[:0], X[30:]):
        gram.add(part)
    want = X.double().T @ X.double() / 50
    H = gram.mean()
    assert gram.tokens == 50 and H.shape == (K, K) and H.dtype == torch.float32
    assert torch.equal(H, H.T)
    scale = want.diagonal().sqrt()
    torch.testing.assert_close(H.double() / scale / scale[:, None], want / scale / scale[:, None], rtol=0, atol=1e-5)


def test_gram_does_not_change_its_input_and_can_go_on() -> None:
    X = correlated(20, 10)
    before = X.clone()
    gram = Gram(10)
    gram.add(X)
    first = gram.mean()
    assert torch.equal(gram.mean(), first)
    gram.add(X)
    torch.testing.assert_close(gram.mean(), first)
    assert torch.equal(X, before)


def test_gram_of_no_tokens_is_zero() -> None:
    gram = Gram(12)
    gram.add(torch.empty(0, 12))
    assert torch.equal(gram.mean(), torch.zeros(12, 12)) and gram.tokens == 0


def test_gram_of_non_finite_inputs_shows_it() -> None:
    X = torch.randn(4, 300, generator=rng(0))
    X[2, 299] = float("nan")
    gram = Gram(300)
    gram.add(X)
    assert torch.isnan(gram.mean()[299, 299]) and torch.isnan(gram.mean()[0, 299])


@pytest.mark.parametrize("shrinkage", [0.0, 0.05])
@pytest.mark.parametrize("damp_percent", [0.01, 0.3])
def test_damping(damp_percent: float, shrinkage: float) -> None:
    X = correlated(100, 20)
    X[:, [4, 19]] = 0
    H = hessian(X)
    before = H.clone()
    got = damped(H, damp_percent, shrinkage)
    assert torch.equal(H, before)
    np.testing.assert_allclose(got.numpy(), damped64(H, damp_percent, shrinkage), rtol=1e-6)
    assert float(got[4, 4]) == pytest.approx(float(H.diagonal().mean()))


@pytest.mark.parametrize("K", [1, 2, 33, 150])
@pytest.mark.parametrize("shrinkage", [0.0, 0.1])
def test_factor_of_the_inverse_in_permuted_order(K: int, shrinkage: float) -> None:
    X = correlated(300, K, seed=K)
    dead = [] if K < 3 else [2, K - 1]
    X[:, dead] = 0
    H = hessian(X)
    before = H.clone()
    perm = torch.randperm(K, generator=rng(1))
    factor = factorize(H, perm, 0.01, shrinkage)
    assert factor is not None and torch.equal(H, before)
    U = factor.U.double().numpy()
    assert np.array_equal(U, np.triu(U)) and (np.diag(U) > 0).all()
    order = perm.numpy()
    want = np.linalg.inv(damped64(H, 0.01, shrinkage)[order][:, order])
    size = np.sqrt(np.diag(want))
    np.testing.assert_allclose(U.T @ U / size / size[:, None], want / size / size[:, None], atol=2e-4)
    assert torch.equal(factor.perm, perm) and factor.damp_percent == 0.01
    assert factor.dead.nonzero().flatten().tolist() == dead


def test_factor_gives_the_conditional_variances() -> None:
    """U_jj^2 is 1 / (the part of H_jj that later columns cannot explain), which is what GPTQ divides the error by."""
    H = hessian(correlated(300, 12))
    factor = factorize(H, torch.arange(12), 0.01)
    assert factor is not None
    Hd = damped64(H, 0.01, 0.0)
    for j in range(12):
        rest = slice(j + 1, None)
        left = Hd[j, j] - (Hd[j, rest] @ np.linalg.solve(Hd[rest, rest], Hd[rest, j]) if j < 11 else 0)
        assert float(factor.U[j, j]) ** -2 == pytest.approx(left, rel=1e-3)


def with_least_eigenvalue(value: float, K: int = 40) -> torch.Tensor:
    """A symmetric H of mean diagonal about 1 whose eigenvalues are 0.5..1.5 but for one."""
    basis = torch.linalg.qr(torch.randn(K, K, generator=rng(3), dtype=torch.float64)).Q
    eigenvalues = torch.linspace(0.5, 1.5, K, dtype=torch.float64)
    eigenvalues[0] = value
    H = basis @ torch.diag(eigenvalues) @ basis.T
    return ((H + H.T) / 2).float()


@pytest.mark.parametrize(
    "least,start,end",
    [
        (0.1, 0.01, 0.01),
        (-0.02, 0.01, 0.1),
        (-0.3, 0.01, 1.0),
        (-0.3, 0.5, 0.5),
        (-0.0005, 0.0, 0.001),
        (-0.3, 0.0, 1.0),
    ],
)
def test_damping_rises_tenfold_until_a_factor_exists(least: float, start: float, end: float) -> None:
    H = with_least_eigenvalue(least)
    perm = torch.arange(40)
    factor = factorize(H, perm, start)
    assert factor is not None and factor.damp_percent == pytest.approx(end)
    want = np.linalg.inv(damped64(H, end, 0.0))
    np.testing.assert_allclose((factor.U.double().T @ factor.U.double()).numpy(), want, rtol=1e-2, atol=1e-2)


def test_shrinkage_helps_before_damping_does() -> None:
    H = with_least_eigenvalue(-0.02)
    factor = factorize(H, torch.arange(40), 0.01, shrinkage=0.05)
    assert factor is not None and factor.damp_percent == 0.01


@pytest.mark.parametrize(
    "kind", ["inf", "inf off the diagonal", "nan", "nan off the diagonal", "negative", "indefinite"]
)
def test_no_factor(kind: str) -> None:
    H = with_least_eigenvalue(-1.5 if kind == "indefinite" else 0.5)
    bad = float("inf") if kind.startswith("inf") else float("nan")
    if kind == "negative":
        H = -3 * H
    elif kind.endswith("off the diagonal"):
        H[3, 7] = H[7, 3] = bad
    elif kind != "indefinite":
        H[5, 5] = bad
    assert factorize(H, torch.randperm(40, generator=rng(0)), 0.01) is None


def test_only_dead_columns() -> None:
    factor = factorize(torch.zeros(6, 6), torch.arange(6), 0.01)
    assert factor is not None and factor.dead.all() and torch.equal(factor.U, torch.eye(6))
