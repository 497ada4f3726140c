"""The README's tables of speed and memory, from benchmarks/gpu.jsonl, the records of `bitwright bench`.

Of records that measured the same thing the last counts. A table that nothing was measured for is empty, so that its
section can stand in the README before its numbers do. Each GPU has tables of its own; records of a CPU stay out, where
the command is only tried.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

Record = dict[str, Any]

MISSING = "–"
MAIN_SCHEME = "w4a16-g128"
# name in a record -> column; ours stands before them
OTHERS = {
    "dense": "cuBLAS",
    "dequantize+dense": "dequantize + cuBLAS",
    "tinygemm": "tinygemm",
    "humming": "humming",
    "gemlite": "gemlite",
}


def markdown(columns: Mapping[str, Sequence[str]], left: Iterable[str]) -> str:
    """A table of columns by title, without those that nothing fills; titles in `left` are aligned to the left."""
    filled = {title: cells for title, cells in columns.items() if any(cell != MISSING for cell in cells)}
    names = set(left)
    lines = [
        "| " + " | ".join(filled) + " |",
        "|" + "|".join("---" if title in names else "---:" for title in filled) + "|",
        *("| " + " | ".join(line) + " |" for line in zip(*filled.values(), strict=True)),
    ]
    return "\n".join(lines) + "\n"


def kernels(records: Sequence[Record]) -> str:
    """4-bit linears by shape and tokens: ours, cuBLAS, and everybody else."""
    return _by_gpu(_of(records, "kernels", lambda r: r["scheme"] == MAIN_SCHEME), _kernel_table)


def kernel_bits(records: Sequence[Record]) -> str:
    """The same for other widths and groups."""
    return _by_gpu(
        _of(records, "kernels", lambda r: r["scheme"] != MAIN_SCHEME and not _splits(r["scheme"])), _kernel_table
    )


def quantized_activations(records: Sequence[Record]) -> str:
    """Linears that quantize their input, and where their time goes."""
    return _by_gpu(_of(records, "kernels", lambda r: _splits(r["scheme"])), _split_table)


def experts(records: Sequence[Record]) -> str:
    """Stacks of experts in one launch."""
    return _by_gpu(_of(records, "experts"), _expert_table)


def decode(records: Sequence[Record]) -> str:
    """One token of whole models."""
    return _by_gpu(_of(records, "decode"), _decode_table)


def prefill(records: Sequence[Record]) -> str:
    """Prompts through whole models."""
    return _by_gpu(_of(records, "prefill"), _prefill_table)


def throughput(records: Sequence[Record]) -> str:
    """Tokens per second and GPU at the best batch."""
    return _by_gpu(_of(records, "throughput", lambda r: r["status"] == "ok"), _throughput_table)


def memory(records: Sequence[Record]) -> str:
    """Bytes by model and scheme."""
    return _by_gpu(_of(records, "memory"), _memory_table)


GPU_TABLES: dict[str, Callable[[Sequence[Record]], str]] = {
    "kernels": kernels,
    "kernel-bits": kernel_bits,
    "quantized-activations": quantized_activations,
    "experts": experts,
    "decode": decode,
    "prefill": prefill,
    "throughput": throughput,
    "memory": memory,
}


def _of(records: Sequence[Record], benchmark: str, keep: Callable[[Record], bool] = lambda r: True) -> list[Record]:
    """Records of one benchmark that were made on a GPU."""
    return [r for r in records if r["benchmark"] == benchmark and r["gpu"] and keep(r)]


def _by_gpu(records: Sequence[Record], table: Callable[[list[Record]], str]) -> str:
    """One table per GPU and dtype, in order of appearance; nothing without records."""
    groups = _grouped(records, lambda r: (r["gpu"], r.get("dtype")))
    return "\n".join(table(members) for members in groups.values())


def _grouped(records: Iterable[Record], key: Callable[[Record], Hashable]) -> dict[Any, list[Record]]:
    groups: dict[Any, list[Record]] = {}
    for r in records:
        groups.setdefault(key(r), []).append(r)
    return groups


def _latest(records: Iterable[Record]) -> dict[str, Record]:
    """Name -> the last record of it."""
    return {r["name"]: r for r in records}


def _kernel_table(records: list[Record]) -> str:
    points = _grouped(records, lambda r: (r["scheme"], r["N"], r["K"], r["tokens"]))
    order = sorted(points, key=lambda p: (p[0], p[1] * p[2], p[1], p[3]))
    rows = [_latest(points[point]) for point in order]
    ours = [_taken(row) for row in rows]
    schemes = {scheme for scheme, *_ in order}
    several = len(schemes) > 1
    columns = {
        "scheme": [f"`{scheme}`" if several else MISSING for scheme, *_ in order],
        "N × K": _once([f"{N} × {K}" for _, N, K, _ in order]),
        "M": [str(M) for *_, M in order],
        "bitwright": [_time(r) for r in ours],
        "of roofline": [_form(r, "roofline_share", ".0%") for r in ours],
        **{title: [_time(row.get(name)) for row in rows] for name, title in OTHERS.items()},
        "times cuBLAS": [_ratio(row.get("dense"), r) for row, r in zip(rows, ours, strict=True)],
        "times the best peer": [_ratio(_best_peer(row), r) for row, r in zip(rows, ours, strict=True)],
    }
    if not several:
        del columns["scheme"]
    what = "" if several else f"`{min(schemes)}`, "
    return markdown(columns, ("scheme", "N × K")) + "\n" + _caption(records, what + "µs per call", "kernels")


def _splits(scheme: str) -> bool:
    """Whether more than the weight is quantized, or less: activations, columns apart, 2:4."""
    return "a16" not in scheme or "-o" in scheme or "-24" in scheme


def _split_table(records: list[Record]) -> str:
    points = _grouped(records, lambda r: (r["scheme"], r["N"], r["K"], r["tokens"]))
    order = sorted(points, key=lambda p: (p[0], p[1] * p[2], p[1], p[3]))
    rows = [_latest(points[point]) for point in order]
    ours, dense = [_taken(row) for row in rows], [row.get("dense") for row in rows]
    parts = {
        name: [None if r is None else row.get(f"{r['name']}: {name}") for row, r in zip(rows, ours, strict=True)]
        for name in ("quantize", "codes ready", "product alone")
    }
    columns = {
        "scheme": _once([f"`{scheme}`" for scheme, *_ in order]),
        "N × K": _once([f"{N} × {K}" for _, N, K, _ in order]),
        "M": [str(M) for *_, M in order],
        "cuBLAS": [_time(r) for r in dense],
        "bitwright": [_time(r) for r in ours],
        **{name: [_time(r) for r in parts[name]] for name in parts},
        "product, TOPS": [_base_rate(r) for r in parts["product alone"]],
        "times cuBLAS": [_ratio(d, r) for d, r in zip(dense, ours, strict=True)],
        **{
            f"... quantized once for {n}": [
                _shared_ratio(d, q, r, n)
                for d, q, r in zip(dense, parts["quantize"], parts["codes ready"], strict=True)
            ]
            for n in (2, 3)
        },
    }
    what = "µs per call; of a call: quantizing its input, all the rest, and of that the product without outliers"
    return markdown(columns, ("scheme", "N × K")) + "\n" + _caption(records, what, "kernels")


def _base_rate(r: Record | None) -> str:
    """Tera-operations per second of the product of base columns, which are those that are no outliers."""
    if r is None or r["status"] != "ok":
        return MISSING
    outliers = re.search(r"-o(\d+)", r["scheme"])
    columns = r["K"] - (int(outliers[1]) if outliers else 0)
    return f"{2e-12 * r['tokens'] * r['N'] * columns / _seconds(r):.0f}"


def _shared_ratio(dense: Record | None, quantize: Record | None, ready: Record | None, linears: int) -> str:
    """How many times cuBLAS's speed where so many linears share the quantized input: computed from its parts."""
    if dense is None or quantize is None or ready is None or dense["status"] != "ok":
        return MISSING
    return f"{_seconds(dense) / (_seconds(ready) + _seconds(quantize) / linears):.2f}"


