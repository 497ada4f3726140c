"""From a matrix (and what calibration gathered at its input) to a QuantizedTensor and its line in the record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bitwright.algorithms.gptq import GPTQResult, gptq
from bitwright.algorithms.rtn import rtn
from bitwright.calibrate.stream import Statistics
from bitwright.plan import Entry
from bitwright.qtensor import QuantizedTensor

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


def solve_data_free(entry: Entry, W: Tensor, dtype: torch.dtype) -> tuple[QuantizedTensor, dict[str, Any]]:
    """Round W [N, K] to the nearest point of its grid."""
    search = getattr(entry.options, "search", "mse")
    tensor = rtn(W, entry.scheme.weight, search=search, scale_dtype=dtype)
    return tensor, _record(entry, W, tensor)


def solve_group(
    entries: Sequence[Entry], weights: Mapping[str, Tensor], stats: Statistics, dtype: torch.dtype
) -> dict[str, tuple[QuantizedTensor, dict[str, Any]]]:
    """Solve the linears of one group with gptq. Those of equal scheme and options go through one sweep, rows stacked:
    rows are independent, so the result is that of separate sweeps.

    entries in the order of the group; weights and result by linear name; stats.corrections likewise.
    """
    out: dict[str, tuple[QuantizedTensor, dict[str, Any]]] = {}
    batches: dict[Any, list[Entry]] = {}
    for e in entries:
        batches.setdefault((e.scheme, e.options), []).append(e)
    for (scheme, options), members in batches.items():
        names = [e.linear.name for e in members]
        if stats.tokens < MIN_EXPERT_TOKENS:
            for e, name in zip(members, names, strict=True):
                W = weights[name]
                tensor = rtn(W, scheme.weight, search=options.search, scale_dtype=dtype)
                why = f"rtn: calibration sent {stats.tokens} tokens here, fewer than {MIN_EXPERT_TOKENS}"
                out[name] = tensor, {**_record(e, W, tensor), "tokens": stats.tokens, "fallback": why}
            continue
        W = torch.cat([weights[name].float() for name in names])
        correction = torch.cat([stats.corrections[name] for name in names]) if stats.corrections else None
        with few_threads(W.shape[0]):
            result = gptq(W, stats.H, scheme.weight, options, correction=correction, scale_dtype=dtype)
        begin = 0
        for e, name in zip(members, names, strict=True):
            rows = slice(begin, begin + e.linear.N)
            begin += e.linear.N
            tensor = _rows(result.tensor, rows)
            out[name] = tensor, {**_record(e, weights[name], tensor), **_calibrated(result, rows, stats)}
    return out


def _rows(tensor: QuantizedTensor, rows: slice) -> QuantizedTensor:
    zero = None if tensor.zero_point is None else tensor.zero_point[rows].contiguous()
    return QuantizedTensor(tensor.codes[rows].contiguous(), tensor.scale[rows].contiguous(), zero, tensor.scheme)


def _record(entry: Entry, W: Tensor, tensor: QuantizedTensor) -> dict[str, Any]:
    W = W.float()
    error = (tensor.dequantize() - W).norm() / W.norm().clamp_min(1e-30)
    return {
        "scheme": str(entry.scheme),
        "algorithm": entry.algorithm,
        "bits_per_weight": tensor.bits_per_weight,
        "relative_error": _round(error),
    }


def _calibrated(result: GPTQResult, rows: slice, stats: Statistics) -> dict[str, Any]:
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
