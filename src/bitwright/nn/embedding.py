"""QuantEmbedding: rows of a packed weight, unpacked as they are looked up."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from bitwright.kernels.dispatch import Choice, prepare
from bitwright.kernels.problem import PackedWeight
from bitwright.nn.packed import PackedModule
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import Scheme


class QuantEmbedding(PackedModule):
    """A drop-in for nn.Embedding. A tied output head is a QuantLinear over the same `packed` object, so that the
    matrix is held once."""

    def __init__(self, packed: PackedWeight, scheme: Scheme, choice: Choice) -> None:
        super().__init__(packed, scheme, choice)
        self.num_embeddings, self.embedding_dim = packed.shape

    @classmethod
    def from_quantized(
        cls,
        qt: QuantizedTensor,
        scheme: Scheme,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Pack `qt` [num_embeddings, embedding_dim]; looked-up rows have `dtype`."""
        packed, choice = prepare(qt, scheme, dtype, device)
        return cls(packed, scheme, choice)

    def forward(self, index: Tensor) -> Tensor:
        """index [...] of integers -> [..., embedding_dim]."""
        return self.packed.rows(index.reshape(-1)).view(*index.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.scheme}, {self.choice.name}"
