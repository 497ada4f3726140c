"""A packed weight whose columns lie in another order than the inputs: one permutation in front of any implementation.

Kernels want groups to be neighbours. A weight quantized in activation order has them scattered over the inputs, so its
columns are stored by group, and it is the activations that are put into that order, by one gather per call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.kernels.problem import PackedWeight


class Permuted(PackedWeight):
    """`inner` with inputs permuted: its column j is input order[j]; order int64 [K] on the device of `inner`."""

    def __init__(self, inner: PackedWeight, order: Tensor) -> None:
        self.shape, self.dtype = inner.shape, inner.dtype
        self.inner = inner
        self._order, self._inverse = order, order.argsort()

    def __call__(self, x: Tensor) -> Tensor:
        return self.inner(x.index_select(1, self._order))

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.inner.linear(x.index_select(1, self._order), bias)

    def rows(self, index: Tensor) -> Tensor:
        return self.inner.rows(index).index_select(1, self._inverse)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.inner.dequantize(dtype).index_select(1, self._inverse)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.inner.tensors, self._order, self._inverse)
