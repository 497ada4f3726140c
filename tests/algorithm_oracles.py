"""Slow float64 twins of the solvers, written from the papers' formulas: no blocking, no Cholesky factor, no torch.

Every code they choose comes with a *margin*: the distance, in units of codes, to the nearest rounding tie. The code
under test works in float32, so a row whose margin is tiny may legitimately round the other way (and then differ in
every later column); tests compare codes exactly on the other rows, and see to it that these are nearly all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from bitwright.numerics import choose_grid
from bitwright.scheme import WeightScheme

# Float32 leaves errors of about 1e-6 of the largest level in the codes before rounding, and the feedback adds some.
SAFE = 2e-4


def rng(seed: int) -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(seed)


def correlated(tokens: int, K: int, seed: int = 0, strong: float = 3.0) -> Tensor:
    """Inputs [tokens, K] as linears see them: correlated columns of unequal size, float32."""
    g = rng(seed)
    mix = torch.randn(K, K, generator=g) / K**0.5
    common = torch.randn(tokens, 3, generator=g) @ torch.randn(3, K, generator=g)
    size = torch.exp(0.5 * torch.randn(K, generator=g))
    return (torch.randn(tokens, K, generator=g) @ (mix + torch.eye(K)) + strong * common) * size


def hessian(X: Tensor) -> Tensor:
    """Mean x^T x [K, K], summed in float64, float32."""
    X = X.double()
    return (X.T @ X / X.shape[0]).float()


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Values rounded to bfloat16 (half to even), float64."""
    return torch.from_numpy(np.ascontiguousarray(x)).to(torch.bfloat16).double().numpy()


def bf16_margin(x: np.ndarray) -> np.ndarray:
    """Distance of x to the nearest tie between two bfloat16 numbers, relative to their spacing."""
    _, exponent = np.frexp(np.abs(x) + 1e-300)
    steps = np.abs(x) / np.ldexp(1.0, exponent - 8)
    return np.abs(steps - np.floor(steps) - 0.5)


def minmax_grid(w: np.ndarray, scheme: WeightScheme) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """scale, zero point and margin, each [N], of one group w [N, g]: the range of the weights, zero inside it."""
    if scheme.symmetric:
        exact = np.abs(w).max(1) / (2 ** (scheme.bits - 1) - 1)
        scale = to_bf16(exact)
        return np.where(scale == 0, 1.0, scale), np.zeros(len(w)), bf16_margin(exact)
    low, high = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
    exact = (high - low) / (2**scheme.bits - 1)
    scale = to_bf16(exact)
    scale = np.where(scale == 0, 1.0, scale)
    zero = scheme.qmin - low / scale
    margin = np.minimum(bf16_margin(exact), np.abs(zero - np.floor(zero) - 0.5))
    return scale, np.clip(np.round(zero), scheme.qmin, scheme.qmax), margin


def mse_grid(w: np.ndarray, scheme: WeightScheme, column_weight: np.ndarray | None) -> tuple[np.ndarray, ...]:
    """The same by bitwright's own search (tested elsewhere); its choices among candidates have no margin to report."""
    row = WeightScheme(scheme.bits, None, scheme.symmetric)
    weight = None if column_weight is None else torch.from_numpy(column_weight).float()
    grid = choose_grid(torch.from_numpy(w).float(), row, "mse", weight)
    zero = np.zeros(len(w)) if grid.zero_point is None else grid.zero_point[:, 0].double().numpy()
    return grid.scale[:, 0].double().numpy(), zero, np.full(len(w), np.inf)


@dataclass
class Rounded:
    """codes [N, K] signed, scale and zero_point [N, G], values [N, K]; margin [N]: the row's least."""

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    values: np.ndarray
    margin: np.ndarray = field(repr=False)

    @property
    def safe(self) -> np.ndarray:
        """Rows that float32 cannot round differently."""
        return self.margin > SAFE


def damped64(H: Tensor | np.ndarray, damp_percent: float, shrinkage: float) -> np.ndarray:
    """Damped H in float64, entry by entry."""
    H = _array(H)
    mean = np.mean(np.diag(H))
    out = H.copy()
    for j in range(len(H)):
        out[j, j] += mean if H[j, j] == 0 else shrinkage * H[j, j] + damp_percent * mean
    return out


