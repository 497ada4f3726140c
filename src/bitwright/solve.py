"""From a matrix (and what calibration gathered at its input) to a QuantizedTensor and its line in the record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.algorithms.gptq import GPTQResult, gptq
from bitwright.algorithms.quik import SplitResult, choose_clip, choose_split, plain_split, quik, round_to_nearest
from bitwright.algorithms.rtn import rtn
from bitwright.calibrate.capture import Call, Group
from bitwright.calibrate.simulate import SimulatedLinear, profiles
from bitwright.calibrate.stream import Statistics
from bitwright.plan import Entry
from bitwright.qtensor import QuantizedTensor
from bitwright.split import InputSplit, SplitTensor

Quantized = QuantizedTensor | SplitTensor

# Below this many tokens an expert's H says more about those tokens than about the expert.
MIN_EXPERT_TOKENS = 32
_ROWS_FOR_THREADS = 8192


@contextmanager
def few_threads(rows: int) -> Iterator[None]:
    """One thread for a sweep over fewer rows than pay for more. It is a long chain of small operations: sharing each
    between threads costs more in barriers than it saves (a hundred times more when other programs want the cores)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if rows < _ROWS_FOR_THREADS else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose_splits(
    groups: Sequence[Group],
    entries: Mapping[str, Entry],
    block: nn.Module,
    hidden: Sequence[Tensor],
    calls: Sequence[Call],
) -> dict[str, InputSplit]:
    """The split of every linear whose input is split, by local name; those of one group share it.

    block: with its original weights; hidden: what enters it. Costs one more forward a micro-batch where there is any.
    """
    asked = [group for group in groups if not entries[group.names[0]].scheme.plain]
    if not asked:
        return {}
    seen = profiles(block, hidden, calls, [group.names[0] for group in asked])
    splits: dict[str, InputSplit] = {}
    for group in asked:
        entry, profile = entries[group.names[0]], seen.get(group.names[0])
        weights = [block.get_submodule(name).weight for name in group.names]
        if profile is None:
            split = plain_split(entry.linear.K, entry.scheme, weights[0].device)
        else:
            split = choose_split(profile, entry.scheme, entry.options, entry.linear.name)
            if entry.options.clip:
                split = replace(split, clip=choose_clip(split, profile, torch.cat([W.float() for W in weights])))
        splits |= dict.fromkeys(group.names, split)
    return splits


def install(module: nn.Module, name: str, tensor: Quantized) -> None:
    """Let the submodule `name` compute with what was made of its weight."""
    linear = module.get_submodule(name)
    if isinstance(tensor, SplitTensor):
        if not isinstance(linear, SimulatedLinear):
            linear = SimulatedLinear.of(linear, tensor.split)
            replace_module(module, name, linear)
        linear.install(tensor)
    else:
        linear.weight = nn.Parameter(tensor.dequantize(linear.weight.dtype), requires_grad=False)


