"""QuantLinear: a drop-in for nn.Linear whose weight stays packed; FlatLinear: for the one that stays 16-bit."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from bitwright.kernels.dispatch import Choice, prepare
from bitwright.kernels.problem import PackedWeight
from bitwright.nn.packed import PackedModule
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import Scheme
from bitwright.split import SplitTensor


class QuantLinear(PackedModule):
    """y = x Wᵀ + bias for x [..., K] of any floating dtype; y [..., N] has the dtype of x. Inference only.

    The product is computed in the dtype the weight was prepared for; activations of another are cast.
    """

    def __init__(self, packed: PackedWeight, scheme: Scheme, choice: Choice, bias: Tensor | None = None) -> None:
        super().__init__(packed, scheme, choice)
        self.out_features, self.in_features = packed.shape
        self._dtype = packed.dtype
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_quantized(
        cls,
        qt: QuantizedTensor | SplitTensor,
        scheme: Scheme,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Pack `qt`, which stays as it is, for activations of `dtype`; bias [N] or None.

        The implementation is chosen here, once (`choice`). Raises SchemeError if `qt` is not on the scheme's grid.
        """
        packed, choice = prepare(qt, scheme, dtype, device)
        return cls(packed, scheme, choice, None if bias is None else bias.to(device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        # Runs seven times per block and token: at the size of a small model, every call here is felt.
        flat = x.reshape(-1, self.in_features)
        if flat.dtype is not self._dtype:
            flat = flat.to(self._dtype)
        y = self.packed.linear(flat if flat.is_contiguous() else flat.contiguous(), self.bias)
        if y.dtype is not x.dtype:
            y = y.to(x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        bias = "" if self.bias is not None else ", bias=False"
        return f"{self.in_features}, {self.out_features}{bias}, {self.scheme}, {self.choice.name}"


class FlatLinear(nn.Linear):
    """The same nn.Linear, its input flattened to [M, K] first; for the 16-bit output head of a packed model.

    For the last token of a prompt transformers slices [1, T, K] down to [1, 1, K] with the strides of the whole, and
    torch then copies a bfloat16 weight into another layout at every call (torch 2.13, 49152 × 576: 94 ms and 57 MB
    against 4 ms and none).
    """

    @classmethod
    def adopt(cls, linear: nn.Linear) -> Self:
        """A module over the same parameters, tied or not."""
        module = cls.__new__(cls)
        module.__dict__.update(linear.__dict__)
        return module

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] -> [..., N]."""
        y = nn.functional.linear(input.reshape(-1, self.in_features), self.weight, self.bias)
        return y.view(*input.shape[:-1], self.out_features)
