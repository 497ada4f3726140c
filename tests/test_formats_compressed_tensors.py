"""compressed-tensors, tensor by tensor and config by config, against the package of that name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_formats_loading import nearest

from bitwright.errors import FormatError, NumericsError
from bitwright.formats import compressed_tensors as ct
from bitwright.formats import dense
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import Scheme, WeightScheme

pytest.importorskip("compressed_tensors")


def their_scheme(scheme: Scheme) -> Any:
    from compressed_tensors.quantization import QuantizationScheme

    return QuantizationScheme.model_validate(next(iter(config_groups(scheme).values())))


def config_groups(scheme: Scheme) -> dict[str, Any]:
    return ct.write_config({"model.layers.0.up_proj": scheme}, [], {})["config_groups"]


def compressor(scheme: Scheme) -> Any:
    from compressed_tensors.compressors import BaseCompressor

    return BaseCompressor.get_value_from_registry(their_scheme(scheme).format)


ALL = ["w4a16-g32", "w4a16-g32-asym", "w3a16-g64", "w3a16-g32-asym", "w2a16-g32", "w2a16-g32-asym", "w8a16"]


@pytest.mark.parametrize("text", [*ALL, "w8a16-asym", "w8a8", "w4a16"])
@pytest.mark.parametrize("N", [40, 37])
def test_their_compressor_and_ours_write_and_read_the_same(text: str, N: int) -> None:
    scheme = Scheme.parse(text)
    w = torch.randn(N, 192, generator=torch.Generator().manual_seed(N))
    qt = nearest(w, scheme.weight, torch.float32)
    dequantized = qt.dequantize()
    theirs: dict[str, torch.Tensor] = {"weight": dequantized, "weight_scale": qt.scale}
    if qt.zero_point is not None:
        theirs["weight_zero_point"] = qt.zero_point
    theirs = compressor(scheme).compress(theirs, their_scheme(scheme))
    back = ct.unpack(theirs, scheme, "x")
    assert torch.equal(back.codes, qt.codes) and torch.equal(back.scale, qt.scale)
    assert torch.equal(back.dequantize(), dequantized)

    half = QuantizedTensor(qt.codes, qt.scale.to(torch.bfloat16), qt.zero_point, qt.scheme)
    ours = ct.pack(half, scheme)
    assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in theirs.items()} | {
        "weight_scale": torch.bfloat16
    }
    for key in set(ours) - {"weight_scale"}:
        assert torch.equal(ours[key], theirs[key]), key
    read = compressor(scheme).decompress({k: v.clone() for k, v in ours.items()}, their_scheme(scheme))["weight"]
    assert torch.equal(read, half.dequantize(torch.bfloat16))


@pytest.mark.parametrize("symmetric", [True, False])
def test_padded_three_bit_words_of_older_releases_are_read(symmetric: bool) -> None:
    """Before 0.18 a word held ten 3-bit values and two unused bits."""
    scheme = Scheme(WeightScheme(3, 32, symmetric))
    qt = nearest(torch.randn(64, 96, generator=torch.Generator().manual_seed(1)), scheme.weight, torch.float16)

    def padded(codes: torch.Tensor) -> torch.Tensor:
        rows = []
        for row in (codes.int() + 4).tolist():
            row = row + [0] * (-len(row) % 10)
            rows.append([sum(v << (3 * j) for j, v in enumerate(row[i : i + 10])) for i in range(0, len(row), 10)])
        return torch.tensor(rows, dtype=torch.int32)

    tensors = ct.pack(qt, scheme) | {"weight_packed": padded(qt.codes)}
    assert tensors["weight_packed"].shape == (64, 10)
    if qt.zero_point is not None:
        tensors["weight_zero_point"] = padded(qt.zero_point.t()).t()
    back = ct.unpack(tensors, scheme)
    assert torch.equal(back.codes, qt.codes)
    assert symmetric or torch.equal(back.zero_point, qt.zero_point)


def test_documented_bytes() -> None:
    codes = torch.tensor([[-8, -7, -6, -5, -4, -3, -2, -1]], dtype=torch.int8)
    scheme = Scheme.parse("w4a16-g8-asym")
    scale, zero = torch.ones(1, 1, dtype=torch.bfloat16), torch.tensor([[-8]], dtype=torch.int8)
    tensors = ct.pack(QuantizedTensor(codes, scale, zero, scheme.weight), scheme)
    assert tensors["weight_packed"].tolist() == [[0x76543210]]
    assert tensors["weight_zero_point"].tolist() == [[0]]
    assert tensors["weight_shape"].tolist() == [1, 8]
    assert ct.unpack(tensors, scheme).dequantize().tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


def test_per_tensor_scales_of_others_are_read() -> None:
    codes = torch.randint(-128, 128, (5, 16)).to(torch.int8)
    back = ct.unpack({"weight": codes, "weight_scale": torch.tensor([0.5])}, Scheme.parse("w8a8"))
    assert torch.equal(back.dequantize(), codes.float() * 0.5)


# --- refusals


def packed(text: str = "w4a16-g32", N: int = 8, K: int = 64) -> dict[str, torch.Tensor]:
    scheme = Scheme.parse(text)
    return ct.pack(nearest(torch.randn(N, K), scheme.weight, torch.float16), scheme)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_packed": torch.zeros(8, 7, dtype=torch.int32)}, r"blk\.up\.weight_packed.*\(8, 7\).*\(8, 8\)"),
        ({"weight_packed": torch.zeros(8, 8, dtype=torch.int64)}, r"weight_packed is torch\.int64"),
        ({"weight_scale": torch.zeros(8, 1, dtype=torch.float16)}, r"blk\.up\.weight_scale.*\(8, 2\)"),
        ({"weight_shape": torch.tensor([8, -64])}, r"blk\.up\.weight_shape.*positive"),
        ({"weight_g_idx": torch.arange(64) // 16}, r"blk\.up\.weight_g_idx.*groups of 32 inputs, numbered 0 \.\. 1"),
        ({"weight_g_idx": torch.arange(65) // 32}, r"blk\.up\.weight_g_idx.*\(65,\).*for 64 inputs"),
        ({"weight_g_idx": torch.zeros(64)}, r"blk\.up\.weight_g_idx is torch\.float32"),
        ({"weight_shape": None}, r"blk\.up\.weight_shape is missing"),
        ({"weight_packed": None}, r"blk\.up\.weight_packed is missing"),
        ({"weight_packed": None, "weight": torch.zeros(8, 64)}, r"blk\.up\.weight is torch\.float32.*ignore"),
    ],
)
def test_malformed_tensors_are_named(change: dict[str, torch.Tensor | None], message: str) -> None:
    tensors = {k: v for k, v in (packed() | change).items() if v is not None}
    with pytest.raises(FormatError, match=message):
        ct.unpack(tensors, Scheme.parse("w4a16-g32"), "blk.up")


def test_missing_zero_points_are_named() -> None:
    with pytest.raises(FormatError, match="weight_zero_point is missing"):
        ct.unpack(packed(), Scheme.parse("w4a16-g32-asym"))


@pytest.mark.parametrize(
    "g_idx", [torch.arange(64, dtype=torch.int32) // 32, torch.full((64,), -1)], ids=["0, 1", "-1"]
)
def test_trivial_g_idx_is_no_order(g_idx: torch.Tensor) -> None:
    """-1 everywhere is what compressed-tensors leaves where it permuted nothing."""
    qt = ct.unpack(packed() | {"weight_g_idx": g_idx}, Scheme.parse("w4a16-g32"))
    assert qt.shape == (8, 64) and qt.order is None


def test_pack_refuses_what_readers_would_get_wrong() -> None:
    w = torch.randn(4, 80)
    scheme = Scheme.parse("w4a16-g32")
    with pytest.raises(FormatError, match="up: group size 32 does not divide the width 80"):
        ct.pack(nearest(w, scheme.weight, torch.float16), scheme, "up")
    qt = nearest(w[:, :64], scheme.weight, torch.float32)
    with pytest.raises(FormatError, match=r"up\.weight_scale is torch\.float32"):
        ct.pack(qt, scheme, "up")
    infinite = torch.full_like(qt.scale, float("inf")).to(torch.float16)
    with pytest.raises(NumericsError, match=r"up\.weight_scale holds NaN or Inf"):
        ct.pack(QuantizedTensor(qt.codes, infinite, None, scheme.weight), scheme, "up")
    with pytest.raises(FormatError, match="w8a16"):
        ct.pack(qt, Scheme.parse("w8a16"))


def test_pack_leaves_its_argument_alone() -> None:
    scheme = Scheme.parse("w4a16-g32-asym")
    qt = nearest(torch.randn(8, 64), scheme.weight, torch.float16)
    before = qt.codes.clone(), qt.zero_point.clone()
    dense.pack(qt)
    assert torch.equal(qt.codes, before[0]) and torch.equal(qt.zero_point, before[1])


# --- config


def tree(names: list[str]) -> torch.nn.Module:
    """A module tree with a Linear at each name."""
    root = torch.nn.Module()
    for name in names:
        parent = root
        *path, leaf = name.split(".")
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, torch.nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(leaf, torch.nn.Linear(64, 64, bias=False))
    return root


NAMES = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(12) for p in "qkvo"]
NAMES += [f"model.layers.{i}.mlp.experts.{e}.{w}" for i in range(12) for e in range(3) for w in ("w1", "w2", "w3")]
NAMES += [f"model.layers.{i}.mlp.gate" for i in range(12)] + ["lm_head"]
ROUTERS = [n for n in NAMES if n.endswith("gate")]


def uniform(name: str) -> str | None:
    return None if name.endswith(("gate", "head")) else "w4a16-g64"


def by_kind(name: str) -> str | None:
    return None if name.endswith("gate") else "w8a8" if "attn" in name else "w8a16" if name == "lm_head" else "w3a16"


def by_layer(name: str) -> str | None:
    if name.endswith(("gate", "head")) or "layers.7." in name:
        return None
    if "layers.1." in name or "layers.10." in name:
        return "w8a16"
    return "w4a16-g32-asym" if "o_proj" in name else "w4a16-g32"


def by_expert(name: str) -> str | None:
    return None if name.endswith("gate") else "w8a16" if "experts.2." in name or "layers.3." in name else "w4a16-g32"


@pytest.mark.parametrize("assign", [uniform, by_kind, by_layer, by_expert])
def test_the_package_and_our_reader_see_the_same_schemes(assign: Callable[[str], str | None]) -> None:
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    schemes = {n: Scheme.parse(text) for n in NAMES if (text := assign(n))}
    config = ct.write_config(schemes, [n for n in NAMES if n not in schemes], {})
    assert ct.read_config(json.loads(json.dumps(config)), NAMES) == schemes
    model = tree(NAMES)
    apply_quantization_config(model, QuantizationConfig.model_validate(config), show_progress=False)
    for name in NAMES:
        theirs = getattr(model.get_submodule(name), "quantization_scheme", None)
        assert (theirs is None) == (name not in schemes), name
        if theirs is not None:
            w = schemes[name].weight
            found = (theirs.weights.num_bits, theirs.weights.group_size, theirs.weights.symmetric)
            assert found == (w.bits, w.group_size, w.symmetric), name
            assert (theirs.input_activations is None) == (schemes[name].activation_bits == 16)


def vllm_scheme(config: dict[str, Any], name: str, class_name: str, parts: tuple[str, ...] = ()) -> list[str] | None:
    """vLLM's lookup as its loader documents it: name, then class by substring, then the parts of a fused name."""
    import re

    def named(value: str, target: str) -> bool:
        return re.match(target[3:], value) is not None if target.startswith("re:") else target == value

    every = {t: g["targets"] for g in config["config_groups"].values() for t in g["targets"]}
    for target in every:
        if named(name, target):
            return every[target]
    for target in every:
        if not target.startswith("re:") and target.lower() in class_name.lower():
            return every[target]
    stem, _, _leaf = name.rpartition(".")
    found = [next((every[t] for t in every if named(f"{stem}.{part}", t)), None) for part in parts]
    return found[0] if found and None not in found else None


