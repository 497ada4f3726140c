"""Making a rounded weight better without any further data: both steps lower tr((Q - T) H (Q - T)^T).

* ``coordinate_descent``: one column's codes at a time, all others fixed. With D = (Q - T) H the best value of column
  j is q_j - D_j / H_jj, projected on the grid; D then changes by a rank-one term (blocked like the sweep).
* ``refit_scales``: all scales of a row at once, codes fixed. The row is linear in its scales, q = B s with B [K, G]
  holding the codes of each group, so s solves the G x G system (B^T H B) s = B^T H t.

The sweep rounds each column once, before it has seen the rounding of later ones; these two revisit the decision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.qtensor import spread

_SYSTEM_VALUES = 1 << 24


def proxy_loss(Q: Tensor, T: Tensor, H: Tensor) -> Tensor:
    """Per row [N]: (q - t) H (q - t)^T for Q, T [N, K], H [K, K]."""
    D = Q - T
    return ((D @ H) * D).sum(1)


def coordinate_descent(
    Q: Tensor, T: Tensor, H: Tensor, scale: Tensor, lo: Tensor, hi: Tensor, *, passes: int, block_size: int = 64
) -> Tensor:
    """Q [N, K] after `passes` rounds over all columns.

    T [N, K]: the target. H [K, K] damped. scale, lo, hi: the grid of each entry, [N, K] (expanded views are fine):
    allowed values are k * scale for integers lo <= k <= hi (zero points are inside lo and hi).
    """
    K = Q.shape[1]
    Qt, S = Q.T.contiguous(), scale.T.contiguous()
    inverse = 1.0 / S
    lo_t, hi_t = lo.T, hi.T
    Dt = H @ (Qt - T.T)
    step = (1.0 / H.diagonal()).tolist()
    for _ in range(passes):
        for begin in range(0, K, block_size):
            end = min(K, begin + block_size)
            D, local = Dt[begin:end], H[begin:end, begin:end]
            deltas = torch.empty_like(D)
            for j in range(begin, end):
                i = j - begin
                q = torch.add(Qt[j], D[i], alpha=-step[j]).mul_(inverse[j]).round_()
                q = torch.minimum(torch.maximum(q, lo_t[j]), hi_t[j]).mul_(S[j])
                delta = torch.sub(q, Qt[j], out=deltas[i])
                Qt[j] = q
                D.addr_(local[:, i], delta)
            if begin:
                Dt[:begin].addmm_(H[:begin, begin:end], deltas)
            if end < K:
                Dt[end:].addmm_(H[end:, begin:end], deltas)
    return Qt.T.contiguous()


def refit_scales(levels: Tensor, T: Tensor, H: Tensor, scale: Tensor, group_size: int | None) -> Tensor:
    """New scales [N, G] for fixed integer levels (codes minus zero point) [N, K]; T [N, K] the target, H [K, K] damped.

    A group whose levels are all zero keeps its scale, as does a row whose new scales do not lower its loss. Rows are
    taken so many at a time that their systems stay within 64 MB.
    """
    N, K = levels.shape
    g = group_size or K
    G = scale.shape[1]
    rows = max(1, _SYSTEM_VALUES // (G * G))
    if rows < N:
        parts = [slice(i, i + rows) for i in range(0, N, rows)]
        return torch.cat([refit_scales(levels[p], T[p], H, scale[p], group_size) for p in parts])
    pad = G * g - K
    TH = T @ H
    A = torch.empty(N, G, G, device=T.device)
    for i in range(G):
        part = levels[:, i * g : (i + 1) * g] @ H[i * g : (i + 1) * g]  # [N, K]
        A[:, i] = torch.nn.functional.pad(part * levels, (0, pad)).view(N, G, g).sum(-1)
    b = torch.nn.functional.pad(TH * levels, (0, pad)).view(N, G, g).sum(-1)
    diagonal = A.diagonal(dim1=1, dim2=2)
    idle = diagonal <= 0
    A = A + torch.diag_embed(torch.where(idle, torch.ones_like(diagonal), 1e-6 * diagonal))
    L, info = torch.linalg.cholesky_ex(A)
    new = torch.cholesky_solve(b.unsqueeze(-1), L).squeeze(-1)
    new = torch.where(idle | (info != 0)[:, None] | ~torch.isfinite(new), scale, new)
    before = proxy_loss(levels * spread(scale, g, K), T, H)
    after = proxy_loss(levels * spread(new, g, K), T, H)
    return torch.where((after < before)[:, None], new, scale)
