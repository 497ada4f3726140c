"""Folders in compressed-tensors, loaded by plain transformers: the logits must be those of the dequantized model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitwright.formats import compressed_tensors as ct
from bitwright.qtensor import QuantizedTensor, spread
from bitwright.scheme import Scheme, WeightScheme

pytest.importorskip("compressed_tensors")

IDS = torch.arange(24).view(2, 12)
BASE: dict[str, Any] = dict(
    hidden_size=128, num_attention_heads=4, num_hidden_layers=2, vocab_size=96, max_position_embeddings=64
)


def nearest(w: torch.Tensor, scheme: WeightScheme, dtype: torch.dtype, flip: bool = False) -> QuantizedTensor:
    """Round-to-nearest on min/max grids; `flip` gives every second group of a symmetric grid a negative scale."""
    N, K = w.shape
    g = scheme.group_size or K
    groups = torch.nn.functional.pad(w.float(), (0, -K % g)).view(N, -1, g)
    if scheme.symmetric:
        scale = (groups.abs().amax(-1) / (scheme.qmax + 0.5)).clamp_min(1e-6)
        if flip:
            scale[:, ::2] *= -1
        scale, zero = scale.to(dtype), None
    else:
        low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        scale = ((high - low) / (scheme.qmax - scheme.qmin)).clamp_min(1e-6).to(dtype)
        zero = (scheme.qmin - low / scale.float()).round().clamp(scheme.qmin, scheme.qmax).to(torch.int8)
    offset = 0 if zero is None else spread(zero, g, K)
    codes = (w.float() / spread(scale.float(), g, K) + offset).round().clamp(scheme.qmin, scheme.qmax)
    return QuantizedTensor(codes.to(torch.int8), scale, zero, scheme)


def config_of(family: str) -> Any:
    import transformers as tf

    small = BASE | {"hidden_size": 64}
    moe = small | {"num_key_value_heads": 2, "tie_word_embeddings": False}
    return {
        "llama": lambda: tf.LlamaConfig(**BASE, intermediate_size=192, num_key_value_heads=2),
        "llama-tied": lambda: tf.LlamaConfig(**BASE, intermediate_size=192, tie_word_embeddings=True),
        "opt": lambda: tf.OPTConfig(**small, ffn_dim=96, word_embed_proj_dim=64),
        "falcon": lambda: tf.FalconConfig(**small),
        "mixtral": lambda: tf.MixtralConfig(**moe, intermediate_size=96, num_local_experts=3),
        "qwen3-moe": lambda: tf.Qwen3MoeConfig(
            **moe, intermediate_size=96, num_experts=4, moe_intermediate_size=32, num_experts_per_tok=2, head_dim=16
        ),
    }[family]()


def inner(*suffixes: str) -> Callable[[str], bool]:
    return lambda name: any(part.isdigit() for part in name.split(".")) and name.endswith(suffixes)


LLAMA = inner("proj")
LINEARS = {
    "llama": LLAMA,
    "llama-tied": LLAMA,
    "opt": inner("proj", "fc1", "fc2"),
    "falcon": inner("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "mixtral": inner("proj", "w1", "w2", "w3"),
    "qwen3-moe": inner("proj"),
}


class Folders:
    """One random model, written twice: quantized by our format, and its dequantized twin as a plain folder."""

    def __init__(
        self,
        root: Path,
        family: str,
        assign: Callable[[str], str | None],
        *,
        dtype: torch.dtype = torch.float32,
        scale_dtype: torch.dtype = torch.float16,
        in_scale_dtype: Callable[[str], bool] = lambda name: False,
        flip: bool = False,
        class_name: str = "Linear",
    ) -> None:
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        self.quantized, self.twin = root / "quantized", root / "twin"
        AutoModelForCausalLM.from_config(config_of(family)).to(dtype).save_pretrained(self.twin)
        plain = load_file(self.twin / "model.safetensors")
        stored, self.schemes = dict(plain), {}
        for key, w in plain.items():
            name = key.removesuffix(".weight")
            text = assign(name) if key.endswith(".weight") and w.ndim == 2 else None
            if text is None:
                continue
            scheme = Scheme.parse(text)
            qt = nearest(w, scheme.weight, scale_dtype, flip)
            del stored[key]
            stored |= {f"{name}.{local}": tensor for local, tensor in ct.pack(qt, scheme).items()}
            # transformers forms the product in the scale's dtype where it dequantizes while loading
            plain[key] = qt.dequantize(scale_dtype if in_scale_dtype(name) else torch.float32).to(dtype)
            self.schemes[name] = scheme
        save_file(plain, self.twin / "model.safetensors", metadata={"format": "pt"})
        self.quantized.mkdir()
        save_file(stored, self.quantized / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((self.twin / "config.json").read_text())
        everything = [key.removesuffix(".weight") for key, w in plain.items() if w.ndim == 2]
        self.names = [n for n in everything if not n.split(".")[-1].startswith(("embed", "word_embed"))]
        ignore = [n for n in dict.fromkeys([*self.names, "lm_head"]) if n not in self.schemes]  # tied: not on disk
        classes = dict.fromkeys(self.schemes, class_name)
        self.config = config["quantization_config"] = ct.write_config(self.schemes, ignore, classes)
        (self.quantized / "config.json").write_text(json.dumps(config))

    def load(self, **option: bool) -> Any:
        from transformers import AutoModelForCausalLM, CompressedTensorsConfig

        extra = {"quantization_config": CompressedTensorsConfig(**option)} if option else {}
        return AutoModelForCausalLM.from_pretrained(self.quantized, **extra)

    def check(self, tolerance: float = 0.0, **option: bool) -> None:
        from transformers import AutoModelForCausalLM

        loaded, twin = self.load(**option), AutoModelForCausalLM.from_pretrained(self.twin)
        with torch.no_grad():
            torch.testing.assert_close(loaded(IDS).logits, twin(IDS).logits, rtol=0, atol=tolerance)


@pytest.mark.parametrize("text", ["w4a16-g64", "w4a16-g32", "w3a16-g64", "w2a16-g32", "w8a16", "w4a16", "w8a16-g32"])
def test_transformers_gives_the_logits_of_the_dequantized_model(tmp_path: Path, text: str) -> None:
    Folders(tmp_path, "llama", lambda n: text if LLAMA(n) else None).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_load_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    Folders(tmp_path, "llama", lambda n: "w4a16-g64" if LLAMA(n) else None, dtype=dtype, scale_dtype=dtype).check()


def test_negative_scales_load(tmp_path: Path) -> None:
    folders = Folders(tmp_path, "llama", lambda n: "w3a16-g32" if LLAMA(n) else None, flip=True)
    stored = load_file(folders.quantized / "model.safetensors")
    assert (stored["model.layers.0.mlp.up_proj.weight_scale"] < 0).any()
    folders.check()


@pytest.mark.parametrize("text", ["w4a16-g32-asym", "w3a16-g64-asym", "w8a16-asym"])
def test_zero_points_load_with_the_dequantize_option_only(tmp_path: Path, text: str) -> None:
    folders = Folders(tmp_path, "llama", lambda n: text if LLAMA(n) else None, in_scale_dtype=LLAMA)
    folders.check(dequantize=True)
    with pytest.raises(RuntimeError):
        folders.load()


def test_int_quantized_weights_and_activations(tmp_path: Path) -> None:
    folders = Folders(tmp_path, "llama", lambda n: "w8a8" if LLAMA(n) else None, in_scale_dtype=LLAMA)
    assert folders.config["format"] == "int-quantized"
    folders.check(dequantize=True)  # weights alone
    loaded = folders.load()
    from transformers import AutoModelForCausalLM

    loaded(IDS)  # decompresses
    twin = AutoModelForCausalLM.from_pretrained(folders.twin)
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0))
    s = x.abs().amax(-1, keepdim=True) / 127.5  # the package's grid for int8 activations
    name = "model.layers.1.mlp.up_proj"
    expected = torch.nn.functional.linear((x / s).round().clamp(-128, 127) * s, _weight(folders, name))
    torch.testing.assert_close(loaded.get_submodule(name)(x), expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        assert not torch.equal(loaded(IDS).logits, twin(IDS).logits)


def _weight(folders: Folders, name: str) -> torch.Tensor:
    stored = load_file(folders.quantized / "model.safetensors")
    return stored[f"{name}.weight"].float() * stored[f"{name}.weight_scale"].float()


def test_one_scheme_for_the_blocks_and_another_for_the_head(tmp_path: Path) -> None:
    folders = Folders(tmp_path, "llama", lambda n: "w8a16" if n == "lm_head" else "w4a16-g32" if LLAMA(n) else None)
    assert [group["targets"] for group in folders.config["config_groups"].values()] == [["Linear"], ["lm_head"]]
    assert folders.config["ignore"] == []
    folders.check()


def test_a_quantized_head_needs_an_untied_config(tmp_path: Path) -> None:
    """What the pipeline has to do for a tied model: write both matrices and say so in config.json."""
    from transformers import AutoModelForCausalLM

    folders = Folders(tmp_path, "llama-tied", lambda n: None if n != "model.layers.0.mlp.up_proj" else "w8a16")
    stored = load_file(folders.quantized / "model.safetensors")
    qt = nearest(stored["model.embed_tokens.weight"], WeightScheme(8), torch.float16)
    head = Scheme.parse("w8a16")
    save_file(
        stored | {f"lm_head.{k}": v for k, v in ct.pack(qt, head).items()}, folders.quantized / "model.safetensors"
    )
    config = json.loads((folders.quantized / "config.json").read_text())
    ignore = [n for n in folders.config["ignore"] if n != "lm_head"]
    config["quantization_config"] = ct.write_config(folders.schemes | {"lm_head": head}, ignore, {})
    path = folders.quantized / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(AttributeError):
        folders.load()
    path.write_text(json.dumps(config | {"tie_word_embeddings": False}))
    twin = AutoModelForCausalLM.from_pretrained(folders.twin)
    with torch.no_grad():
        expected = twin.model(IDS).last_hidden_state @ qt.dequantize().t()
        torch.testing.assert_close(folders.load()(IDS).logits, expected, rtol=0, atol=1e-6)


def test_several_schemes_inside_the_blocks(tmp_path: Path) -> None:
    def assign(name: str) -> str | None:
        if name.endswith("down_proj"):
            return "w8a16"
        return "w3a16-g64" if "layers.1" in name and LLAMA(name) else "w4a16-g32" if LLAMA(name) else None

    folders = Folders(tmp_path, "llama", assign)
    assert len(folders.config["config_groups"]) == 3
    folders.check()


@pytest.mark.parametrize("family", ["opt", "mixtral", "qwen3-moe"])
@pytest.mark.parametrize("text", ["w4a16-g32", "w3a16-g32"])
def test_other_families(tmp_path: Path, family: str, text: str) -> None:
    """In float16: transformers leaves experts in the dtype of their scales, whatever the model's."""
    linear = LINEARS[family]
    folders = Folders(tmp_path, family, lambda n: text if linear(n) else None, dtype=torch.float16)
    assert next(iter(folders.config["config_groups"].values()))["targets"] == ["Linear"]
    folders.check()


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_experts_at_other_bits_than_attention(tmp_path: Path, family: str) -> None:
    linear = LINEARS[family]

    def assign(name: str) -> str | None:
        return None if not linear(name) else "w3a16-g32" if "experts" in name else "w8a16"

    Folders(tmp_path, family, assign, dtype=torch.float16).check()