@pytest.mark.parametrize("assign", [uniform, by_kind, by_layer])
def test_vllm_finds_fused_layers_experts_and_head(assign: Callable[[str], str | None]) -> None:
    schemes = {n: Scheme.parse(text) for n in NAMES if (text := assign(n))}
    config = ct.write_config(schemes, [n for n in NAMES if n not in schemes], {})
    groups = list(config["config_groups"].values())

    def targets_of(name: str) -> list[str] | None:
        if name not in schemes:
            return None
        w = schemes[name].weight
        return next(
            g["targets"]
            for g in groups
            if (g["weights"]["num_bits"], g["weights"]["group_size"], g["weights"]["symmetric"])
            == (w.bits, w.group_size, w.symmetric)
            and (g["input_activations"] is not None) == (schemes[name].activation_bits == 8)
        )

    for i in range(12):
        attention = f"model.layers.{i}.self_attn"
        if f"{attention}.q_proj" not in config["ignore"]:
            fused = vllm_scheme(config, f"{attention}.qkv_proj", "QKVParallelLinear", ("q_proj", "k_proj", "v_proj"))
            assert fused == targets_of(f"{attention}.q_proj")
            assert vllm_scheme(config, f"{attention}.o_proj", "RowParallelLinear") == targets_of(f"{attention}.o_proj")
            # asked for by vLLM's own spelling of w1, w2, w3; a class target reaches the stack by another way
            expert = f"model.layers.{i}.mlp.experts.0"
            for part in ("gate_proj", "up_proj", "down_proj"):
                found = vllm_scheme(config, f"{expert}.{part}", "FusedMoE")
                assert found == targets_of(f"{expert}.w1") or groups[0]["targets"] == ["Linear"]
    assert vllm_scheme(config, "lm_head", "ParallelLMHead") == targets_of("lm_head")