def replace_module(module: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the submodule `name` is."""
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, new)


def solve_data_free(entry: Entry, W: Tensor, dtype: torch.dtype) -> tuple[Quantized, dict[str, Any]]:
    """Round W [N, K] to the nearest point of its grid; of a split input nothing is known, so it has no outliers."""
    search = getattr(entry.options, "search", "mse")
    tensor: Quantized
    if entry.scheme.plain:
        tensor = rtn(W, entry.scheme.weight, search=search, scale_dtype=dtype)
    else:
        split = plain_split(W.shape[1], entry.scheme, W.device)
        tensor = round_to_nearest(split.arrange_weight(W), entry.scheme, split, search, dtype)
    return tensor, _record(entry, W, tensor)


def solve_group(
    entries: Sequence[Entry], weights: Mapping[str, Tensor], stats: Statistics, dtype: torch.dtype
) -> dict[str, tuple[Quantized, dict[str, Any]]]:
    """Solve the linears of one group. Those of equal scheme and options go through one sweep, rows stacked: rows are
    independent, so the result is that of separate sweeps.

    entries in the order of the group; weights and result by linear name; stats.corrections likewise.
    """
    out: dict[str, tuple[Quantized, dict[str, Any]]] = {}
    batches: dict[Any, list[Entry]] = {}
    for e in entries:
        batches.setdefault((e.scheme, e.options), []).append(e)
    for (scheme, options), members in batches.items():
        names = [e.linear.name for e in members]
        if stats.tokens < MIN_EXPERT_TOKENS:
            for e, name in zip(members, names, strict=True):
                W = weights[name]
                tensor: Quantized
                if stats.split is None:
                    tensor = rtn(W, scheme.weight, search=options.search, scale_dtype=dtype)
                else:
                    Wz = stats.split.arrange_weight(W)
                    tensor = round_to_nearest(Wz, scheme, stats.split, options.search, dtype)
                why = f"rtn: calibration sent {stats.tokens} tokens here, fewer than {MIN_EXPERT_TOKENS}"
                out[name] = tensor, {**_record(e, W, tensor), "tokens": stats.tokens, "fallback": why}
            continue
        W = torch.cat([weights[name].float() for name in names])
        correction = torch.cat([stats.corrections[name] for name in names]) if stats.corrections else None
        with few_threads(W.shape[0]):
            result: GPTQResult | SplitResult
            if stats.split is None:
                result = gptq(W, stats.H, scheme.weight, options, correction=correction, scale_dtype=dtype)
            else:
                Wz = stats.split.arrange_weight(W)
                given: dict[str, Any] = {"correction": correction, "dead": stats.dead, "scale_dtype": dtype}
                result = quik(Wz, stats.H, scheme, stats.split, options, **given)
        begin = 0
        for e, name in zip(members, names, strict=True):
            rows = slice(begin, begin + e.linear.N)
            begin += e.linear.N
            tensor = _rows(result.tensor, rows)
            out[name] = tensor, {**_record(e, weights[name], tensor), **_calibrated(result, rows, stats)}
    return out


def _rows(tensor: Quantized, rows: slice) -> Quantized:
    if isinstance(tensor, SplitTensor):
        base = tensor.base
        part = _rows(base, rows) if isinstance(base, QuantizedTensor) else base[rows].contiguous()
        return replace(tensor, base=part, outliers=tensor.outliers[rows].contiguous())
    zero = None if tensor.zero_point is None else tensor.zero_point[rows].contiguous()
    return QuantizedTensor(tensor.codes[rows].contiguous(), tensor.scale[rows].contiguous(), zero, tensor.scheme)


def _record(entry: Entry, W: Tensor, tensor: Quantized) -> dict[str, Any]:
    W = W.float()
    error = (tensor.dequantize() - W).norm() / W.norm().clamp_min(1e-30)
    split: dict[str, Any] = {}
    if isinstance(tensor, SplitTensor):
        split = {"outliers": len(tensor.split.outlier_idx)}
        split |= {"clip": tensor.split.clip} if tensor.split.clip != 1 else {}
        split |= {"rotation_block": tensor.split.block} if tensor.split.block else {}
    return {
        "scheme": str(entry.scheme),
        "algorithm": entry.algorithm,
        "bits_per_weight": tensor.bits_per_weight,
        "relative_error": _round(error),
        **split,
    }


def _calibrated(result: GPTQResult | SplitResult, rows: slice, stats: Statistics) -> dict[str, Any]:
    loss, energy = result.loss[rows].sum(), result.energy[rows].sum()
    out: dict[str, Any] = {
        "proxy_loss": _round(loss),
        "relative_proxy_loss": _round(loss / energy.clamp_min(1e-30)),
        "damp_percent": result.damp_percent,
        "tokens": stats.tokens,
    }
    if result.dead_columns:
        out["dead_columns"] = result.dead_columns
    if result.fallback is not None:
        out["fallback"] = result.fallback
    return out


def _round(x: Tensor) -> float:
    return float(f"{float(x):.6g}")
