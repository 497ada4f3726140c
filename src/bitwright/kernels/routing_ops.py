"""The operator that sorts tokens by expert for grouped products, declared like those of `ops`.

Torch needs about eight launches for it, and each of them costs a decoding step more than the work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.kernels.ops import define

_FEW = 1024  # choices that one launch compares with each other

Sorted = tuple[Tensor, Tensor, Tensor]


def _sort(index: Tensor, experts: int) -> Sorted:
    flat = index.reshape(-1)
    expert, order = flat.sort(stable=True)
    bounds = torch.arange(experts + 1, dtype=flat.dtype, device=flat.device)
    offsets = torch.searchsorted(expert, bounds, out_int32=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=flat.device))
    return offsets, order // index.shape[1], places


def _cuda_sort(index: Tensor, experts: int) -> Sorted:
    if 0 < index.numel() <= _FEW:
        from bitwright.kernels.triton.routing import sort

        return sort(index.contiguous(), experts)
    return _sort(index, experts)


def _fake_sort(index: Tensor, experts: int) -> Sorted:
    count = index.shape[0] * index.shape[1]
    long = index.new_empty(count, dtype=torch.int64)
    return index.new_empty(experts + 1, dtype=torch.int32), long, torch.empty_like(long)


# index integer [M, k], the experts of each token (num_experts or more: none) -> offsets int32 [num_experts + 1], tokens
# int64 [M k], places int64 [M k]: choices sorted by expert, equal ones as they stand. Those of expert e are rows
# offsets[e] to offsets[e + 1] - 1, row r is of token tokens[r], and choice j of token m became row places[m k + j].
sort_by_expert = define(
    "sort_by_expert", "(Tensor index, int num_experts) -> (Tensor, Tensor, Tensor)", _sort, _cuda_sort, _fake_sort
)
