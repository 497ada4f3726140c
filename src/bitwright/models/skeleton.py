"""A transformers model without weights: parameters on meta, computed buffers real.

Everything is taken from the model itself: the dtype from_pretrained would give each parameter, and the buffers that
no checkpoint holds (rotary frequencies, position ids), which the model's own initialisation fills.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import StructureError


@dataclass(frozen=True)
class Skeleton:
    """A model on meta, with what from_pretrained at `dtype` would give its entries."""

    model: Any
    dtypes: Mapping[str, torch.dtype]  # state-dict key -> dtype
    buffers: Mapping[str, Tensor]  # non-persistent buffers, real, on CPU


def build_skeleton(config: Any, dtype: torch.dtype, trust_remote_code: bool, folder: Path) -> Skeleton:
    """The model on meta with real non-persistent buffers, as from_pretrained at `dtype` would set them."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import meta_device_safe_creation_ops

    try:
        with torch.device("meta"), meta_device_safe_creation_ops():
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code
            )
    except (ValueError, KeyError, ImportError, AttributeError, TypeError, RuntimeError) as e:
        reason = str(e).strip().partition("\n")[0]
        raise StructureError(
            f"{folder}: transformers cannot build a causal language model from its config.json "
            f"({getattr(config, 'model_type', 'no model_type')}): {reason}"
        ) from e
    model.eval()
    state = model.state_dict()
    plan = [re.compile(p.replace("*", ".*")) for p in model._get_dtype_plan(dtype)]  # kept in float32
    dtypes = {key: torch.float32 if any(p.search(key) for p in plan) else tensor.dtype for key, tensor in state.items()}
    return Skeleton(model, dtypes, _real_buffers(model, set(state)))


def _real_buffers(model: Any, stored: set[str]) -> dict[str, Tensor]:
    """Give the model real non-persistent buffers through its own initialisation; returns copies of them.

    They start as NaN (or the lowest integer), so one that nobody initialises is found here, not in the results.
    """
    names = [name for name, buffer in model.named_buffers() if name not in stored and buffer is not None]
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = True  # transformers skips tensors with this mark
    for module in model.modules():
        module._is_hf_initialized = False
    for name in names:
        parent, _, leaf = name.rpartition(".")
        holder = model.get_submodule(parent)
        old = holder._buffers[leaf]
        holder._buffers[leaf] = torch.full(old.shape, _unset(old.dtype), dtype=old.dtype)
    model.initialize_weights()
    real = {}
    for name in names:
        buffer = model.get_buffer(name)
        unset = buffer.isnan() if buffer.is_floating_point() else buffer == _unset(buffer.dtype)
        if buffer.dtype != torch.bool and buffer.numel() and bool(unset.all()):
            raise StructureError(
                f"buffer {name} of {type(model).__name__} is neither in the checkpoint nor set by the model's "
                "initialisation; this model cannot be loaded module by module"
            )
        real[name] = buffer.clone()
    return real


def _unset(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return False
    return float("nan") if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).min
