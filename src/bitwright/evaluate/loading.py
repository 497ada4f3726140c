"""Device, dtype, model and tokenizer as evaluation wants them; generation shares all but the model's default dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bitwright.errors import BitwrightError, CheckpointError


def choose_dtype(dtype: str) -> torch.dtype | None:
    """The floating dtype named; None for "auto"."""
    if dtype == "auto":
        return None
    chosen = getattr(torch, dtype, None)
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise BitwrightError(f"unknown dtype {dtype!r}; use auto, float32, bfloat16 or float16")
    return chosen


def load_model(folder: Path, device: torch.device, dtype: torch.dtype | None, trust_remote_code: bool = False) -> Any:
    """The causal LM of a plain or quantized folder, packed, in evaluation mode, for measuring quality.

    dtype None: float32 on a CPU, so that what is measured is the weights and not the arithmetic (and because many CPUs
    emulate 16-bit products); the checkpoint's own elsewhere. For speed, call `nn.load.load` with its own default.
    """
    from bitwright.nn.load import load

    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    return load(folder, dtype=dtype, device=str(device), packed=True, trust_remote_code=trust_remote_code).eval()


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder; CheckpointError if there is none that transformers can read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers and transformers raise many unrelated kinds for missing and damaged files
        raise CheckpointError(
            f"{folder} has no tokenizer that can be read: {' '.join(str(error).split())[:300]}"
        ) from error
