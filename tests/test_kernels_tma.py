"""Operands as TMA takes them."""

from __future__ import annotations

import pytest
import torch

from bitwright.kernels import tma


def test_an_address_between_sixteens_is_left() -> None:
    held = torch.arange(65, dtype=torch.bfloat16)
    assert tma.aligned(held).data_ptr() == held.data_ptr()
    moved = tma.aligned(held[1:])
    assert moved.data_ptr() % 16 == 0 and torch.equal(moved, held[1:])


@pytest.mark.parametrize(
    ("dtype", "K", "padded"), [(torch.bfloat16, 64, 64), (torch.float16, 61, 64), (torch.int8, 17, 32)]
)
def test_rows_begin_at_sixteens(dtype: torch.dtype, K: int, padded: int) -> None:
    x = torch.randint(-9, 9, (3, K)).to(dtype)
    y = tma.rows(x)
    assert tuple(y.shape) == (3, padded) and y.is_contiguous() and y.data_ptr() % 16 == 0
    assert torch.equal(y[:, :K], x) and not y[:, K:].any()
    assert padded > K or y.data_ptr() == x.data_ptr()
