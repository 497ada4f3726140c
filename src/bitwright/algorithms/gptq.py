"""GPTQ: one-shot rounding that feeds each column's error into the columns not yet rounded (arXiv 2210.17323).

Minimises ||W X - Q X||^2 row by row over a grid, given H = mean x^T x of the inputs. Steps here:

1. target T: W itself, or the *asymmetric* target (the aim of GPTAQ, arXiv 2504.02692). The inputs x that the quantized
   model sees differ from the inputs y of the original one, so the output should differ from W x by some d, for instance
   d = W (y - x). The minimiser over Q of E||W x + d - Q x||^2 is that of E||(T - Q) x||^2 with T = W + D H^-1,
   D = mean d x^T: the target moves once, in closed form, and everything after stays as it was. `target_strength` scales
   the move (1 = all of it, 0 = off); half of it generalises best.
2. order of columns, `act_order`: True (falling diag H over single columns, static grids), "group" (whole groups by
   falling mean diag H, columns inside likewise, so that grids can come from the updated weights), or False.
3. the sweep (sweep.py) with projection onto the grid.
4. polish (descent.py): `rounds` times refit the scales in closed form and run coordinate descent on the codes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import torch
from torch import Tensor

from bitwright.algorithms.descent import coordinate_descent, proxy_loss, refit_scales
from bitwright.algorithms.hessian import DAMP_CEILING, Factor, damped, factorize
from bitwright.algorithms.rtn import rtn
from bitwright.algorithms.sweep import column_sweep
from bitwright.errors import SchemeError
from bitwright.numerics import Grid, Search, choose_grid, encode, quantized
from bitwright.qtensor import QuantizedTensor, spread
from bitwright.scheme import WeightScheme

ActOrder = bool | Literal["group"]
Weighting = Literal["none", "hessian", "inverse"]
Smooth = float | Literal["auto"] | None


@dataclass(frozen=True)
class GPTQOptions:
    """damp_percent: share of mean(diag H) added to the diagonal. shrinkage: share of each H_jj added to itself.
    act_order: see the module. static_groups: grids from the original weights before the sweep (needed by
    act_order=True); else from the updated weights at each group. search: grid search. weighting: what a column's error
    weighs in that search (nothing, diag H, or 1/diag H^-1). block_size: columns per lazy update. rounds: polish rounds
    (None: one up to 3 bits, where it pays, none above); passes: coordinate-descent passes in each. target_strength:
    0..1, the asymmetric target (above 0 calibration runs a second, full-precision stream). sink_weight: what the first
    token of a sequence weighs in H; every later token attends to it, so its error counts many times. true_sequential:
    whether linears of a block are calibrated on inputs made by quantized predecessors (the pipeline's business).
    smooth: alpha of the factors that move the range of 8-bit activations into weights (smooth.py; the pipeline's
    business too), above 0 up to 1; "auto": searched for each input of plain w8a8; 0 or None: off."""

    damp_percent: float = 0.01
    shrinkage: float = 0.05
    act_order: ActOrder = True
    static_groups: bool = True
    search: Search = "mse"
    weighting: Weighting = "inverse"
    block_size: int = 128
    rounds: int | None = None
    passes: int = 2
    target_strength: float = 0.5
    sink_weight: float = 16.0
    true_sequential: bool = True
    smooth: Smooth = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.smooth, int | float) and not 0 <= self.smooth <= 1:
            raise SchemeError(
                f"{self._method()} option smooth={self.smooth} is no share; use a number from 0 (off) to 1, or auto"
            )
        if self.block_size == 0:
            raise SchemeError("gptq option block_size=0 updates nothing; use 1 or more, 128 is usual")
        if self.act_order is True and not self.static_groups:
            raise SchemeError(
                "act_order=true with static_groups=false would need a group index per column, which servers refuse; "
                "use static_groups=true, or act_order=group for grids from updated weights"
            )

    @classmethod
    def parse(cls, options: dict[str, Any]) -> Self:
        """Options by name; an unknown one is a SchemeError that lists the known ones."""
        known = {f.name for f in fields(cls)}
        for name in options:
            if name not in known:
                raise SchemeError(f"unknown {cls._method()} option {name!r}; known: {', '.join(sorted(known))}")
        return cls(**options)

    @classmethod
    def _method(cls) -> str:
        return cls.__name__.removesuffix("Options").lower()


@dataclass(frozen=True)
class GPTQResult:
    """tensor; loss [N]: tr((T - Q) H (T - Q)^T) per row on the undamped H; energy [N]: the same of T alone, so that
    loss.sum() / energy.sum() is the relative output error; damp_percent used; dead_columns: inputs that were always
    zero, whose weights are therefore zero now; fallback: None or the reason for rtn."""

    tensor: QuantizedTensor
    loss: Tensor
    energy: Tensor
    damp_percent: float
    dead_columns: int = 0
    fallback: str | None = None


def gptq(
    W: Tensor,
    H: Tensor,
    scheme: WeightScheme,
    options: GPTQOptions = GPTQOptions(),
    *,
    correction: Tensor | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> GPTQResult:
    """Quantize W [N, K] against H [K, K] (mean x^T x, fp32).

    correction: D [N, K] = mean d x^T for the asymmetric target, or None. When no damping up to 1 makes H factorizable
    the result is round-to-nearest and `fallback` says so.
    """
    W = W.float()
    perm = column_order(H, scheme.group_size, options.act_order)
    factor = factorize(H, perm, options.damp_percent, options.shrinkage)
    if factor is None:
        tensor = rtn(W, scheme, search=options.search, scale_dtype=scale_dtype)
        return _result(tensor, W, H, DAMP_CEILING, fallback="rtn: the Hessian has no factor with damping up to 1")
    T = W
    if correction is not None and options.target_strength > 0:
        T = T + options.target_strength * times_inverse(correction, factor)
    T = torch.where(factor.dead, torch.zeros_like(T), T)

    if options.static_groups:
        grid = choose_grid(T, scheme, options.search, column_weight(H, factor, options.weighting), scale_dtype)
        Q = _sweep_static(T, factor, grid, options.block_size)
    else:
        Q, grid = _sweep_dynamic(T, H, factor, scheme, options, scale_dtype)

    rounds = options.rounds if options.rounds is not None else int(scheme.bits <= 3)
    for _ in range(rounds):
        D = damped(H, factor.damp_percent, options.shrinkage)
        Q, grid = _polish(Q, T, D, grid, factor.perm, options.passes, scale_dtype)
    return _result(quantized(encode(Q, grid), grid, scale_dtype), T, H, factor.damp_percent, int(factor.dead.sum()))


def _result(
    tensor: QuantizedTensor, T: Tensor, H: Tensor, damp_percent: float, dead: int = 0, fallback: str | None = None
) -> GPTQResult:
    energy = proxy_loss(torch.zeros_like(T), T, H)
    return GPTQResult(tensor, proxy_loss(tensor.dequantize(), T, H), energy, damp_percent, dead, fallback)


def times_inverse(D: Tensor, factor: Factor) -> Tensor:
    """D H^-1 [N, K] with the damped H of `factor`."""
    out = torch.empty_like(D)
    out[:, factor.perm] = (D[:, factor.perm] @ factor.U.T) @ factor.U
    return out


def column_order(H: Tensor, group_size: int | None, act_order: ActOrder) -> Tensor:
    """The permutation [K] in which columns are visited."""
    K = H.shape[0]
    diagonal = H.diagonal()
    if act_order is False:
        return torch.arange(K, device=H.device)
    if act_order is True:
        return torch.argsort(diagonal, descending=True, stable=True)
    g = group_size or K
    group = torch.arange(K, device=H.device) // g
    G = int(group[-1]) + 1
    counts = torch.bincount(group, minlength=G)
    means = torch.zeros(G, device=H.device).index_add_(0, group, diagonal.float()) / counts
    inner = torch.argsort(diagonal, descending=True, stable=True)
    rank = torch.argsort(torch.argsort(means, descending=True, stable=True))
    return inner[torch.argsort(rank[group[inner]], stable=True)]


def column_weight(H: Tensor, factor: Factor, weighting: Weighting) -> Tensor | None:
    """What a column's error weighs in the search for a grid: fp32 [K] in the original order, None = all alike."""
    if weighting == "none":
        return None
    diagonal = H.diagonal()
    if weighting == "hessian":
        return torch.where(factor.dead, torch.zeros_like(diagonal), diagonal)
    out = torch.empty_like(diagonal)
    out[factor.perm] = 1.0 / factor.U.square().sum(0)  # 1 / diag(U^T U)
    return torch.where(factor.dead, torch.zeros_like(out), out)


def _expand(grid: Grid, K: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scale, zero point, and the range of levels (codes minus zero point) of every entry, each broadcastable [N, K]."""
    g = grid.scheme.group_size or K
    scale = spread(grid.scale, g, K)
    zero = torch.zeros_like(grid.scale) if grid.zero_point is None else grid.zero_point
    zero = spread(zero, g, K)
    return scale, zero, grid.scheme.qmin - zero, grid.scheme.qmax - zero


def _sweep_static(T: Tensor, factor: Factor, grid: Grid, block_size: int) -> Tensor:
    perm = factor.perm
    scale, _, lo, hi = _expand(grid, T.shape[1])
    S = scale[:, perm].T.contiguous()
    inverse = 1.0 / S
    if grid.zero_point is None:
        low, high = float(grid.scheme.qmin), float(grid.scheme.qmax)

        def project(j: int, Wt: Tensor) -> Tensor:
            return torch.mul(Wt[j], inverse[j]).round_().clamp_(low, high).mul_(S[j])
    else:
        lows, highs = lo[:, perm].T.contiguous(), hi[:, perm].T.contiguous()

        def project(j: int, Wt: Tensor) -> Tensor:
            return torch.mul(Wt[j], inverse[j]).round_().clamp_(lows[j], highs[j]).mul_(S[j])

    Q, _ = column_sweep(T[:, perm], factor.U, project, block_size=block_size)
    out = torch.empty_like(Q)
    out[:, perm] = Q
    return out


def _sweep_dynamic(
    T: Tensor, H: Tensor, factor: Factor, scheme: WeightScheme, options: GPTQOptions, scale_dtype: torch.dtype
) -> tuple[Tensor, Grid]:
    K = T.shape[1]
    g = scheme.group_size or K
    perm = factor.perm
    group = (perm // g).tolist()
    starts = [j for j in range(K) if j == 0 or group[j] != group[j - 1]]
    ends = dict(zip(starts, [*starts[1:], K], strict=True))
    weight = column_weight(H, factor, options.weighting)
    G = scheme.num_groups(K)
    scales = torch.ones(T.shape[0], G, device=T.device)
    zeros = None if scheme.symmetric else torch.zeros_like(scales)
    row = WeightScheme(scheme.bits, None, scheme.symmetric)
    current: list[Tensor] = []

    def project(j: int, Wt: Tensor) -> Tensor:
        if j in ends:
            part = perm[j : ends[j]]
            found = choose_grid(
                Wt[j : ends[j]].T, row, options.search, None if weight is None else weight[part], scale_dtype
            )
            s, _, low, high = _expand(found, 1)
            current[:] = [s[:, 0], 1.0 / s[:, 0], low[:, 0], high[:, 0]]
            scales[:, group[j]] = found.scale[:, 0]
            if zeros is not None and found.zero_point is not None:
                zeros[:, group[j]] = found.zero_point[:, 0]
        s, inverse, low, high = current
        return torch.mul(Wt[j], inverse).round_().clamp_(low, high).mul_(s)

    Q, _ = column_sweep(T[:, perm], factor.U, project, block_size=options.block_size, starts=starts)
    out = torch.empty_like(Q)
    out[:, perm] = Q
    return out, Grid(scales, zeros, scheme)


def _polish(
    Q: Tensor, T: Tensor, H: Tensor, grid: Grid, perm: Tensor, passes: int, scale_dtype: torch.dtype
) -> tuple[Tensor, Grid]:
    """One round: scales in closed form for the codes, rounded to storage; then coordinate descent on the codes.

    Rounding the scales may cost a row more than the descent wins back; such rows stay as they were.
    """
    K = T.shape[1]
    _, zero, lo, hi = _expand(grid, K)
    levels = encode(Q, grid) - zero
    scale = refit_scales(levels, T, H, grid.scale, grid.scheme.group_size).to(scale_dtype).float()
    scale = torch.where(scale == 0, grid.scale, scale)
    S = spread(scale, grid.scheme.group_size or K, K)
    found = coordinate_descent(
        (levels * S)[:, perm], T[:, perm], H[perm][:, perm], S[:, perm], lo[:, perm], hi[:, perm], passes=passes
    )
    out = torch.empty_like(Q)
    out[:, perm] = found
    better = (proxy_loss(out, T, H) < proxy_loss(Q, T, H))[:, None]
    return torch.where(better, out, Q), Grid(torch.where(better, scale, grid.scale), grid.zero_point, grid.scheme)
