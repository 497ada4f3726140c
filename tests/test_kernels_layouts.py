"""Kernel layouts: every one has an inverse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.kernels import layouts


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from([2, 3, 4, 8]), rows=st.integers(0, 5), columns=st.integers(1, 70), seed=st.integers(0, 99))
def test_planes_round_trip(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed))
    codes = codes.to(torch.uint8)
    packed = layouts.pack_planes(codes, bits)
    assert torch.equal(layouts.unpack_planes(packed, bits, columns), codes)
    assert packed.nbytes <= rows * (columns * bits / 8 + 4)  # nothing but the last word of a row is wasted


@pytest.mark.skipif(layouts.int4_block() is None, reason="this build packs 4-bit weights in an unknown order")
@settings(max_examples=20, deadline=None)
@given(blocks=st.integers(1, 3), columns=st.sampled_from([32, 64, 160]), seed=st.integers(0, 99))
def test_int4_blocks_round_trip(blocks: int, columns: int, seed: int) -> None:
    rows = blocks * layouts.INT4_ROWS
    codes = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = layouts.pack_int4(codes, layouts.int4_block())
    assert packed.nbytes * 2 == codes.nbytes
    assert torch.equal(layouts.unpack_int4(packed).t(), codes)
    index = torch.tensor([rows - 1, 0, 37, 37])
    assert torch.equal(layouts.gather_int4(packed, index), codes[index])


def test_int4_packing_in_pieces_is_packing_at_once() -> None:
    """A wide matrix goes through the operator a few rows at a time."""
    codes = torch.randint(0, 16, (192, 1 << 16), dtype=torch.uint8)
    at_once = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    assert torch.equal(layouts.pack_int4(codes, layouts.int4_block() or 64).view(192, -1), at_once)
