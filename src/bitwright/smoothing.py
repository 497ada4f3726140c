"""Smoothing as a step of a run: which matrices of a block ask for factors, and what else on disk changes with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.calibrate.capture import Call, Group
from bitwright.calibrate.smoothing import smooth_block
from bitwright.evidence import stored_dtype
from bitwright.models.load import SourceModel
from bitwright.models.structure import Block
from bitwright.plan import Plan


def smooth(
    source: SourceModel,
    original: nn.Module,
    block: Block,
    plan: Plan,
    groups: Sequence[Group],
    hidden: Sequence[Tensor],
    calls: Sequence[Call],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Move factors, in place, into the linears of `original` that ask for them; it computes the same bits as before.

    groups, hidden, calls: as for `smooth_block`. Returns what the record says of each such linear, by its name, and the
    tensors on disk that are not quantized and change (norms, biases), by theirs, in their stored dtype.
    """
    local = {x.name: x.name.removeprefix(f"{block.name}.") for x in block.all_linears if x.name in plan.entries}
    entries = {short: plan.entries[name] for name, short in local.items() if plan.entries[name].smoothing}
    if not entries:
        return {}, {}
    storage: dict[str, torch.dtype | None] = {f"{short}.weight": None for short in local.values()}
    disk: dict[str, str] = {}
    for key, _ in original.named_parameters():
        name = source.own_tensor(f"{block.name}.{key}")
        if key not in storage and name is not None:
            storage[key], disk[key] = stored_dtype(source, name, plan.dtype), name
    asked = {short: (e.smoothing, e.scheme.weight) for short, e in entries.items()}
    smoothed = smooth_block(block, original, groups, hidden, calls, asked, storage)
    changed = {}
    for key, factors in smoothed.factors.items():
        if key in disk:
            value = source.checkpoint.get(disk[key]).float()
            for factor in factors:
                value = value * factor.cpu()
            changed[disk[key]] = value.to(storage[key])
    return {entries[short].linear.name: what for short, what in smoothed.records.items()}, changed
