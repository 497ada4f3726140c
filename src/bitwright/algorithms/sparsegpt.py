"""SparseGPT's 2:4 pruning inside the column sweep, alone or together with a grid (arXiv 2301.00774, section 3).

At every fourth column of the sweep each row gives up two of the four weights that come next: those whose loss costs
least, w_j^2 / U_jj^2 with U the upper Cholesky factor of the inverse Hessian (equation 5, in the order of the sweep).
What they leave behind is fed forward like any other error. Groups of four are neighbours *in the order of the sweep*,
so a matrix has to be stored in that order, or swept in the order in which it is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bitwright.algorithms.sweep import Project

GROUP = 4
KEPT = 2


def kept_of_four(Wt: Tensor, diagonal: Tensor) -> Tensor:
    """Which weights stay: bool like Wt [4, N], two per column of it. diagonal [4]: U_jj of the four."""
    cost = (Wt / diagonal[:, None]).square()
    # Stable, so that ties (rows of zeros) fall the same way everywhere: the later two of equals are pruned.
    order = torch.argsort(cost, dim=0, descending=True, stable=True)
    kept = torch.zeros_like(Wt, dtype=torch.bool)
    return kept.scatter_(0, order[:KEPT], True)


def pruning(project: Callable[[int, Tensor], Tensor], U: Tensor, columns: int) -> tuple[Project, Sequence[int]]:
    """A projection for `column_sweep` that prunes the first `columns` columns 2:4 and hands what stays to `project`,
    and the `starts` that the sweep needs with it.

    columns is a multiple of 4; the columns from there on go to `project` unpruned. U [K, K] as in the sweep.
    """
    diagonal = U.diagonal()
    current: list[Tensor] = []

    def pruned(j: int, Wt: Tensor) -> Tensor:
        if j >= columns:
            return project(j, Wt)
        i = j % GROUP
        if i == 0:
            current[:] = [kept_of_four(Wt[j : j + GROUP], diagonal[j : j + GROUP])]
        return torch.where(current[0][i], project(j, Wt), 0.0)

    return pruned, [*range(0, columns, GROUP), *range(columns, U.shape[0])]
