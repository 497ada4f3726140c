"""QuantizedTensor: integer codes with their scales, the one value that algorithms return and formats store."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.errors import FormatError
from bitwright.scheme import WeightScheme


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight [N, K] on an integer grid, unpacked.

    Formula, for group i = k // group_size (one group per row if group_size is None)::

        w[n, k] = (codes[n, k] - zero_point[n, i]) * scale[n, i]

    codes: int8 [N, K], signed, in [-2^(bits-1), 2^(bits-1) - 1].
    scale: floating [N, G], G = ceil(K / group_size); may be negative (a symmetric grid has one level more on one
        side, and the sign of the scale chooses which). Held in the 16-bit dtype it is stored in.
    zero_point: int8 [N, G] in the range of codes, or None for a symmetric grid.
    order: int64 [K], a permutation, or None. With it column j of codes belongs to input order[j], and groups are made
        of neighbours in codes::

            w[n, order[j]] = (codes[n, j] - zero_point[n, i]) * scale[n, i],  i = j // group_size

        Checkpoints quantized elsewhere in activation order have one (`g_idx` on disk); bitwright makes none.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: WeightScheme
    order: Tensor | None = None

    def __post_init__(self) -> None:
        N, K = self.codes.shape
        grid = (N, self.scheme.num_groups(K))
        if self.codes.dtype != torch.int8:
            raise FormatError(f"codes must be int8, not {self.codes.dtype}")
        if tuple(self.scale.shape) != grid:
            raise FormatError(
                f"scale has shape {tuple(self.scale.shape)}; a [{N}, {K}] weight at {self.scheme} needs {grid}"
            )
        if (self.zero_point is None) != self.scheme.symmetric:
            raise FormatError(f"zero_point must be {'absent' if self.scheme.symmetric else 'present'} at {self.scheme}")
        if self.zero_point is not None and (
            self.zero_point.dtype != torch.int8 or tuple(self.zero_point.shape) != grid
        ):
            raise FormatError(
                f"zero_point must be int8 {grid}, not {self.zero_point.dtype} {tuple(self.zero_point.shape)}"
            )

        if self.order is not None and not _is_permutation(self.order, K):
            raise FormatError(
                f"order must be a permutation of 0 .. {K - 1}, int64 [{K}]; "
                f"it is {self.order.dtype} {tuple(self.order.shape)}, or repeats an entry"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and zero points included."""
        return self.scheme.bits_per_weight(self.codes.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K]: the product is formed in float32 and rounded once to `dtype`."""
        K = self.codes.shape[1]
        g = self.scheme.group_size or K
        values = self.codes.to(torch.float32)
        if self.zero_point is not None:
            values = values - spread(self.zero_point.to(torch.float32), g, K)
        weight = (values * spread(self.scale.to(torch.float32), g, K)).to(dtype)
        return weight if self.order is None else torch.empty_like(weight).index_copy_(1, self.order, weight)


def _is_permutation(order: Tensor, K: int) -> bool:
    if order.dtype != torch.int64 or tuple(order.shape) != (K,):
        return False
    return torch.equal(order.sort().values, torch.arange(K, device=order.device))


def spread(per_group: Tensor, group_size: int, K: int) -> Tensor:
    """[N, G] values per group repeated to [N, K]; the last group may be ragged."""
    if per_group.shape[1] == 1:
        return per_group.expand(-1, K)
    return per_group.repeat_interleave(group_size, dim=1)[:, :K]
