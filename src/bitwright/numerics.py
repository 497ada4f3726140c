"""Choosing integer grids for weights and moving weights on and off them.

Everything works on a weight [N, K] seen as groups [N, G, g]; a ragged last group is padded with columns of weight
zero, so that it is an ordinary group to the code and contributes nothing but its real columns.

Grids are found *with the scale already rounded* to the 16-bit dtype it will be stored in: codes chosen for an
unrounded scale would be slightly wrong for the stored one.

Two searches:

* ``minmax``: the scale that just reaches the largest weight; cheap, and what round-to-nearest usually means.
* ``mse``: the least squared error, optionally weighted per column. A few clipping ratios are tried from both signs
  (a symmetric grid -2^(b-1)..2^(b-1)-1 has one level more on one side; a negative scale moves that level to the
  other side, which is free on disk and worth much at 2 and 3 bits), and the best is polished by alternating
  "codes for this scale" with the closed form "scale for these codes", s = sum(c w q) / sum(c q^2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bitwright.errors import NumericsError
from bitwright.qtensor import QuantizedTensor, spread
from bitwright.scheme import WeightScheme

Search = Literal["minmax", "mse"]

# Elements worked on at a time in the search: small enough for a core's cache, large enough to hide call overhead.
_CHUNK = 1 << 18


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of a weight [N, K]: scale fp32 [N, G] (values exact in the storage dtype); zero_point
    fp32 [N, G] holding integers, or None when symmetric; scheme."""

    scale: Tensor
    zero_point: Tensor | None
    scheme: WeightScheme


def check_finite(name: str, x: Tensor) -> None:
    """NumericsError naming `name` if x holds NaN or Inf (one pass: any such value makes the sum of x*0 NaN)."""
    if x.numel() and not torch.isfinite(x.detach().flatten().mul(0.0).sum()):
        bad = int((~torch.isfinite(x)).sum())
        raise NumericsError(f"{name}: {bad} of {x.numel()} values are NaN or Inf; repair or re-download the source")


def grouped(W: Tensor, group_size: int | None) -> Tensor:
    """W [N, K] as [N, G, g]; a ragged last group is filled with zeros."""
    N, K = W.shape
    g = group_size or K
    pad = -K % g
    if pad:
        W = torch.nn.functional.pad(W, (0, pad))
    return W.reshape(N, -1, g)