def visiting_order(H: np.ndarray, group_size: int | None, order: str) -> list[int]:
    """Columns in the order of the sweep."""
    K = len(H)
    diagonal = np.diag(H).astype(np.float32)
    if order is False:
        return list(range(K))
    if order is True:
        return sorted(range(K), key=lambda j: -diagonal[j])
    g = group_size or K
    groups = [list(range(i, min(K, i + g))) for i in range(0, K, g)]
    groups.sort(key=lambda members: -np.mean([diagonal[j] for j in members], dtype=np.float64))
    return [j for members in groups for j in sorted(members, key=lambda j: -diagonal[j])]


def gptq_oracle(
    W: Tensor,
    H: Tensor,
    scheme: WeightScheme,
    *,
    order: str = "none",
    static_groups: bool = False,
    damp_percent: float = 0.01,
    shrinkage: float = 0.05,
    search: str = "minmax",
    weighting: str = "none",
    feedback: bool = True,
) -> Rounded:
    """GPTQ column by column with the explicit inverse, one column eliminated after the other (OBQ, equations 2 and 3).

    feedback=False rounds without it: round-to-nearest on the same grids.
    """
    Hd = damped64(H, damp_percent, shrinkage)
    w = W.double().numpy().copy()
    N, K = w.shape
    dead = np.diag(H.numpy()) == 0
    w[:, dead] = 0
    g = scheme.group_size or K
    order_of = visiting_order(H.double().numpy(), scheme.group_size, order)
    inverse = np.linalg.inv(Hd)
    importance = {"none": None, "hessian": np.diag(H.double().numpy()), "inverse": 1 / np.diag(inverse)}[weighting]
    if importance is not None:
        importance = np.where(dead, 0, importance)

    def grid(columns: list[int]) -> tuple[np.ndarray, ...]:
        if search == "minmax":
            return minmax_grid(w[:, columns], scheme)
        return mse_grid(w[:, columns], scheme, None if importance is None else importance[columns])

    G = -(-K // g)
    scale, zero = np.ones((N, G)), np.zeros((N, G))
    margin = np.full(N, np.inf)
    members = [[j for j in order_of if j // g == i] for i in range(G)]
    if static_groups:
        for i in range(G):
            scale[:, i], zero[:, i], m = grid(sorted(members[i]))
            margin = np.minimum(margin, m)
    entered: set[int] = set(range(G)) if static_groups else set()
    codes, values = np.zeros((N, K)), np.zeros((N, K))
    for j in order_of:
        i = j // g
        if i not in entered:
            entered.add(i)
            scale[:, i], zero[:, i], m = grid(members[i])
            margin = np.minimum(margin, m)
        level = w[:, j] / scale[:, i] + zero[:, i]
        inside = (level > scheme.qmin - 0.5) & (level < scheme.qmax + 0.5)
        tie = np.abs(level - np.floor(level) - 0.5)
        ends = np.minimum(np.abs(level - scheme.qmin + 0.5), np.abs(level - scheme.qmax - 0.5))
        margin = np.minimum(margin, np.where(inside, tie, ends))
        codes[:, j] = np.clip(np.round(level), scheme.qmin, scheme.qmax)
        values[:, j] = (codes[:, j] - zero[:, i]) * scale[:, i]
        if feedback:
            error = (w[:, j] - values[:, j]) / inverse[j, j]
            w -= np.outer(error, inverse[j])
            inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
            inverse[j, :] = inverse[:, j] = 0
    return Rounded(codes, scale, zero, values, margin)


def objective(Q: Tensor | np.ndarray, T: Tensor | np.ndarray, H: Tensor | np.ndarray) -> np.ndarray:
    """(q - t) H (q - t)^T per row, float64."""
    D = _array(Q) - _array(T)
    return ((D @ _array(H)) * D).sum(1)


def _array(x: Tensor | np.ndarray) -> np.ndarray:
    return x.double().numpy() if isinstance(x, Tensor) else x
