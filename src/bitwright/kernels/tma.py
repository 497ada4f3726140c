"""Operands as Hopper's asynchronous copies (TMA) take them."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

_BYTES = 16  # what addresses and rows are multiples of


def aligned(operand: Tensor) -> Tensor:
    """The operand, contiguous as it was given, at an address that TMA takes."""
    return operand.clone() if operand.data_ptr() % _BYTES else operand


def rows(x: Tensor) -> Tensor:
    """x [M, K] at such an address and with such rows: [M, K'], zeros beyond K."""
    more = -x.shape[1] % (_BYTES // x.element_size())
    return pad(x, (0, more)) if more else aligned(x)
