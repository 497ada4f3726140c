"""Shared fixtures: tiny random models of many families, a byte tokenizer, and the small trained models.

`tiny_folder(family)` saves a random two-block model as a Hugging Face folder (made once per session: read it, copy it
to change it); `tiny_model(family)` gives the same model in memory; `fixture_model(name)` is the folder of a small
trained model under $BITWRIGHT_MODELS and skips where that is unset.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

try:
    from hypothesis import settings
except ImportError:  # tests/gpu run without it
    pass
else:
    # `make test` draws the same examples every time, so that a change is judged by what it changed; `make explore`
    # draws new ones.
    settings.register_profile("gate", derandomize=True, deadline=None)
    settings.register_profile("explore", deadline=None, print_blob=True)
    settings.load_profile("gate")

VOCAB = 320
FAMILIES = ("llama", "opt", "falcon", "gpt_neox", "mixtral", "qwen2_moe", "qwen3_moe")
MOE_FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")


def tiny_config(family: str, **changes: Any) -> Any:
    """Config of a two-block model of `family`: hidden 32, 4 heads (2 for keys and values), context 128."""
    import transformers as tf

    common = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    grouped = {"num_key_value_heads": 2, "intermediate_size": 48}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    kinds: dict[str, tuple[type, dict[str, Any]]] = {
        "llama": (tf.LlamaConfig, grouped | {"tie_word_embeddings": True}),
        "opt": (tf.OPTConfig, {"ffn_dim": 48, "word_embed_proj_dim": 32}),
        "falcon": (tf.FalconConfig, {"multi_query": True, "new_decoder_architecture": False, "ffn_hidden_size": 48}),
        "gpt_neox": (tf.GPTNeoXConfig, {"intermediate_size": 48, "tie_word_embeddings": False}),
        "mixtral": (tf.MixtralConfig, grouped | {"num_local_experts": 4, "num_experts_per_tok": 2}),
        "qwen2_moe": (
            tf.Qwen2MoeConfig,
            grouped | experts | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [0]},
        ),
        "qwen3_moe": (tf.Qwen3MoeConfig, grouped | experts | {"head_dim": 8, "mlp_only_layers": []}),
    }
    kind, own = kinds[family]
    return kind(**common | own | changes)


def build_tiny(config: Any, seed: int = 0) -> Any:
    """A model of `config` in float32 whose every parameter is random: biases and norms too, so that forgetting one
    changes results."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.1 * noise if p.ndim == 1 and "norm" in name and "bias" not in name else 0.1 * noise)
    return model


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of VOCAB entries: every text round-trips, one token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1, **{c: i + 2 for i, c in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """family, **config changes -> a fresh tiny model in memory, float32."""

    def make(family: str, seed: int = 0, **changes: Any) -> Any:
        return build_tiny(tiny_config(family, **changes), seed)

    return make


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """family, dtype=torch.float32, max_shard_size="5GB", **config changes -> folder with weights and tokenizer."""
    made: dict[str, Path] = {}

    def make(family: str, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", **changes: Any) -> Path:
        key = repr((family, dtype, max_shard_size, sorted(changes.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            model = build_tiny(tiny_config(family, **changes)).to(dtype)
            model.save_pretrained(folder, max_shard_size=max_shard_size)
            save_tokenizer(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def fixture_model() -> Callable[[str], Path]:
    """name ("opt", "falcon", "mixtral") -> folder of a small trained model under $BITWRIGHT_MODELS."""

    def find(name: str) -> Path:
        root = os.environ.get("BITWRIGHT_MODELS")
        if not root:
            pytest.skip("BITWRIGHT_MODELS is not set: it names the folder of the small trained models (opt, ...)")
        folder = Path(root) / name
        if not (folder / "config.json").is_file():
            pytest.skip(f"BITWRIGHT_MODELS={root} has no model {name!r}")
        return folder

    return find
