"""How many blocks, GPUs and sequences a benchmark takes, and the bytes that decide it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bitwright.bench import decode, fitting
from bitwright.bench.correctness import tiny
from bitwright.bench.fitting import Depth, choose_depth, fewest_gpus, largest_batch, rank_shape
from bitwright.bench.shapes import models
from bitwright.errors import BitwrightError
from bitwright.scheme import Scheme

BF16 = torch.bfloat16
CPU = torch.device("cpu")
LLAMA = models("llama-3-8b")


def test_depths() -> None:
    assert choose_depth(32, 100_000_000, None, True) == Depth(None, 32, 32)
    assert choose_depth(32, 100_000_000, None, False) == Depth(2, 6, 32)
    assert choose_depth(96, 900_000_000, None, False) == Depth(1, 3, 96)
    assert choose_depth(32, 100_000_000, 2, True) == Depth(1, 2, 32)
    assert choose_depth(2, 100_000_000, 2, False) == Depth(None, 2, 2)
    with pytest.raises(BitwrightError, match="1 layers"):
        choose_depth(32, 100_000_000, 1, True)
    two = Depth(2, 6, 32)  # 3 beside the blocks, 0.5 each
    assert two.total({2: 4.0, 6: 6.0}) == 19.0 and two.block({2: 4.0, 6: 6.0}) == 0.5
    assert Depth(None, 4, 4).total({4: 8.0}) == 8.0


def test_models_become_whole_while_there_is_room() -> None:
    sizes = {"small": 100_000_000, "large": 400_000_000}
    certain = 6 * 100_000_000 + 3 * 400_000_000
    few = {"small": Depth(2, 6, 32), "large": Depth(1, 3, 32)}
    assert fitting.choose_depths(32, sizes, None, 0) == few
    small = certain + 26 * 100_000_000
    assert fitting.choose_depths(32, sizes, None, small - 1) == few
    assert fitting.choose_depths(32, sizes, None, small) == few | {"small": Depth(None, 32, 32)}
    both = fitting.choose_depths(32, sizes, None, small + 29 * 400_000_000)
    assert set(both.values()) == {Depth(None, 32, 32)}
    assert fitting.choose_depths(32, sizes, 2, 1 << 50) == dict.fromkeys(sizes, Depth(1, 2, 32))


def test_only_the_quantized_model_is_whole_where_both_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = replace(tiny(LLAMA), layers=8)
    monkeypatch.setattr(fitting, "_BEYOND_CACHE", 1)
    quantized, dense = (fitting.block_bytes(shape, s, BF16) for s in (Scheme.parse("w4a16-g128"), None))
    room = 8 * quantized + 3 * dense + shape.other_weights * 2 + shape.kv_cache_values(1, 9) * 2
    monkeypatch.setattr(decode, "free_bytes", lambda device: room)
    monkeypatch.setattr(fitting, "total_bytes", lambda device: int(8 * dense))
    options = decode.Options(shape, context=8, tokens=1, device="cpu", repeats=1)
    records = {r["scheme"]: r for r in decode.run(options)}
    assert records["w4a16-g128"]["method"] == "whole model" and records["bfloat16"]["layers_timed"] == 3
    assert (records["w4a16-g128"]["fits_this_gpu"], records["bfloat16"]["fits_this_gpu"]) == (True, False)
    for r in records.values():
        assert r["total_bytes"] == r["weight_bytes"] + r["cache_bytes"]
    shown = decode.table(list(records.values()))
    assert "more than this device holds" in str(shown.caption)
    assert [str(c.header) for c in shown.columns][4:7] == ["ms/token", "±", "ms/block"]


def test_fewest_gpus_divide_heads_and_hold_some_cache() -> None:
    memory = 85_000_000_000
    gpus, rank = fewest_gpus(models("opt-175b"), None, torch.float16, 512, memory)
    assert gpus == 6 and rank.heads == 16 and rank.intermediate == 8192  # five would do, but do not divide 96 heads
    assert fewest_gpus(models("opt-66b"), None, torch.float16, 512, memory)[0] == 2
    assert fewest_gpus(LLAMA, None, BF16, 512, memory)[0] == 1
    assert rank_shape(LLAMA, 3) is None
    wide = rank_shape(LLAMA, 16)
    assert wide is not None and (wide.heads, wide.kv_heads) == (2, 1)
    most = largest_batch(models("opt-66b"), Scheme.parse("w4a16-g128"), BF16, 512, memory)
    each = 2 * 64 * 9216 * 512 * 2
    weights = fitting.model_bytes(models("opt-66b"), Scheme.parse("w4a16-g128"), BF16)
    assert weights + most * each <= memory * 0.94 < weights + (most + 1) * each
    assert 66e9 / 2 < weights < 66e9 * 0.55


def test_bytes_are_those_of_the_kernels() -> None:
    from bitwright.kernels import fragments

    for text in ("w4a16-g128", "w3a16-g64-asym", "w2a16", "w8a16-g128"):
        scheme = Scheme.parse(text)
        made = sum(
            fragments.random(x.N, x.K, scheme.weight.bits, scheme.weight.group_size, scheme.weight.symmetric, BF16, CPU)
            .nbytes
            for x in tiny(LLAMA).linears
        )  # fmt: skip
        assert fitting.block_bytes(tiny(LLAMA), scheme, BF16) == made
