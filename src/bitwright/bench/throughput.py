"""Tokens per second and GPU when memory is full: what quantization buys a server.

A step of twice the sequences takes hardly longer until arithmetic or the caches dominate, so throughput grows with the
batch, and the batch is limited by the memory that weights leave to caches. For every model the batch is doubled until
its caches, at a stated length, fill one GPU.

The fewest GPUs that hold a model, by tensor parallelism, may leave little to its caches; so those and twice as many are
measured, in 16 bits and quantized, and the better counts. Of several GPUs one rank's share is timed; the all-reduces
between ranks are left out, which favours whoever needs more of them. Where only some blocks are timed, that all of them
and their caches fit is computed, not tried, and the record says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bitwright.bench.decode import Prepared, Variant, time_steps, variants
from bitwright.bench.fitting import fewest_gpus, largest_batch, model_bytes, rank_shape, total_bytes
from bitwright.bench.kernels import DTYPES, Progress
from bitwright.bench.model import make_state
from bitwright.bench.records import ABSENT, FAILED, OK, Record, failure, stamp
from bitwright.bench.shapes import ModelShape
from bitwright.devices import choose_device
from bitwright.errors import BitwrightError

if TYPE_CHECKING:
    from rich.table import Table

_COMPUTED = "batches computed to fit, timed on some of the blocks"
_UNCOUNTED = "one rank of tensor parallelism; communication between ranks is not counted"


@dataclass(frozen=True)
class Options:
    """What to measure: batches of sequences of `context` tokens, from 1 until a GPU of `memory` bytes is full.

    memory: None for that of the device. largest: stop at this batch. layers: blocks to time, None for as many as are
    needed to time one.
    """

    shape: ModelShape
    schemes: tuple[str, ...] = ("w4a16-g128",)
    context: int = 512
    memory: int | None = None
    largest: int = 1024
    layers: int | None = None
    baseline: bool = True
    dtype: str = "bfloat16"
    device: str = "auto"
    repeats: int = 5
    command: str | None = None


def run(options: Options, progress: Progress | None = None) -> list[Record]:
    """All records of `measure`, then their `summary`."""
    records = [record for records in measure(options, progress) for record in records]
    return records + summary(records)


@torch.no_grad()
def measure(options: Options, progress: Progress | None = None) -> Iterator[list[Record]]:
    """The records of one model after the other and number of GPUs: a whole sweep, smallest batch first."""
    if options.context < 2 or options.largest < 1 or options.repeats < 1:
        raise BitwrightError(
            f"context {options.context}, largest {options.largest}, repeats {options.repeats}: at least 2, 1 and 1"
        )
    wanted = variants(options.dtype, options.schemes, options.baseline)
    device, dtype = choose_device(options.device), DTYPES[options.dtype]
    memory = total_bytes(device) if options.memory is None else options.memory
    head = stamp(device, options.command) | {
        "benchmark": "throughput",
        "model": options.shape.name,
        "dtype": options.dtype,
        "context": options.context,
        "memory_bytes": memory,
    }
    for done, v in enumerate(wanted):
        if progress is not None:
            progress("throughput", done, len(wanted), f"{options.shape.name} {v.name}")
        for gpus, rank in _spreads(v, options, memory, dtype):
            swept = _sweep(v, gpus, rank, options, memory, dtype, device)
            yield [head | {"scheme": v.name} | record for record in swept]
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if progress is not None:
        progress("throughput", len(wanted), len(wanted), "")


def _spreads(v: Variant, options: Options, memory: int, dtype: torch.dtype) -> list[tuple[int, ModelShape]]:
    """Numbers of GPUs to put a model on, and a rank's share: the fewest that hold it, and twice as many."""
    gpus, rank = fewest_gpus(options.shape, v.scheme, dtype, options.context, memory)
    half = rank_shape(options.shape, 2 * gpus)
    return [(gpus, rank)] if half is None else [(gpus, rank), (2 * gpus, half)]


