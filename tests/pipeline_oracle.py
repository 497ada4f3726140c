"""An independent reading of a quantized folder, for the tests of the pipeline.

Only safetensors, the format's own `unpack` and plain transformers take part: `twin` writes an ordinary folder whose
weights are the dequantized ones, and what any loader makes of the quantized folder must equal that model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bitwright.formats import reader
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import Scheme

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 60
IDS = torch.arange(2, 98).view(2, 48)
# Widths that every group size used here divides; what Falcon and OPT call their inner width differs.
WIDE: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 128},
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128},
    "falcon": {"hidden_size": 64, "ffn_hidden_size": 128},
    "gpt_neox": {"hidden_size": 64, "intermediate_size": 128},
    "mixtral": {"hidden_size": 64, "intermediate_size": 128},
    "qwen2_moe": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128,
    },
    "qwen3_moe": {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "head_dim": 16},
}


@dataclass(frozen=True)
class Quantized:
    """A quantized folder taken apart. kept: tensors as they are; matrices: by their names on disk; config: config.json;
    stored: bytes of everything that belongs to quantized matrices, shapes not counted."""

    kept: dict[str, torch.Tensor]
    matrices: dict[str, QuantizedTensor]
    schemes: dict[str, Scheme]
    config: dict[str, Any]
    stored: int


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's shards."""
    return {k: v for shard in sorted(folder.glob("*.safetensors")) for k, v in load_file(shard).items()}


def module_name(disk_name: str) -> str:
    """Mixtral's expert layers and GPT-NeoX's head are named otherwise on disk than in the model."""
    return disk_name.replace(".block_sparse_moe.", ".mlp.").replace("embed_out", "lm_head")


def read(folder: Path) -> Quantized:
    """Take a quantized folder apart."""
    tensors = weights(folder)
    config = json.loads((folder / "config.json").read_text())
    prefixes = sorted(k.removesuffix(".weight_scale") for k in tensors if k.endswith(".weight_scale"))
    form = reader(config["quantization_config"])
    schemes = form.read_config(config["quantization_config"], [module_name(p) for p in prefixes])
    matrices, stored = {}, 0
    for prefix in prefixes:
        local = {
            k.removeprefix(f"{prefix}."): tensors.pop(k)
            for k in list(tensors)
            if k == f"{prefix}.weight" or k.startswith(f"{prefix}.weight_")
        }
        matrices[prefix] = form.unpack(local, schemes[module_name(prefix)])
        stored += sum(t.nbytes for key, t in local.items() if key != "weight_shape")
    return Quantized(tensors, matrices, {p: schemes[module_name(p)] for p in prefixes}, config, stored)


def twin(source: Path, quantized: Quantized, where: Path, dtype: torch.dtype | None = None) -> Any:
    """The source model with the dequantized weights in place of its own, loaded by plain transformers. dtype: of the
    model; None = the quantized folder's."""
    from transformers import AutoModelForCausalLM

    where.mkdir()
    dtype = dtype or getattr(torch, quantized.config["dtype"])
    tensors = {k: t.to(dtype) if t.is_floating_point() else t for k, t in quantized.kept.items()}
    tensors |= {f"{p}.weight": qt.dequantize(dtype) for p, qt in quantized.matrices.items()}
    save_file(tensors, where / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["tie_word_embeddings"] = quantized.config.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    (where / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return AutoModelForCausalLM.from_pretrained(where)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Logits of the fixed ids, float32."""
    return model(IDS).logits.float()