def _expert_table(records: list[Record]) -> str:
    points = _grouped(records, lambda r: (r["scheme"], r["experts"], r["top_k"], r["N"], r["K"], r["tokens"]))
    order = sorted(points)
    rows = [_latest(points[point]) for point in order]
    ours = [_fastest(row, "ours") for row in rows]
    dense, grouped = ([_fastest(row, kind) for row in rows] for kind in ("dense", "peer"))
    columns = {
        "experts": [f"{k} of {E}" for _, E, k, *_ in order],
        "scheme": [f"`{point[0]}`" for point in order],
        "N × K": _once([f"{N} × {K}" for *_, N, K, _ in order]),
        "M": [str(point[-1]) for point in order],
        "bitwright": [_time(r) for r in ours],
        "of roofline": [_form(r, "roofline_share", ".0%") for r in ours],
        "a cuBLAS product each": [_time(r) for r in dense],
        "torch's grouped product": [_time(r) for r in grouped],
        "times the better": [
            _ratio(min((r for r in pair if r is not None), key=_seconds, default=None), mine)
            for pair, mine in zip(zip(dense, grouped, strict=True), ours, strict=True)
        ],
    }
    return markdown(columns, ("experts", "scheme", "N × K")) + "\n" + _caption(records, "µs per call", "kernels")


