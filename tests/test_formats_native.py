"""The native format: everything comes back, and a config selects exactly what it was written for."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.errors import FormatError
from bitwright.formats import native
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import Scheme

SCHEMES = ["w2a16-g16", "w3a16-g24-asym", "w4a16-g16", "w4a16-g40-asym", "w8a16", "w8a16-asym", "w8a8"]


def random_qtensor(N: int, K: int, scheme: Scheme, seed: int) -> QuantizedTensor:
    generator, w = torch.Generator().manual_seed(seed), scheme.weight
    grid = (N, w.num_groups(K))

    def integers(shape: tuple[int, int]) -> torch.Tensor:
        return torch.randint(w.qmin, w.qmax + 1, shape, generator=generator).to(torch.int8)

    scale = torch.randn(grid, generator=generator).to(torch.bfloat16)
    return QuantizedTensor(integers((N, K)), scale, None if w.symmetric else integers(grid), w)


@given(text=st.sampled_from(SCHEMES), N=st.integers(1, 40), K=st.integers(1, 90), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_tensors_come_back_ragged_groups_included(text: str, N: int, K: int, seed: int) -> None:
    scheme = Scheme.parse(text)
    qt = random_qtensor(N, K, scheme, seed)
    tensors = native.pack(qt, scheme)
    assert all(tensor.is_contiguous() for tensor in tensors.values())  # safetensors stores no strides
    back = native.unpack(tensors, scheme)
    assert torch.equal(back.codes, qt.codes) and torch.equal(back.scale, qt.scale) and back.scheme == qt.scheme
    assert (back.zero_point is None) == (qt.zero_point is None)
    assert qt.zero_point is None or torch.equal(back.zero_point, qt.zero_point)


@pytest.mark.parametrize("text", ["w4a16-g64", "w3a16-g64", "w4a16-g64-asym", "w8a16"])
def test_stored_bytes_are_the_stated_bits_per_weight(text: str) -> None:
    scheme = Scheme.parse(text)
    qt = random_qtensor(32, 640, scheme, 0)
    stored = sum(t.numel() * t.element_size() for key, t in native.pack(qt, scheme).items() if key != "weight_shape")
    assert stored * 8 == qt.bits_per_weight * 32 * 640


def test_malformed_tensors_are_named() -> None:
    scheme = Scheme.parse("w4a16-g16")
    tensors = native.pack(random_qtensor(4, 40, scheme, 0), scheme)
    with pytest.raises(FormatError, match=r"blk\.up\.weight_scale.*\(4, 2\).*\(4, 3\)"):
        native.unpack(tensors | {"weight_scale": torch.zeros(4, 2, dtype=torch.float16)}, scheme, "blk.up")
    with pytest.raises(FormatError, match=r"blk\.up\.weight_packed is missing"):
        native.unpack({k: v for k, v in tensors.items() if k != "weight_packed"}, scheme, "blk.up")
    with pytest.raises(FormatError, match="w4a16-g16, but the config would say w8a8"):
        native.pack(random_qtensor(4, 40, scheme, 0), Scheme.parse("w8a8"))


NAMES = [f"m.layers.{i}.attn.{p}" for i in range(4) for p in ("q", "k", "v", "q_extra")]
NAMES += [f"m.layers.{i}.experts.{e}.{p}" for i in range(4) for e in range(3) for p in ("up", "down")]
NAMES += [f"m.layers.{i}.gate" for i in range(4)] + ["lm_head", "m.embed", "m.layers.10.attn.q", "xm.layers.1.attn.q"]


@given(st.lists(st.sampled_from([None, *SCHEMES[:3]]), min_size=len(NAMES), max_size=len(NAMES)))
@settings(max_examples=40, deadline=None)
def test_any_assignment_survives_the_config(assigned: list[str | None]) -> None:
    schemes = {name: Scheme.parse(text) for name, text in zip(NAMES, assigned, strict=True) if text}
    check(schemes)


@given(st.lists(st.sampled_from([None, *SCHEMES[:2]]), min_size=7, max_size=7))
@settings(max_examples=40, deadline=None)
def test_assignments_by_kind_survive_the_config(by_kind: list[str | None]) -> None:
    """Uniform kinds exercise the patterns, as random assignments exercise the exact names."""
    kinds = dict(zip(("q", "k", "v", "up", "down", "gate", "lm_head"), by_kind, strict=True))
    check({n: Scheme.parse(text) for n in NAMES if (text := kinds.get(n.split(".")[-1]))})


def check(schemes: dict[str, Scheme]) -> None:
    if not schemes:
        return
    config = native.write_config(schemes, [n for n in NAMES if n not in schemes], {})
    assert native.read_config(json.loads(json.dumps(config)), NAMES) == schemes


def test_the_config_is_compact() -> None:
    schemes = {n: Scheme.parse("w8a16" if "experts" in n else "w4a16-g16") for n in NAMES if "layers" in n}
    config = native.write_config(schemes, ["lm_head", "m.embed"], {})
    assert config["schemes"]["w8a16"] == [r"re:m\.layers\.\d+\.experts\.\d+\.[^.]+$"]
    assert len(config["schemes"]["w4a16-g16"]) == 6  # q, k, v, q_extra, gate, and the one name under another root


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version 2.*update"),
        ({"format_version": None}, "format_version None"),
        ({"schemes": {}}, "no schemes"),
        ({"schemes": {"w9a16": ["a"]}}, "9"),
        ({"schemes": {"w4a16": ["a"], "w8a16": ["re:a$"]}}, "a is listed under several schemes.*w4a16, w8a16"),
    ],
)
def test_damaged_configs_are_refused(change: dict[str, object], message: str) -> None:
    config = native.write_config({"a": Scheme.parse("w4a16")}, [], {}) | change
    with pytest.raises(FormatError, match=message):
        native.read_config(config, ["a"])
