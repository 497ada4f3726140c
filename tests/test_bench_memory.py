"""Bytes: computed ones are those that are made, parts add up, and the largest batch is the largest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bitwright.bench import memory
from bitwright.bench.shapes import ModelShape, models
from bitwright.errors import BitwrightError
from bitwright.kernels import fragments
from bitwright.scheme import Scheme

SCHEMES = ["w4a16-g64", "w3a16-g32-asym", "w2a16", "w8a16-g128"]
SPLIT = ["w8a8", "w4a4-o24", "w4a8-o16-rot", "w8a8-24", "w4a16-o16", "w3a16-g64-o8", "w16a16-24"]
# Widths that are no multiple of a block, so that padding counts.
ODD = ModelShape("odd", hidden=200, intermediate=332, heads=5, kv_heads=1, head_dim=40, layers=3, vocab=100, context=64)
MIXTURE = replace(ODD, name="mixture", experts=4, top_k=2)


@pytest.fixture()
def odd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "models", lambda name: {"odd": ODD, "mixture": MIXTURE}[name])


def run(**changes: Any) -> list[dict[str, Any]]:
    return memory.run(memory.Options(**{"models": ("odd",), "device": "cpu"} | changes))


@pytest.mark.parametrize("scheme", [*SCHEMES, *SPLIT])
@pytest.mark.parametrize("model", ["odd", "mixture"])
def test_computed_bytes_are_those_that_are_made(odd: None, model: str, scheme: str) -> None:
    (record,) = run(models=(model,), schemes=(scheme,))
    assert record["status"] == "ok", record["reason"]
    assert record["weights_bytes"] == 3 * record["layer_bytes_made"]
    parsed = Scheme.parse(scheme)
    bits = parsed.weight.bits
    # Of 2:4 codes half are held, and where they stood: one bit of a weight.
    assert record["bits_per_weight"] > (bits / 2 + 1 if parsed.sparse and parsed.activation_bits < 16 else bits)


def test_a_layer_that_takes_more_is_wrong(odd: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fragments.random

    def fat(*args: Any) -> fragments.Fragments:
        made = right(*args)
        return replace(made, words=(*made.words, torch.zeros(1, dtype=torch.int32)))

    monkeypatch.setattr(fragments, "random", fat)
    (record,) = run(schemes=("w4a16-g64",))
    assert record["status"] == "wrong" and "a layer takes" in record["reason"]
    assert run(schemes=("w4a16-g64",), check=False)[0]["status"] == "ok"


def test_a_layer_that_cannot_be_made_has_failed(odd: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> fragments.Fragments:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fragments, "random", full)
    (record,) = run(schemes=("w4a16-g64",))
    assert record["status"] == "failed" and "out of memory" in record["reason"]


def test_parts_add_up() -> None:
    shape = models("llama-2-7b")
    used = memory.use(shape, None, 4, 1000)
    assert used.weights + used.other == 2 * shape.parameters
    assert used.cache == 2 * 2 * 32 * 4096 * 4 * 1000
    assert used.total == used.weights + used.other + used.cache + used.workspace
    packed = memory.use(shape, Scheme.parse("w4a16-g128"), 4, 1000)
    assert packed.weights == shape.linear_weights * 4.125 / 8  # nothing in this model needs padding
    assert (packed.other, packed.cache, packed.workspace) == (used.other, used.cache, used.workspace)


@pytest.mark.parametrize("budget", [10_000_000_000, 24_000_000_000, 80_000_000_000])
def test_the_largest_batch_fits_and_one_more_does_not(budget: int) -> None:
    shape, scheme = models("llama-2-13b"), Scheme.parse("w4a16-g128")
    batch = memory.largest_batch(shape, scheme, 2048, budget)
    assert batch > 0
    assert memory.use(shape, scheme, batch, 2048).total <= budget < memory.use(shape, scheme, batch + 1, 2048).total


def test_a_model_that_does_not_fit_has_no_batch() -> None:
    assert memory.largest_batch(models("opt-175b"), None, 2048, 80_000_000_000) == 0


def test_the_unquantized_model_is_sixteen_bits(odd: None) -> None:
    dense, packed = run(schemes=("16-bit", "w4a16-g64"), memory=10_000_000)
    assert (dense["bits_per_weight"], dense["bits_per_parameter"]) == (16, 16)
    assert packed["largest_batch"] > dense["largest_batch"] > 0 and packed["memory_bytes"] == 10_000_000
    assert memory.table([dense, packed]).row_count == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"batch": 0}, "batch 0"), ({"context": -1}, "context -1"), ({"dtype": "float32"}, "float32")],
)
def test_bad_options_are_one_error(odd: None, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BitwrightError, match=said):
        run(**changes)