def _decode_table(records: list[Record]) -> str:
    rows = _of_models(records, ("batch", "context"))
    step = "ms per step" if any(r["batch"] > 1 for r in rows) else "ms per token"
    columns = {
        **_models_and_schemes(rows),
        "batch": [str(r["batch"]) for r in rows],
        "context": [str(r["context"]) for r in rows],
        step: [_milli(r, "seconds_per_token", ".2f") for r in rows],
        "ms per block": [_milli(r, "seconds_per_block", ".3f") for r in rows],
        "tokens/s": [_form(r, "tokens_per_second", ".0f") for r in rows],
        "in linears": [_form(r, "linear_share", ".0%") for r in rows],
        "weights, GB": [_giga(r, "weight_bytes") for r in rows],
        "times 16-bit": [_form(r, "speedup_over_dense", ".2f") for r in rows],
        "timed": [_depth(r) for r in rows],
    }
    return markdown(columns, ("model", "scheme")) + "\n" + _caption(records, "a step in a CUDA graph", "decode")


def _prefill_table(records: list[Record]) -> str:
    rows = _of_models(records, ("batch", "length", "layers_timed"))
    columns = {
        **_models_and_schemes(rows),
        "prompts": [f"{r['batch']} × {r['length']}" for r in rows],
        "ms": [_milli(r, "seconds", ".1f") for r in rows],
        "tokens/s": [_form(r, "tokens_per_second", ".0f") for r in rows],
        "times 16-bit": [_form(r, "speedup_over_dense", ".2f") for r in rows],
        "weights of 16-bit": [_form(r, "weight_share", ".0%") for r in rows],
        "activations at most, GB": [_giga(r, "activation_peak_bytes") for r in rows],
        "timed": [_depth(r) for r in rows],
    }
    return markdown(columns, ("model", "scheme")) + "\n" + _caption(records, "whole prompts", "prefill")


def _throughput_table(records: list[Record]) -> str:
    """A sweep over batches a row; compared at the largest batch, with 16 bits on as few GPUs as hold the model."""
    sweeps = _grouped(records, lambda r: (r["model"], r["context"], r["memory_bytes"], r["scheme"], r["gpus"]))
    of = [{r["batch"]: r for r in members} for members in sweeps.values()]
    full = [sweep[max(sweep)] for sweep in of]
    fewest = [
        min((d for d in full if _same_problem(d, r) and d["scheme"] == d["dtype"]), key=_gpus, default=None)
        for r in full
    ]
    rate = "tokens_per_second_per_gpu"
    doublings = sorted({b for sweep in of for b in sweep if b & (b - 1) == 0})
    columns = {
        **_models_and_schemes(full),
        "context": [str(r["context"]) for r in full],
        "GPUs": [str(r["gpus"]) for r in full],
        **{f"batch {b}": [_form(sweep.get(b), rate, ".0f") for sweep in of] for b in doublings},
        "largest batch": [f"batch {r['batch']}: {_form(r, rate, '.0f')}" for r in full],
        "times 16-bit on the fewest": [
            MISSING if d is None else f"{r[rate] / d[rate]:.2f}" for r, d in zip(full, fewest, strict=True)
        ],
    }
    notes = sorted({note for r in records if r.get("note") for note in r["note"].split("; ")})
    what = "; ".join(["tokens per second and GPU", *notes])
    return markdown(columns, ("model", "scheme")) + "\n" + _caption(records, what, "throughput")


def _same_problem(a: Record, b: Record) -> bool:
    return all(a[key] == b[key] for key in ("model", "context", "memory_bytes"))


def _gpus(r: Record) -> int:
    return int(r["gpus"])


def _of_models(records: Sequence[Record], keys: tuple[str, ...]) -> list[Record]:
    """The last record of every model, scheme and `keys`, in order of appearance of models and schemes."""
    groups = _grouped(records, lambda r: (r["model"], *(r.get(key, 0) for key in keys), r["scheme"]))
    models = list(dict.fromkeys(r["model"] for r in records))
    schemes = list(dict.fromkeys(r["scheme"] for r in records))
    rows = [members[-1] for members in groups.values()]
    return sorted(
        rows, key=lambda r: (models.index(r["model"]), *(r.get(k, 0) for k in keys), schemes.index(r["scheme"]))
    )


def _models_and_schemes(rows: Sequence[Record]) -> dict[str, list[str]]:
    schemes = ["16-bit" if r["scheme"] == r["dtype"] else f"`{r['scheme']}`" for r in rows]
    notes = ["" if r["status"] == "ok" else f" ({r['status']})" for r in rows]
    return {
        "model": _once([r["model"] for r in rows]),
        "scheme": [scheme + note for scheme, note in zip(schemes, notes, strict=True)],
    }


