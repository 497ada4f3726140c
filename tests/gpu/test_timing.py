"""Tests that time something, and so need the GPU for themselves."""

from __future__ import annotations

import pytest
import torch

from bitwright.bench import timing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_twice_the_bytes_take_twice_as_long() -> None:
    # Far beyond the cache, where time is bytes.
    small, large = (torch.zeros(n, dtype=torch.uint8, device="cuda") for n in (1 << 28, 1 << 29))
    found = timing.interleaved({"small": [lambda: small.add_(1)], "large": [lambda: large.add_(1)]}, 10)
    assert found["large"].seconds / found["small"].seconds == pytest.approx(2, rel=0.1)
    assert found["small"].low <= found["small"].seconds <= found["small"].high


def test_ceilings_are_those_of_a_gpu() -> None:
    found = timing.measure_ceilings("cuda", torch.bfloat16)
    if torch.cuda.get_device_capability() == (9, 0):
        assert 1e12 < found.copy_bytes_per_second < 6e12 and 1e12 < found.read_bytes_per_second < 6e12
        assert 3e14 < found.flops_per_second < 1.1e15
    else:
        assert 1e11 < found.bytes_per_second < 1e13
        assert 1e13 < found.flops_per_second < 3e15
