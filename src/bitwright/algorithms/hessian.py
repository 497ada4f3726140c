"""The layer Hessian H = 2/n X^T X of a linear's inputs and the factor that the column sweep needs.

Source: GPTQ (arXiv 2210.17323), section 3. Only H's shape up to a constant matters to the solution, so the mean
x^T x is kept instead of twice it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DAMP_CEILING = 1.0
_TILE = 288


class Gram:
    """Sum of x^T x over tokens, [K, K] fp32, accumulated over the upper block triangle only (half the arithmetic).

    The order of additions is the order of the calls, so the sum is the same bits on every run.
    """

    def __init__(self, K: int, device: torch.device | str = "cpu") -> None:
        self.H = torch.zeros(K, K, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """x [tokens, K] fp32: inputs of the linear (rows scaled by the root of their weight, if weighted)."""
        K = self.H.shape[0]
        self.tokens += x.shape[0]
        for i in range(0, K, _TILE):
            # One row of tiles from the diagonal rightwards.
            self.H[i : i + _TILE, i:].addmm_(x[:, i : i + _TILE].T, x[:, i:])

    def mean(self) -> Tensor:
        """The symmetric mean x^T x [K, K]; zeros when no token came."""
        upper = torch.triu(self.H)
        return (upper + torch.triu(upper, 1).T) / max(1, self.tokens)


@dataclass(frozen=True)
class Factor:
    """U [K, K] upper with H^-1 = U^T U for the damped H in the order `perm` (columns of W as the sweep visits them);
    dead bool [K] (original order); damp_percent that was needed."""

    U: Tensor
    perm: Tensor
    dead: Tensor
    damp_percent: float


def damped(H: Tensor, damp_percent: float, shrinkage: float = 0.0, dead: Tensor | None = None) -> Tensor:
    """H + shrinkage * diag(H) + damp_percent * mean(diag H) * I; a dead column gets the mean instead.

    dead: bool [K]; None = every column with H_jj = 0.

    The constant term guards the factorization. The proportional one shrinks the correlations between columns towards
    none, as is done for covariances estimated from few samples, and is what carries over to other text.
    """
    out = H.clone()
    diagonal = H.diagonal()
    mean = diagonal.mean()
    floor = torch.where(mean > 0, mean, torch.ones_like(mean))
    dead = diagonal <= 0 if dead is None else dead
    out.diagonal().add_(torch.where(dead, floor, shrinkage * diagonal + damp_percent * floor))
    return out


def factorize(
    H: Tensor, perm: Tensor, damp_percent: float, shrinkage: float = 0.0, dead: Tensor | None = None
) -> Factor | None:
    """Upper Cholesky factor U of damped(H)^-1 in the order perm, or None when no damping up to 1 helps.

    H fp32 [K, K], not changed. One factorization: with J the reversal, J H J = L L^T gives U = J L^-1 J.
    On failure damp_percent grows tenfold. dead: bool [K]; None = every column with H_jj = 0.
    """
    if not bool(torch.isfinite(H.diagonal().sum())):
        return None
    dead = H.diagonal() <= 0 if dead is None else dead
    damp = damp_percent
    while True:
        L, info = torch.linalg.cholesky_ex(damped(H, damp, shrinkage, dead)[perm][:, perm].flip(0, 1))
        if int(info) == 0:
            eye = torch.eye(H.shape[0], device=H.device, dtype=H.dtype)
            U = torch.linalg.solve_triangular(L, eye, upper=False).flip(0, 1)
            if bool(torch.isfinite(U).all()):
                return Factor(U.contiguous(), perm, dead, damp)
        if damp >= DAMP_CEILING:
            return None
        damp = min(DAMP_CEILING, max(damp, 1e-4) * 10)
