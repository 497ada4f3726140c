"""What modules over a packed weight share: it is no parameter, it stays where it was prepared, it is not saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import BitwrightError, OutputError
from bitwright.kernels.dispatch import Choice
from bitwright.kernels.problem import PackedWeight
from bitwright.scheme import Scheme


class PackedModule(nn.Module):
    """A module around one `PackedWeight`; `scheme` is its grid, `choice` the implementation with its reason.

    The packed tensors are neither parameters nor buffers: their layout belongs to one machine, so casts pass them by
    (`model.float()` changes the activations, not the weight), and moving or saving them is an error that says so.
    """

    def __init__(self, packed: PackedWeight, scheme: Scheme, choice: Choice) -> None:
        super().__init__()
        self.packed = packed
        self.scheme = scheme
        self.choice = choice

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight."""
        return self.packed.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K]."""
        return self.packed.dequantize(dtype)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Any:
        here = self.packed.device
        there = fn(torch.empty(0, device=here)).device
        if there != here:
            raise BitwrightError(
                f"packed weights were prepared for {here} and cannot move to {there}; load with device='{there}'"
            )
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        raise OutputError(
            f"{prefix.rstrip('.') or type(self).__name__}: packed weights are laid out for this machine and are not "
            "saved; copy the folder they were loaded from, or save a model from load(..., packed=False)"
        )