def test_falcon_loads_with_the_dequantize_option(tmp_path: Path) -> None:
    """transformers' Falcon initialises `module.weight`, which a compressed FalconLinear does not have."""
    linear = LINEARS["falcon"]
    folders = Folders(
        tmp_path,
        "falcon",
        lambda n: "w4a16-g32" if linear(n) else None,
        in_scale_dtype=linear,
        class_name="FalconLinear",
    )
    assert "Linear" not in folders.config["config_groups"]["group_0"]["targets"]
    folders.check(dequantize=True)
    with pytest.raises(AttributeError):
        folders.load()


@pytest.mark.parametrize("text", ["w4a16-g32-asym", "w8a8"])
def test_experts_that_transformers_cannot_load(tmp_path: Path, text: str) -> None:
    """What `portability` tells about such experts is true."""
    linear = LINEARS["mixtral"]
    folders = Folders(tmp_path, "mixtral", lambda n: text if linear(n) else None)
    for option in ({}, {"dequantize": True}):
        with pytest.raises(RuntimeError):
            folders.load(**option)


def test_experts_left_out_beside_quantized_linears_do_not_load_in_transformers(tmp_path: Path) -> None:
    folders = Folders(tmp_path, "mixtral", lambda n: "w4a16-g32" if "self_attn" in n else None)
    with pytest.raises(RuntimeError):
        folders.load()


def test_the_dequantize_option_takes_one_scheme_for_all(tmp_path: Path) -> None:
    """Why `portability` does not offer it where schemes are mixed: it loads, with wrong weights."""

    def assign(name: str) -> str | None:
        return None if not LLAMA(name) else "w8a16" if name.endswith("down_proj") else "w4a16-g32"

    folders = Folders(tmp_path, "llama", assign, in_scale_dtype=LLAMA)
    with pytest.raises(AssertionError):
        folders.check(tolerance=1e-3, dequantize=True)