def test_the_config_is_what_the_package_accepts() -> None:
    from compressed_tensors.quantization import QuantizationConfig

    schemes = {f"model.layers.{i}.up_proj": Scheme.parse(text) for i, text in enumerate(["w8a8", *ALL])}
    config = ct.write_config(schemes, ["lm_head"], {})
    parsed = QuantizationConfig.model_validate(config)
    assert len(parsed.config_groups) == len(schemes)
    assert config["format"] == parsed.format == "mixed-precision"
    assert config["sparsity_config"] == {} and config["quantization_status"] == "compressed"


def test_many_names_become_few_targets() -> None:
    schemes = {n: Scheme.parse(text) for n in NAMES if (text := by_kind(n))}
    config = ct.write_config(schemes, ROUTERS, {})
    assert sum(len(g["targets"]) for g in config["config_groups"].values()) == 6
    assert r"re:model\.layers\.\d+\.mlp\.experts\.\d+\.[^.]+$" in config["config_groups"]["group_0"]["targets"]


def test_configs_of_others_are_read() -> None:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "actorder": "weight"}
    channel = {"num_bits": 8, "group_size": -1, "observer": "minmax", "observer_kwargs": {}, "block_structure": None}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None},
            "group_1": {"targets": ["re:.*down_proj$"], "weights": channel},
        },
        "ignore": ["lm_head", "re:.*layers\\.0\\..*"],
        "version": "0.9.1",
    }
    names = ["lm_head", "model.layers.0.up_proj", "model.layers.1.up_proj", "model.layers.1.down_proj", "embed"]
    assert ct.read_config(config, names, {"embed": "Embedding"}) == {
        "model.layers.1.up_proj": Scheme.parse("w4a16-g128"),
        "model.layers.1.down_proj": Scheme.parse("w8a16"),
    }