def _sweep(
    v: Variant,
    gpus: int,
    rank: ModelShape,
    options: Options,
    memory: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[Record]:
    context = options.context
    most = min(options.largest, largest_batch(rank, v.scheme, dtype, context, memory))
    # A whole model would leave its caches no room here: with all memory spoken for, two depths are timed.
    prepared = Prepared.of(rank, [v], memory, options.layers, dtype, device)
    yield from prepared.missing()
    depth = prepared.depths.get(v.name)
    if depth is None:
        return
    notes = [_UNCOUNTED] * (gpus > 1) + [_COMPUTED] * (depth.few is not None)
    for batch in batches(most):
        record: Record = {
            "gpus": gpus,
            "batch": batch,
            "largest_batch": most,
            "note": "; ".join(notes) or None,
            "weight_bytes_per_gpu": model_bytes(rank, v.scheme, dtype),
            "cache_bytes_per_gpu": rank.kv_cache_values(batch, context) * dtype.itemsize,
        }
        try:
            state = make_state(rank, prepared.most, batch, context, dtype, device)
        except torch.OutOfMemoryError as e:
            yield record | {"status": ABSENT, "reason": failure(e)}
            return
        steps, failed = time_steps(prepared.models, prepared.depths, state, context - 1, 1, options.repeats)
        del state
        if device.type == "cuda":
            torch.cuda.empty_cache()  # capturing a graph cannot give memory back, so it is done before the next one
        if failed:
            yield record | {"status": FAILED, "reason": failed[v.name]}
            return
        step = steps[v.name]
        yield record | {
            "status": OK,
            "method": depth.method,
            "layers_timed": depth.many,
            "seconds_per_token": step.seconds,
            "seconds_low": step.low,
            "seconds_high": step.high,
            "tokens_per_second": batch / step.seconds,
            "tokens_per_second_per_gpu": batch / step.seconds / gpus,
            "linear_share": step.linears / step.seconds,
        }


def batches(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    doubled = [1 << i for i in range(most.bit_length())]
    return doubled if doubled[-1] == most else [*doubled, most]


def summary(records: Sequence[Mapping[str, Any]]) -> list[Record]:
    """The best record of every scheme once more, with its gain over the best of 16 bits."""
    best: dict[str, Mapping[str, Any]] = {}
    for r in records:
        if r["status"] == OK:
            known = best.get(r["scheme"])
            if known is None or r["tokens_per_second_per_gpu"] > known["tokens_per_second_per_gpu"]:
                best[r["scheme"]] = r
    dense = next((r for name, r in best.items() if name == r["dtype"]), None)
    per_gpu = "tokens_per_second_per_gpu"
    return [
        {
            **r,
            "benchmark": "throughput-best",
            "speedup_over_dense": None if dense is None else r[per_gpu] / dense[per_gpu],
        }
        for r in best.values()
    ]


def table(records: Sequence[Mapping[str, Any]]) -> Table:
    """The records for people; a best has its gain in the last column."""
    from rich import box
    from rich.table import Table

    caption = "; ".join(dict.fromkeys(f"{r['scheme']}: {r['note']}" for r in records if r.get("note")))
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")
    for title in ("model", "scheme"):
        shown.add_column(title)
    for title in ("GPUs", "batch", "ms/step", "tokens/s", "tokens/s/GPU", "cache GB", "best, x 16-bit"):
        shown.add_column(title, justify="right")
    for r in records:
        if r["status"] != OK:
            shown.add_row(r["model"], r["scheme"], "", str(r.get("batch", "")), f"{r['status']}: {r['reason']}")
            continue
        best = r["benchmark"] == "throughput-best"
        speedup = r.get("speedup_over_dense")
        shown.add_row(
            r["model"],
            r["scheme"],
            str(r["gpus"]),
            str(r["batch"]),
            f"{r['seconds_per_token'] * 1e3:.2f}",
            f"{r['tokens_per_second']:.0f}",
            f"{r['tokens_per_second_per_gpu']:.0f}",
            f"{r['cache_bytes_per_gpu'] / 1e9:.1f}",
            "" if not best else "best" if speedup is None else f"{speedup:.2f}",
        )
    return shown
