"""How long one more token takes: whole models at real shapes, caches included, quantized and in 16 bits.

A step is everything from token ids to token ids: embedding, all blocks with their attention over `context` cached
tokens, head, argmax. Some steps are captured in one CUDA graph, the next token feeding the next step; the models
compared share their tables and caches and take turns. Of a model for which there is no room beside the others, two
depths are timed, and the difference is that of blocks alone (`fitting.Depth`; a record says how it was made, and
whether one GPU holds the whole model at all). Before that a tiny model of the kind has to be right (`correctness`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from bitwright.bench import timing
from bitwright.bench.correctness import Verdict, check
from bitwright.bench.fitting import Depth, block_bytes, choose_depths, fits, free_bytes, model_bytes
from bitwright.bench.kernels import DTYPES, Progress
from bitwright.bench.linears import DenseExperts
from bitwright.bench.mlp import MoE
from bitwright.bench.model import Decoder, State, make_model, make_state, make_tables
from bitwright.bench.records import FAILED, OK, WRONG, Record, failure, stamp
from bitwright.bench.shapes import ModelShape
from bitwright.devices import choose_device
from bitwright.errors import BitwrightError
from bitwright.scheme import Scheme

if TYPE_CHECKING:
    from rich.table import Table

DENSE_ROWS = 32  # rows up to which 16-bit experts are also timed with the kernel for few rows


@dataclass(frozen=True)
class Options:
    """What to measure: a step of `shape` with every batch, after `context` cached tokens.

    layers: blocks to time, None for all where they fit. baseline: time the 16-bit model too. tokens: steps per round.
    """

    shape: ModelShape
    schemes: tuple[str, ...] = ("w4a16-g128",)
    batches: tuple[int, ...] = (1,)
    context: int = 512
    layers: int | None = None
    baseline: bool = True
    tokens: int = 4
    dtype: str = "bfloat16"
    device: str = "auto"
    repeats: int = timing.REPEATS
    command: str | None = None


@dataclass(frozen=True)
class Variant:
    """A model to be timed: its name in records ("bfloat16" for the baseline) and its scheme, None for 16 bits."""

    name: str
    scheme: Scheme | None


def variants(dtype: str, schemes: Sequence[str], baseline: bool) -> list[Variant]:
    """The baseline, if wanted, and the schemes; BitwrightError for what is not to be measured."""
    if dtype not in ("bfloat16", "float16"):
        raise BitwrightError(f"dtype {dtype!r} is not measured here; choose bfloat16 or float16")
    return [Variant(dtype, None)] * baseline + [Variant(s, Scheme.parse(s)) for s in schemes]


def run(options: Options, progress: Progress | None = None) -> list[Record]:
    """All records of `measure`."""
    return [record for records in measure(options, progress) for record in records]


@torch.no_grad()
def measure(options: Options, progress: Progress | None = None) -> Iterator[list[Record]]:
    """The records of one batch after the other, the baseline first."""
    shape = options.shape
    if min(options.batches, default=0) < 1 or options.context < 1 or options.tokens < 1 or options.repeats < 1:
        raise BitwrightError(
            f"batches {list(options.batches)}, context {options.context}, tokens {options.tokens}, repeats "
            f"{options.repeats}: all must be at least 1"
        )
    wanted = variants(options.dtype, options.schemes, options.baseline)
    device, dtype = choose_device(options.device), DTYPES[options.dtype]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    head = stamp(device, options.command) | {
        "benchmark": "decode",
        "model": shape.name,
        "dtype": options.dtype,
        "context": options.context,
    }
    capacity = options.context + options.tokens
    cache = shape.kv_cache_values(max(options.batches), capacity) * dtype.itemsize
    prepared = Prepared.of(shape, wanted, cache, options.layers, dtype, device)
    for done, batch in enumerate(options.batches):
        if progress is not None:
            progress("decode", done, len(options.batches), f"{shape.name} batch {batch}")
        state = make_state(shape, prepared.most, batch, capacity, dtype, device)
        timed, failed = time_steps(
            prepared.models, prepared.depths, state, options.context, options.tokens, options.repeats
        )
        cache = shape.kv_cache_values(batch, capacity) * dtype.itemsize
        extra = {
            "batch": batch,
            "cache_bytes": cache,
            # Of several models side by side the peak would belong to none of them.
            "peak_bytes": torch.cuda.max_memory_allocated(device)
            if device.type == "cuda" and len(wanted) == 1
            else None,
        }
        lost = [{"scheme": name, "status": FAILED, "reason": reason} for name, reason in failed.items()]
        made = _records(prepared, timed, batch, cache, shape, options.dtype, device)
        yield [head | extra | record for record in made + lost]
        del state
        if device.type == "cuda":
            torch.cuda.empty_cache()  # capturing a graph cannot give memory back, so it is done before the next one
    if progress is not None:
        progress("decode", len(options.batches), len(options.batches), "")


@dataclass(frozen=True)
class Prepared:
    """Models over common tables, each deep enough to be timed; `verdicts` and `failed` say which ones are not there."""

    models: dict[str, Decoder]
    depths: dict[str, Depth]
    schemes: dict[str, Scheme | None]
    verdicts: dict[str, Verdict]
    failed: dict[str, str]

    @classmethod
    def of(
        cls,
        shape: ModelShape,
        wanted: Sequence[Variant],
        cache: int,
        asked: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Prepared:
        """cache: bytes of the caches of a whole model. asked: layers to time, None for as many as fit."""
        room = free_bytes(device) - shape.other_weights * dtype.itemsize - cache
        quantized_first = sorted(wanted, key=lambda v: v.scheme is None)
        sizes = {v.name: block_bytes(shape, v.scheme, dtype) for v in quantized_first}
        depths = choose_depths(shape.layers, sizes, asked, room)
        made = cls({}, {}, {v.name: v.scheme for v in wanted}, {}, {})
        tables = make_tables(shape, dtype, device)
        for v in wanted:
            depth = depths[v.name]
            try:
                if v.scheme is not None:
                    made.verdicts[v.name] = check(shape, v.scheme, dtype, device)
                    if made.verdicts[v.name].reason is not None:
                        continue
                made.models[v.name] = make_model(shape, v.scheme, tables, depth.many)
                made.depths[v.name] = depth
            except Exception as e:  # Triton's errors have no common base; one scheme that cannot run leaves the others
                made.failed[v.name] = failure(e)
        return made

    @property
    def most(self) -> int:
        """Blocks of the deepest model."""
        return max((depth.many for depth in self.depths.values()), default=1)

    def missing(self) -> list[Record]:
        """A record for every model that is not timed."""
        wrong = [
            {"scheme": name, "status": WRONG, "reason": v.reason, "relative_error": v.error}
            for name, v in self.verdicts.items()
            if v.reason is not None
        ]
        return wrong + [{"scheme": name, "status": FAILED, "reason": reason} for name, reason in self.failed.items()]


@dataclass(frozen=True)
class Step:
    """Seconds of one step of the whole model, of one block, and of the linears of all blocks alone."""

    seconds: float
    low: float
    high: float
    block: float
    linears: float
    note: str | None = None


def time_steps(
    models: Mapping[str, Decoder],
    depths: Mapping[str, Depth],
    state: State,
    context: int,
    tokens: int,
    repeats: int,
) -> tuple[dict[str, Step], dict[str, str]]:
    """Seconds of a step after `context` tokens, the models taking turns; and why, of those that could not be run.

    The models share `state`, which must be as deep as the deepest and have room for `tokens` more.
    """
    device, batch = state.ids.device, state.ids.shape[0]
    kinds: dict[str, list[tuple[str | None, Decoder]]] = {}
    rounds: dict[str, timing.Round] = {}
    failed: dict[str, str] = {}
    for name, model in models.items():
        own: dict[str, timing.Round] = {}
        try:
            kinds[name] = [(None, model), *_other_methods(model, batch, device)]
            for note, kind in kinds[name]:
                for n in depths[name].counts:
                    steps_of = _steps(kind.first(n), state.first(n), context, tokens)
                    own[f"{name} {note} {n}"] = timing.ready([steps_of], device)
                own[f"{name} {note} linears"] = timing.ready(kind.linear_calls(batch), device)
        except Exception as e:  # as in `Prepared.of`
            failed[name] = failure(e)
            continue
        rounds |= own
    spent = timing.interleaved(rounds, repeats, device)
    result = {}
    for name, depth in depths.items():
        if name in failed:
            continue
        steps = []
        for note, kind in kinds[name]:
            at = {n: spent[f"{name} {note} {n}"] for n in depth.counts}
            linears = spent[f"{name} {note} linears"]
            whole = depth.total({n: t.seconds for n, t in at.items()}) / tokens
            deepest = at[depth.many]
            steps.append(
                Step(
                    whole,
                    whole * deepest.low / deepest.seconds,
                    whole * deepest.high / deepest.seconds,
                    depth.block({n: t.seconds for n, t in at.items()}) / tokens,
                    linears.seconds * linears.calls / len(kind.blocks) * depth.layers,
                    note,
                )
            )
        result[name] = min(steps, key=lambda step: step.seconds)
    return result, failed


def _steps(model: Decoder, state: State, context: int, tokens: int) -> timing.Call:
    """`tokens` steps from position `context` on."""
    start = torch.full_like(state.positions, context)

    def call() -> None:
        state.positions.copy_(start)
        for _ in range(tokens):
            model.step(state)

    return call


def _other_methods(model: Decoder, batch: int, device: torch.device) -> list[tuple[str, Decoder]]:
    """A 16-bit model with experts by the other method as well: the baseline is the faster of the two."""
    mlp = model.blocks[0].mlp
    few = device.type == "cuda" and isinstance(mlp, MoE) and batch * mlp.top_k <= DENSE_ROWS
    if not few or not isinstance(mlp, MoE) or not isinstance(mlp.up, DenseExperts):
        return []
    blocks = []
    for block in model.blocks:
        moe = block.mlp
        assert isinstance(moe, MoE) and isinstance(moe.up, DenseExperts) and isinstance(moe.down, DenseExperts)
        blocks.append(replace(block, mlp=replace(moe, up=moe.up.by("rows"), down=moe.down.by("rows"))))
    return [("experts by rows", replace(model, blocks=tuple(blocks)))]


def _records(
    prepared: Prepared,
    timed: Mapping[str, Step],
    batch: int,
    cache: int,
    shape: ModelShape,
    baseline: str,
    device: torch.device,
) -> list[Record]:
    dense = timed.get(baseline)
    records = []
    for name, step in timed.items():
        depth, model = prepared.depths[name], prepared.models[name]
        verdict = prepared.verdicts.get(name)
        weights = model.block_bytes * shape.layers + model.tables.nbytes
        records.append(
            {
                "scheme": name,
                "status": OK,
                "method": depth.method,
                "note": step.note,
                "layers": shape.layers,
                "layers_timed": depth.many,
                "seconds_per_token": step.seconds,
                "seconds_low": step.low,
                "seconds_high": step.high,
                "seconds_per_block": step.block,
                "tokens_per_second": batch / step.seconds,
                "linear_seconds": step.linears,
                "linear_share": step.linears / step.seconds,
                "weight_bytes": weights,
                "total_bytes": weights + cache,
                "fits_this_gpu": fits(weights + cache, device),
                "model_bytes_16bit": model_bytes(shape, None, model.tables.embedding.dtype),
                "relative_error": None if verdict is None else verdict.error,
                "speedup_over_dense": None if dense is None else dense.seconds / step.seconds,
            }
        )
    return records + prepared.missing()


def table(records: Sequence[Mapping[str, Any]]) -> Table:
    """The records for people."""
    from rich import box
    from rich.table import Table

    timed = [r for r in records if r["status"] == OK]
    caption = "; ".join(dict.fromkeys(f"{r['scheme']}: {r['method']}" for r in timed))
    if not all(r["fits_this_gpu"] for r in timed):
        caption += "; ! with its cache, more than this device holds"
    step = "ms/step" if any(r["batch"] > 1 for r in records) else "ms/token"
    columns = (
        "batch",
        "context",
        step,
        "±",
        "ms/block",
        "tokens/s",
        "in linears",
        "weights GB",
        "cache GB",
        "x 16-bit",
    )
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")
    for title in ("model", "scheme"):
        shown.add_column(title)
    for title in columns:
        shown.add_column(title, justify="right")
    for r in records:
        where = (r["model"], r["scheme"], str(r["batch"]), str(r["context"]))
        if r["status"] != OK:
            shown.add_row(*where, f"{r['status']}: {r['reason']}")
            continue
        speedup = r["speedup_over_dense"]
        shown.add_row(
            *where,
            f"{r['seconds_per_token'] * 1e3:.3f}",
            f"{(r['seconds_high'] - r['seconds_low']) * 5e2:.3f}",
            f"{r['seconds_per_block'] * 1e3:.3f}",
            f"{r['tokens_per_second']:.1f}",
            f"{r['linear_share']:.0%}",
            f"{r['weight_bytes'] / 1e9:.2f}" + ("" if r["fits_this_gpu"] else " !"),
            f"{r['cache_bytes'] / 1e9:.2f}",
            "" if speedup is None else f"{speedup:.2f}",
        )
    return shown
