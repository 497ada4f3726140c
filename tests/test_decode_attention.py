"""How attention of one token is cut, and where it is taken; what it gives is in test_kernels_emulated and tests/gpu."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.kernels.nvrtc.decode_attention import Config, choose, suits, takes

SHARED_MEMORY = 227 << 10


def chosen(batch: int, heads: int, kv_heads: int, capacity: int = 544, head_dim: int = 128) -> Config:
    return choose(batch, heads, kv_heads, head_dim, capacity, torch.bfloat16, 132)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "splits"),
    [(32, 32, {1: 8, 4: 2, 16: 1}), (32, 8, {1: 8, 4: 4, 16: 1}), (64, 8, {1: 8, 4: 2, 16: 1})],
)
def test_splits_are_those_of_the_timings(heads: int, kv_heads: int, splits: dict[int, int]) -> None:
    assert {batch: chosen(batch, heads, kv_heads).SPLITS for batch in splits} == splits


def test_stages_are_deep_where_blocks_are_few() -> None:
    assert chosen(1, 32, 8).STAGES > chosen(1, 32, 32).STAGES == chosen(16, 32, 8).STAGES


def test_long_caches_of_shared_keys_are_for_the_other_kernel() -> None:
    def at(batch: int, heads: int, kv_heads: int, capacity: int) -> bool:
        return suits(chosen(batch, heads, kv_heads, capacity), capacity)

    assert at(1, 32, 8, 544) and at(1, 32, 8, 2080) and at(1, 64, 8, 2080) and at(4, 64, 8, 544)
    assert not at(1, 32, 8, 8224) and not at(16, 32, 8, 544) and not at(4, 64, 8, 2080)
    assert at(16, 32, 32, 2080) and at(1, 32, 32, 8224), "keys that nothing shares are read as fast by both"


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 300), kv_heads=st.integers(1, 64), group=st.integers(1, 8), capacity=st.integers(1, 20000),
    head_dim=st.sampled_from([64, 128]),
)  # fmt: skip
def test_every_choice_fits(batch: int, kv_heads: int, group: int, capacity: int, head_dim: int) -> None:
    assert takes(group * kv_heads, kv_heads, head_dim)
    c = chosen(batch, group * kv_heads, kv_heads, capacity, head_dim)
    assert c.SPLITS in (1, 2, 4, 8) and group <= 4 * c.TEAMS and c.shared <= SHARED_MEMORY
    assert c.SPLITS == 1 or capacity > 64 * (c.SPLITS // 2), "every block has keys"