def _depth(r: Record) -> str:
    """How much of the model was timed, and whether one GPU holds it; nothing to say where it does and it was all."""
    if r["status"] != "ok":
        return MISSING
    said = [] if r["layers_timed"] == r["layers"] else [f"{r['layers_timed']} of {r['layers']} blocks"]
    if r.get("fits_this_gpu") is False:
        said.append("does not fit one GPU")
    return "; ".join(said) or MISSING


def _memory_table(records: list[Record]) -> str:
    points = _grouped(records, lambda r: (r["model"], r["batch"], r["context"], r["memory_bytes"], r["scheme"]))
    rows = [members[-1] for members in points.values()]
    rows.sort(key=lambda r: (r["parameters"], r["batch"], r["context"], -r["bits_per_weight"]))
    columns = {
        "model": _once([r["model"] for r in rows]),
        "scheme": [f"`{r['scheme']}`" for r in rows],
        "bits per weight": [f"{r['bits_per_weight']:.2f}" for r in rows],
        "weights, GB": [_giga(r, "weights_bytes") for r in rows],
        "other parameters, GB": [_giga(r, "other_bytes") for r in rows],
        "batch × context": [f"{r['batch']} × {r['context']}" for r in rows],
        "cache, GB": [_giga(r, "cache_bytes") for r in rows],
        "workspace, GB": [_giga(r, "workspace_bytes") for r in rows],
        "total, GB": [_giga(r, "total_bytes") for r in rows],
        "largest batch": [f"{r['largest_batch']} in {_giga(r, 'memory_bytes')} GB" for r in rows],
    }
    return markdown(columns, ("model", "scheme")) + "\n" + _caption(records, "computed from shapes, checked", "memory")


def _taken(row: Mapping[str, Record]) -> Record | None:
    """What an ordinary call runs; None if it was not measured."""
    return next((r for r in row.values() if r["kind"] == "ours" and r["chosen"]), None)


def _fastest(row: Mapping[str, Record], kind: str) -> Record | None:
    timed = [r for r in row.values() if r["kind"] == kind and r["status"] == "ok"]
    return min(timed, key=_seconds, default=None)


def _best_peer(row: Mapping[str, Record]) -> Record | None:
    return _fastest(row, "peer")


def _seconds(r: Record) -> float:
    return float(r["seconds"])


def _time(r: Record | None) -> str:
    """Microseconds; the status of what was found wrong or failed."""
    if r is None or r["status"] == "absent":
        return MISSING
    return f"{1e6 * _seconds(r):.1f}" if r["status"] == "ok" else str(r["status"])


def _ratio(slow: Record | None, fast: Record | None) -> str:
    if slow is None or fast is None or slow["status"] != "ok" or fast["status"] != "ok":
        return MISSING
    return f"{_seconds(slow) / _seconds(fast):.2f}"


def _form(r: Record | None, key: str, spec: str, factor: float = 1.0) -> str:
    return MISSING if r is None or r.get(key) is None else format(r[key] * factor, spec)


def _milli(r: Record, key: str, spec: str) -> str:
    return MISSING if r.get(key) is None else format(1e3 * r[key], spec)


def _giga(r: Record, key: str) -> str:
    if r.get(key) is None:
        return MISSING
    value = r[key] / 1e9
    return f"{value:.{2 if value < 100 else 0}f}"


def _once(cells: list[str]) -> list[str]:
    """The same with every repetition of the cell above left empty."""
    return [cell if i == 0 or cell != cells[i - 1] else "" for i, cell in enumerate(cells)]


def _caption(records: Sequence[Record], what: str, command: str) -> str:
    """How the numbers were made, from the records."""
    said = [what]
    gpus = sorted({r["gpu"] for r in records})
    versions = sorted({f"torch {r['versions']['torch']}, Triton {r['versions']['triton']}" for r in records})
    said.append(f"{' or '.join(gpus)}, {' or '.join(versions)}")
    bandwidths = sorted(r["ceiling_bytes_per_second"] for r in records if "ceiling_bytes_per_second" in r)
    if bandwidths:
        rates = sorted(r["ceiling_flops_per_second"] for r in records)
        said.append(
            f"roofline: this machine's bandwidth ({bandwidths[len(bandwidths) // 2] / 1e12:.2f} TB/s, of a copy or a "
            f"sum) or {records[0]['dtype']} rate ({rates[len(rates) // 2] / 1e12:.0f} TFLOP/s), whichever is the "
            "longer way"
        )
        said.append("medians over rounds in which all take turns, weights outside the cache")
    return f"{'; '.join(said)}. Records: `benchmarks/gpu.jsonl`, made by `bitwright bench {command}`.\n"
