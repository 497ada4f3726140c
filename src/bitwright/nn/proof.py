"""How far two ways of decoding are from each other, by what they leave of the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Left = tuple[Tensor, Tensor]  # logits [B, V] less their mean, and keys and values of all layers [B, n], float32


def left(logits: Tensor, layers: Sequence[Any], t: int) -> Left:
    """What the tokens at position t left: logits [B, V] and, in caches [B, kv_heads, S, D], their keys and values."""
    logits = logits.float()
    held = [cache[:, :, t].flatten(1) for layer in layers for cache in (layer.keys, layer.values)]
    return logits - logits.mean(dim=-1, keepdim=True), torch.cat(held, dim=-1).float()


def fill(layers: Sequence[Any]) -> None:
    """Keys and values of random numbers, the same every time."""
    generator = torch.Generator(layers[0].keys.device).manual_seed(0)
    for layer in layers:
        layer.keys.normal_(generator=generator)
        layer.values.normal_(generator=generator)


def apart(found: Sequence[Left], expected: Sequence[Left]) -> float:
    """The lower quartile over tokens of relative distances: the largest over sequences, of logits and of the cache.

    The quartile, since a rounding may send a token to another expert; what is built otherwise shows in all tokens.
    """
    quartiles = []
    for ours, theirs in zip(zip(*found, strict=True), zip(*expected, strict=True), strict=True):
        a, b = torch.stack(ours), torch.stack(theirs)  # [tokens, B, n]
        quartiles.append(((a - b).norm(dim=-1) / b.norm(dim=-1)).quantile(0.25, dim=0).max())
    return float(torch.stack(quartiles).nan_to_num(nan=torch.inf).max())