def test_exact_names_win_over_patterns_and_patterns_over_classes() -> None:
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    bits_of = {"Linear": 8, "re:.*proj$": 2, "re:v.*proj$": 3, "v.up_proj": 4}
    groups = {t: {"targets": [t], "weights": {"num_bits": b, "strategy": "channel"}} for t, b in bits_of.items()}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    config["quantization_status"] = "compressed"
    names = ["v.up_proj", "v.down_proj", "v.gate", "a.up_proj"]
    found = {name: scheme.weight.bits for name, scheme in ct.read_config(config, names).items()}
    model = tree(names)
    apply_quantization_config(model, QuantizationConfig.model_validate(config), show_progress=False)
    assert found == {name: model.get_submodule(name).quantization_scheme.weights.num_bits for name in names}
    assert found["v.up_proj"] == 4 and found["v.gate"] == 8


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("quant_method", "gptq", "gptq"),
        ("config_groups", {}, "no config_groups"),
        ("config_groups", {"W4A16": ["Linear"]}, r"config_groups\.W4A16.*presets"),
        ("quantization_status", "frozen", "frozen"),
        ("kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme"),
        ("transform_config", {"config_groups": {"u": {}}}, "transform_config"),
        ("sparsity_config", {"format": "dense"}, "sparsity_config"),
        ("format", "nvfp4-pack-quantized", "nvfp4"),
        ("weights.type", "float", r"group_0.*'float'"),
        ("weights.num_bits", 5, r"group_0.*5"),
        ("weights.strategy", "block", "'block'"),
        ("weights.strategy", "channel", "'channel' with group_size 32"),
        ("input_activations", {"num_bits": 8, "strategy": "tensor"}, "per token"),
        ("input_activations", {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}, "w8a8"),
        ("output_activations", {"num_bits": 8}, "output activations"),
    ],
)
def test_configs_that_would_be_computed_wrongly_are_refused(path: str, value: Any, message: str) -> None:
    config = ct.write_config({"model.layers.0.up_proj": Scheme.parse("w4a16-g32")}, [], {})
    group = config["config_groups"]["group_0"]
    if path.startswith("weights."):
        group["weights"][path.removeprefix("weights.")] = value
    elif path.endswith("activations"):
        group[path] = value
    else:
        config[path] = value
    with pytest.raises(FormatError, match=message):
        ct.read_config(config, ["model.layers.0.up_proj"])


def test_a_scheme_that_a_grid_alone_cannot_say_is_refused_with_a_way_out() -> None:
    """w4a8 per channel: other tools write it, and here it would need weights of another kind."""
    config = ct.write_config({"model.layers.0.up_proj": Scheme.parse("w8a8")}, [], {})
    config["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    with pytest.raises(FormatError, match=r"config_groups\.group_0: w4a8 is not read.*vLLM.*dequantize"):
        ct.read_config(config, ["model.layers.0.up_proj"])
