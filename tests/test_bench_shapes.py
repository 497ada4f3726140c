"""Shapes of published models: their parameter counts are known, and say that every matrix is there once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bitwright.bench.shapes import KERNEL_SHAPES, MODELS, models, parse_shape
from bitwright.errors import BitwrightError

PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
    "opt-175b": 174_604_468_224,
    "mixtral-8x7b": 46_702_792_704,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_model(name: str) -> None:
    assert models(name).parameters == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "make"), [("llama-2-70b", "LlamaConfig"), ("opt-66b", "OPTConfig"), ("mixtral-8x7b", "MixtralConfig")]
)
def test_parameters_are_those_that_transformers_makes(name: str, make: str) -> None:
    """Two layers of the model on the meta device."""
    import torch
    import transformers

    shape = models(name)
    common = {"vocab_size": shape.vocab, "hidden_size": shape.hidden, "num_hidden_layers": 2}
    common |= {"num_attention_heads": shape.heads, "tie_word_embeddings": shape.tied}
    own = {
        "OPTConfig": {"ffn_dim": shape.intermediate, "word_embed_proj_dim": shape.hidden},
        "LlamaConfig": {"intermediate_size": shape.intermediate, "num_key_value_heads": shape.kv_heads},
        "MixtralConfig": {"intermediate_size": shape.intermediate, "num_key_value_heads": shape.kv_heads},
    }[make]
    with torch.device("meta"):
        config = getattr(transformers, make)(**common, **own)
        made = transformers.AutoModelForCausalLM.from_config(config)
    assert replace(shape, layers=2).parameters == sum(p.numel() for p in made.parameters())


def test_every_name_is_there_once_and_in_any_case() -> None:
    assert sorted(PARAMETERS) == sorted(m.name for m in MODELS)
    assert models(" OPT-175B ").hidden == 12288
    with pytest.raises(BitwrightError, match=r"'gpt-5'.*llama-2-7b"):
        models("gpt-5")


def test_linears_are_fused_as_servers_run_them() -> None:
    sizes = {x.name: (x.N, x.K, x.count) for x in models("llama-2-70b").linears}
    assert sizes == {
        "qkv": (10240, 8192, 1),
        "o": (8192, 8192, 1),
        "gate_up": (57344, 8192, 1),
        "down": (8192, 28672, 1),
    }
    assert {x.name: x.count for x in models("mixtral-8x7b").linears} == {"qkv": 1, "o": 1, "gate_up": 8, "down": 8}
    assert [x.name for x in models("opt-175b").linears] == ["qkv", "o", "up", "down"]


def test_kernel_shapes_are_linears_of_these_models() -> None:
    known = {(x.N, x.K) for model in MODELS for x in model.linears}
    assert set(KERNEL_SHAPES) <= known


def test_cache() -> None:
    assert models("llama-2-7b").kv_cache_values(2, 10) == 2 * 32 * 4096 * 2 * 10


@pytest.mark.parametrize("text", ["4096", "0x12", "12x", "ax4", "4096x4096x2", "-1x4"])
def test_shapes_that_are_none(text: str) -> None:
    with pytest.raises(BitwrightError, match="22016x4096"):
        parse_shape(text)


def test_shapes() -> None:
    assert parse_shape(" 22016X4096 ") == (22016, 4096) == parse_shape("22016×4096")