def choose_grid(
    W: Tensor,
    scheme: WeightScheme,
    search: Search = "mse",
    column_weight: Tensor | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> Grid:
    """The grid of W [N, K] under `scheme`.

    column_weight: fp32 [K] importance of each column's squared error (None: all equal); used by "mse" only.
    scale_dtype: torch.bfloat16 or torch.float16, the dtype the scales are rounded to.
    """
    blocks = grouped(W.float(), scheme.group_size)
    N, G, g = blocks.shape
    weight = None
    if search == "mse":
        K = W.shape[1]
        ones = torch.ones(K, device=W.device) if column_weight is None else column_weight.float()
        weight = grouped(ones[None, :], scheme.group_size)[0]  # [G, g], zero on the padding
    solve = _symmetric if scheme.symmetric else _asymmetric
    rows = max(1, _CHUNK // (G * g)) if W.device.type == "cpu" else N
    parts = [solve(blocks[i : i + rows], weight, scheme, scale_dtype) for i in range(0, N, rows)]
    scale = torch.cat([p[0] for p in parts]) if parts else W.new_zeros(0, G)
    zero = torch.cat([p[1] for p in parts if p[1] is not None]) if parts and not scheme.symmetric else None
    return Grid(scale, zero, scheme)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales rounded to their storage dtype, back in fp32; zero (an all-zero group, or underflow) becomes one."""
    scale = scale.to(dtype).float()
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _error(w: Tensor, c: Tensor, scale: Tensor, lo: Any, hi: Any) -> Tensor:
    """Weighted squared error [n, G] of groups w [n, G, g] on the grid k * scale, k in [lo, hi] (numbers or tensors)."""
    s = scale.unsqueeze(-1)
    q = torch.mul(w, 1.0 / s).round_().clamp_(lo, hi)
    return q.mul_(s).sub_(w).square_().mul_(c).sum(-1)


# Clipping ratios tried, by bits: few bits want harder clipping. The polish below closes the gaps between them.
_RATIOS = {
    2: (0.35, 0.45, 0.55, 0.65, 0.8, 1.0),
    3: (0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    4: (0.7, 0.8, 0.88, 0.94, 1.0),
    8: (0.98, 1.0),
}
_POLISH = 3


def _symmetric(w: Tensor, c: Tensor | None, scheme: WeightScheme, dtype: torch.dtype) -> tuple[Tensor, None]:
    lo, hi = float(scheme.qmin), float(scheme.qmax)
    top = w.abs().amax(-1)
    if c is None:
        return _stored(top / hi, dtype), None
    # The long side of the grid (|lo| levels) faces the side that holds the largest weight, or the other: both tried.
    best = _stored(top / hi, dtype)
    best_error = _error(w, c, best, lo, hi)

    def keep_better(scale: Tensor) -> None:
        nonlocal best, best_error
        scale = _stored(scale, dtype)
        error = _error(w, c, scale, lo, hi)
        better = error < best_error
        best = torch.where(better, scale, best)
        best_error = torch.where(better, error, best_error)

    for ratio in _RATIOS[scheme.bits]:
        for sign in (1.0, -1.0):
            if ratio != 1.0 or sign != 1.0:
                keep_better(top * (sign * ratio / (-lo if ratio == 1.0 else hi)))
    for _ in range(_POLISH):
        q = torch.mul(w, 1.0 / best.unsqueeze(-1)).round_().clamp_(lo, hi)
        cq = q * c
        den = (cq * q).sum(-1)
        keep_better(torch.where(den > 0, (cq * w).sum(-1) / den.clamp_min(1e-30), best))
    return best, None


def _asymmetric(w: Tensor, c: Tensor | None, scheme: WeightScheme, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    lo, hi = float(scheme.qmin), float(scheme.qmax)
    low = w.amin(-1).clamp_max(0.0)
    high = w.amax(-1).clamp_min(0.0)

    def grid(a: float, b: float) -> tuple[Tensor, Tensor]:
        scale = _stored((b * high - a * low) / (hi - lo), dtype)
        return scale, (lo - a * low / scale).round().clamp(lo, hi)

    best, zero = grid(1.0, 1.0)
    if c is None:
        return best, zero
    best_error = _error(w, c, best, lo - zero.unsqueeze(-1), hi - zero.unsqueeze(-1))

    def keep_better(scale: Tensor, z: Tensor) -> None:
        nonlocal best, zero, best_error
        error = _error(w, c, scale, lo - z.unsqueeze(-1), hi - z.unsqueeze(-1))
        better = error < best_error
        best, zero = torch.where(better, scale, best), torch.where(better, z, zero)
        best_error = torch.where(better, error, best_error)

    ratios = _RATIOS[scheme.bits]
    for a in ratios:
        for b in ratios:
            if abs(a - b) < 0.25 and (a, b) != (1.0, 1.0):
                keep_better(*grid(a, b))
    for _ in range(_POLISH):
        z = zero.unsqueeze(-1)
        q = torch.mul(w, 1.0 / best.unsqueeze(-1)).round_().clamp_(lo - z, hi - z)
        cq = q * c
        den = (cq * q).sum(-1)
        scale = _stored(torch.where(den > 0, (cq * w).sum(-1) / den.clamp_min(1e-30), best), dtype)
        for shift in (-1.0, 0.0, 1.0):
            keep_better(scale, (zero + shift).clamp(lo, hi))
    return best, zero


def encode(W: Tensor, grid: Grid) -> Tensor:
    """Nearest codes of W [N, K] on the grid: fp32 integers [N, K] in [qmin, qmax]."""
    K = W.shape[1]
    g = grid.scheme.group_size or K
    q = W.float() / spread(grid.scale, g, K)
    if grid.zero_point is not None:
        q = q + spread(grid.zero_point, g, K)
    return q.round_().clamp_(grid.scheme.qmin, grid.scheme.qmax)


def quantized(codes: Tensor, grid: Grid, scale_dtype: torch.dtype) -> QuantizedTensor:
    """QuantizedTensor of fp32 integer codes [N, K] on their grid."""
    zero = None if grid.zero_point is None else grid.zero_point.to(torch.int8)
    return QuantizedTensor(codes.to(torch.int8), grid.scale.to(scale_dtype), zero, grid.scheme)
