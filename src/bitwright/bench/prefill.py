"""How long a prompt takes: whole models or single blocks at real shapes, quantized and in 16 bits.

The same models and the same care as in `decode`; here M is batch times prompt length, linears are bound by arithmetic,
and attention is torch's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitwright.bench import timing
from bitwright.bench.correctness import prompts
from bitwright.bench.decode import Prepared, variants
from bitwright.bench.fitting import block_bytes
from bitwright.bench.kernels import DTYPES, Progress
from bitwright.bench.model import Decoder, State, make_state
from bitwright.bench.records import FAILED, OK, Record, failure, stamp
from bitwright.bench.shapes import ModelShape
from bitwright.devices import choose_device
from bitwright.errors import BitwrightError

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Options:
    """What to measure: prompts (batch, tokens each) of `shape`.

    layers: blocks to time, None for all where they fit. baseline: time the 16-bit model too.
    """

    shape: ModelShape
    schemes: tuple[str, ...] = ("w4a16-g128",)
    prompts: tuple[tuple[int, int], ...] = ((1, 512), (1, 2048))
    layers: int | None = None
    baseline: bool = True
    dtype: str = "bfloat16"
    device: str = "auto"
    repeats: int = timing.REPEATS
    command: str | None = None


def run(options: Options, progress: Progress | None = None) -> list[Record]:
    """All records of `measure`."""
    return [record for records in measure(options, progress) for record in records]


@torch.no_grad()
def measure(options: Options, progress: Progress | None = None) -> Iterator[list[Record]]:
    """The records of one prompt size after the other, the baseline first."""
    shape = options.shape
    if not options.prompts or min(min(p) for p in options.prompts) < 1 or options.repeats < 1:
        raise BitwrightError(f"prompts {list(options.prompts)}, repeats {options.repeats}: all must be at least 1")
    wanted = variants(options.dtype, options.schemes, options.baseline)
    device, dtype = choose_device(options.device), DTYPES[options.dtype]
    head = stamp(device, options.command) | {"benchmark": "prefill", "model": shape.name, "dtype": options.dtype}
    most = max(batch * length for batch, length in options.prompts)
    # Of what a block leaves behind, the widest tensors: gate, up and their product, once for every variant's graph.
    passing = most * (3 * shape.intermediate * max(1, shape.top_k) + 8 * shape.hidden) * len(wanted)
    cache = (shape.kv_cache_values(most, 1) + passing) * dtype.itemsize
    prepared = Prepared.of(shape, wanted, cache, options.layers, dtype, device)
    for done, (batch, length) in enumerate(options.prompts):
        if progress is not None:
            progress("prefill", done, len(options.prompts), f"{shape.name} {batch}x{length}")
        records = _time(prepared, shape, batch, length, dtype, device, options)
        yield [head | {"batch": batch, "length": length} | record for record in records]
        if device.type == "cuda":
            torch.cuda.empty_cache()  # capturing a graph cannot give memory back, so it is done before the next one
    if progress is not None:
        progress("prefill", len(options.prompts), len(options.prompts), "")


def _time(
    prepared: Prepared,
    shape: ModelShape,
    batch: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
    options: Options,
) -> list[Record]:
    state = make_state(shape, prepared.most, batch, length, dtype, device)
    ids = prompts(shape, batch, length, device)
    rounds: dict[str, timing.Round] = {}
    failed: dict[str, str] = {}
    peaks: dict[str, int | None] = {}
    for name, model in prepared.models.items():
        own: dict[str, timing.Round] = {}
        try:
            peaks[name] = _peak(model, state.first(prepared.depths[name].many), ids)
            for n in prepared.depths[name].counts:
                part, of_part = model.first(n), state.first(n)
                own[f"{name} {n}"] = timing.ready([lambda m=part, s=of_part: m.prefill(s, ids)], device)
        except Exception as e:  # as in `decode.Prepared.of`
            failed[name] = failure(e)
            continue
        rounds |= own
    spent = timing.interleaved(rounds, options.repeats, device)
    tokens, dense = batch * length, None
    active = shape.linear_weights if not shape.experts else _active_weights(shape)
    records: list[Record] = []
    for name, depth in prepared.depths.items():
        if name in failed:
            records.append({"scheme": name, "status": FAILED, "reason": failed[name]})
            continue
        seconds = {n: spent[f"{name} {n}"].seconds for n in depth.counts}
        total, deepest = depth.total(seconds), spent[f"{name} {depth.many}"]
        if prepared.schemes[name] is None:
            dense = total
        verdict = prepared.verdicts.get(name)
        records.append(
            {
                "scheme": name,
                "status": OK,
                "method": depth.method,
                "layers": shape.layers,
                "layers_timed": depth.many,
                "seconds": total,
                "seconds_low": total * deepest.low / deepest.seconds,
                "seconds_high": total * deepest.high / deepest.seconds,
                "seconds_per_block": depth.block(seconds),
                "weight_bytes_per_block": prepared.models[name].block_bytes,
                "weight_share": prepared.models[name].block_bytes / block_bytes(shape, None, dtype),
                "activation_peak_bytes": peaks[name],
                "tokens_per_second": tokens / total,
                "flops_per_second": 2 * active * tokens / total,
                "relative_error": None if verdict is None else verdict.error,
                "speedup_over_dense": None if dense is None else dense / total,
            }
        )
    return records + prepared.missing()


def _peak(model: Decoder, state: State, ids: Tensor) -> int | None:
    """Bytes that one run takes at most beside weights and caches; None where torch does not count them."""
    if ids.device.type != "cuda":
        return None
    model.prefill(state, ids)  # workspaces that stay are not the run's own
    torch.cuda.synchronize(ids.device)
    torch.cuda.reset_peak_memory_stats(ids.device)
    before = torch.cuda.memory_allocated(ids.device)
    model.prefill(state, ids)
    torch.cuda.synchronize(ids.device)
    return torch.cuda.max_memory_allocated(ids.device) - before


def _active_weights(shape: ModelShape) -> int:
    """Weights of the linears that one token meets."""
    per_block = sum(x.weights // x.count * min(x.count, shape.top_k) for x in shape.linears)
    return shape.layers * per_block


def table(records: Sequence[Mapping[str, Any]]) -> Table:
    """The records for people."""
    from rich import box
    from rich.table import Table

    methods = dict.fromkeys(f"{r['scheme']}: {r['method']}" for r in records if r["status"] == OK)
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption="; ".join(methods), caption_justify="left")
    for title in ("model", "scheme"):
        shown.add_column(title)
    for title in (
        "prompt", "ms", "±", "ms/block", "tokens/s", "TFLOP/s in linears", "x 16-bit", "weights of 16-bit", "peak, MB"
    ):  # fmt: skip
        shown.add_column(title, justify="right")
    for r in records:
        where = (r["model"], r["scheme"], f"{r['batch']}x{r['length']}")
        if r["status"] != OK:
            shown.add_row(*where, f"{r['status']}: {r['reason']}")
            continue
        speedup = r["speedup_over_dense"]
        shown.add_row(
            *where,
            f"{r['seconds'] * 1e3:.2f}",
            f"{(r['seconds_high'] - r['seconds_low']) * 5e2:.2f}",
            f"{r['seconds_per_block'] * 1e3:.3f}",
            f"{r['tokens_per_second']:.0f}",
            f"{r['flops_per_second'] / 1e12:.3g}",
            "" if speedup is None else f"{speedup:.2f}",
            f"{r['weight_share']:.0%}",
            "" if r["activation_peak_bytes"] is None else f"{r['activation_peak_bytes'] / 1e6:.0f}",
        )
    return shown
