"""The one column sweep behind GPTQ (and every method that rounds column by column and feeds the error forward).

For column j in order: q = project(w_j); e = (w_j - q) / U_jj; W[:, j+1:] -= e (outer) U[j, j+1:].
Updates inside a block of `block_size` columns are immediate; later columns get one matmul per block.
Source: GPTQ (arXiv 2210.17323), equations 2-4 and section 3.3 (lazy batch updates).

The weight is held transposed [K, N]: a column is then contiguous, and its update is a rank-one BLAS call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Project = Callable[[int, Tensor], Tensor]


def column_sweep(
    W: Tensor, U: Tensor, project: Project, *, block_size: int = 128, starts: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Sweep over the columns of W [N, K] fp32 (already in sweep order); U [K, K] upper.

    project(j, Wt) returns the value [N] that column j takes; Wt [K, N] holds the current weights. When `starts` (sorted
    columns at which a group begins) is given, every column of a group is up to date when project is called for the
    group's first column, whatever the block size.

    Returns Q [N, K] fp32 and the proxy loss per row [N], sum of e^2.
    """
    N, K = W.shape
    Wt = W.T.contiguous()
    Q = torch.empty_like(Wt)
    loss = torch.zeros(N, device=W.device)
    for begin, end in _blocks(K, block_size, starts):
        errors = torch.empty(end - begin, N, device=W.device)
        local = U[begin:end, begin:end]
        inverse = (1.0 / local.diagonal()).tolist()
        for j in range(begin, end):
            i = j - begin
            q = project(j, Wt)
            Q[j] = q
            e = torch.sub(Wt[j], q, out=errors[i]).mul_(inverse[i])
            if j + 1 < end:
                Wt[j + 1 : end].addr_(local[i, i + 1 :], e, alpha=-1.0)
        loss += errors.square().sum(0)
        if end < K:
            Wt[end:].addmm_(U[begin:end, end:].T, errors, alpha=-1.0)
    return Q.T.contiguous(), loss


def _blocks(K: int, block_size: int, starts: Sequence[int] | None) -> list[tuple[int, int]]:
    """Consecutive [begin, end) covering K. With group starts, a block holds whole groups or lies inside one group."""
    if not starts:
        return [(b, min(K, b + block_size)) for b in range(0, K, block_size)]
    blocks: list[tuple[int, int]] = []
    begin = 0
    for first, last in zip(starts, [*starts[1:], K], strict=True):
        if last - begin <= block_size:
            continue
        if first > begin:
            blocks.append((begin, first))
            begin = first
        while last - begin > block_size:
            blocks.append((begin, begin + block_size))
            begin += block_size
        if begin < last and begin > first:
            blocks.append((begin, last))
            begin = last
    if begin < K:
        blocks.append((begin, K))
    return blocks
