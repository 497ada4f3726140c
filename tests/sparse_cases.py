"""2:4 codes for tests of the sparse kernel."""

from __future__ import annotations

from typing import Any

import torch
from gpu import int8_cases
from gpu.int8_cases import Case
from torch import Tensor
from torch.nn.functional import pad

from bitwright.kernels import int8_fragments, sparse_fragments


def pruned(codes: Tensor, seed: int = 0) -> Tensor:
    """codes int8 [N, B] with two of every aligned four columns set to 0; of the last few, at most two stay."""
    N, B = codes.shape
    groups = pad(codes, (0, -B % 4)).view(N, -(-B // 4), 4)
    ranks = torch.rand(groups.shape, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return torch.where(ranks < 2, groups, 0).flatten(1)[:, :B].contiguous()


def operands(case: Case, seed: int = 0) -> tuple[Any, ...]:
    """Arguments of `int8_sparse_linear` on the CPU: those of `int8_linear`, the weight pruned."""
    given = list(int8_cases.operands(case, seed))
    held = given[4]
    dense = int8_fragments.unpack(held, case.N, case.B) if case.bits == 4 else held[:, : case.B]
    codes = pruned(dense, seed)
    given[4], given[6] = sparse_fragments.pack(codes, case.bits), codes.sum(1, dtype=torch.int32)
    return tuple(given)
