"""`bitwright bench kernels | decode | prefill | throughput | memory`: speed and bytes, measured on this machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitwright.cli import options, output
from bitwright.errors import BitwrightError

if TYPE_CHECKING:
    from bitwright.bench.shapes import ModelShape

Shapes = Annotated[
    list[str] | None,
    typer.Option(metavar="NxK", help="Outputs x inputs; repeatable.", show_default="six of real models"),
]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="NAME", help="Shape of a published model: llama-2-7b, opt-175b, ...; repeatable."),
]
Schemes = Annotated[list[str] | None, typer.Option(metavar="SCHEME", help="Repeatable.", show_default="w4a16-g128")]
Layers = Annotated[int | None, typer.Option(help="Blocks to time.", show_default="all, where they fit")]
Baseline = Annotated[bool, typer.Option(help="Also time the model in 16 bits.")]
Fit = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Memory to fill, such as 24GB.", show_default="the GPU's")
]
Dtype = Annotated[str, typer.Option(help="Of activations: bfloat16 or float16.")]
Repeats = Annotated[int, typer.Option(help="Rounds; the median over them is reported.")]
Records = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Append every measurement to this file, one JSON line each.")
]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure speed and memory here, beside 16-bit weights and the machine's limits.",
)


@app.command()
def kernels(
    shape: Shapes = None,
    tokens: Annotated[str, typer.Option(help="Numbers of tokens M, separated by commas.")] = "1,16,64,256,2048",
    scheme: Schemes = None,
    dtype: Dtype = "bfloat16",
    peer: Annotated[
        list[str] | None,
        typer.Option(help="dense, tinygemm, humming or gemlite; repeatable; none: ours alone.", show_default="all"),
    ] = None,
    experts: Annotated[int, typer.Option(help="Measure a stack of so many experts of that shape.")] = 0,
    top_k: Annotated[int, typer.Option(help="Experts of each token, with --experts.")] = 2,
    repeats: Repeats = 20,
    device: options.Device = "auto",
    records: Records = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Time one packed linear: ours, 16-bit weights, and other people's kernels.

    \b
    bitwright bench kernels --shape 22016x4096 --tokens 1,16,256 --scheme w4a16-g128
    bitwright bench kernels --shape 4096x4096 --scheme w3a16-g64 --scheme w2a16-g64 --peer dense
    bitwright bench kernels --shape 28672x4096 --experts 8 --top-k 2

    Every kernel is compared with float64 first; one that is wrong is reported as wrong, not timed, and the exit code is
    1. Times are medians over rounds in which all take turns, on weights that are not in the cache. The roofline is what
    this machine's bandwidth and 16-bit rate allow, both measured in the same run.
    """
    started = time.perf_counter()
    with output.one_line_errors(debug):
        from bitwright.bench import experts as stacks
        from bitwright.bench import kernels as bench
        from bitwright.bench.peers import PEERS
        from bitwright.bench.shapes import KERNEL_SHAPES, parse_shape

        if peer and experts:
            raise BitwrightError("--peer goes without --experts: a stack of experts is measured against torch alone")
        asked = bench.Options(
            shapes=tuple(map(parse_shape, shape)) if shape else KERNEL_SHAPES,
            tokens=_numbers("tokens", tokens),
            schemes=tuple(scheme or ("w4a16-g128",)),
            dtype=dtype,
            device=device,
            peers=PEERS if not peer else () if peer == ["none"] else tuple(peer),
            repeats=repeats,
            command=_command(),
        )
        with output.shown_progress() as progress:
            batches = stacks.measure(asked, experts, top_k, progress) if experts else bench.measure(asked, progress)
            found = _kept(batches, records)
        _show("kernels", found, bench.table, started, json)


@app.command()
def decode(
    model: Models = None,
    scheme: Schemes = None,
    batch: Annotated[str, typer.Option(help="Numbers of sequences, separated by commas.")] = "1",
    context: Annotated[int, typer.Option(help="Tokens already in the cache.")] = 512,
    layers: Layers = None,
    baseline: Baseline = True,
    dtype: Dtype = "bfloat16",
    repeats: Repeats = 20,
    device: options.Device = "auto",
    records: Records = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Time one token of a whole model: real shape, random weights, caches included.

    \b
    bitwright bench decode --model llama-2-7b --scheme w4a16-g128 --batch 1,16
    bitwright bench decode --model opt-175b --scheme w3a16-g128 --no-baseline

    The 16-bit model runs beside the quantized ones, in turns, and the median of each is reported. Of a model that does
    not fit beside the others two depths are timed and the difference gives the rest; the table says so.
    """
    started = time.perf_counter()
    with output.one_line_errors(debug):
        from bitwright.bench import decode as bench

        asked = [
            bench.Options(
                shape=shape,
                schemes=tuple(scheme or ("w4a16-g128",)),
                batches=_numbers("batch", batch),
                context=context,
                layers=layers,
                baseline=baseline,
                dtype=dtype,
                device=device,
                repeats=repeats,
                command=_command(),
            )
            for shape in _shapes(model)
        ]
        with output.shown_progress() as progress:
            found = _kept((part for one in asked for part in bench.measure(one, progress)), records)
        _show("decode", found, bench.table, started, json)


@app.command()
def prefill(
    model: Models = None,
    scheme: Schemes = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="BxT", help="Sequences x tokens of each; repeatable.", show_default="1x512, 1x2048"),
    ] = None,
    layers: Layers = None,
    baseline: Baseline = True,
    dtype: Dtype = "bfloat16",
    repeats: Repeats = 20,
    device: options.Device = "auto",
    records: Records = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Time a prompt through a whole model: real shape, random weights.

    \b
    bitwright bench prefill --model llama-2-7b --scheme w4a16-g128 --prompt 1x2048
    """
    started = time.perf_counter()
    with output.one_line_errors(debug):
        from bitwright.bench import prefill as bench
        from bitwright.bench.shapes import parse_shape

        prompts = tuple(map(parse_shape, prompt)) if prompt else ((1, 512), (1, 2048))
        asked = [
            bench.Options(
                shape=shape,
                schemes=tuple(scheme or ("w4a16-g128",)),
                prompts=prompts,
                layers=layers,
                baseline=baseline,
                dtype=dtype,
                device=device,
                repeats=repeats,
                command=_command(),
            )
            for shape in _shapes(model)
        ]
        with output.shown_progress() as progress:
            found = _kept((part for one in asked for part in bench.measure(one, progress)), records)
        _show("prefill", found, bench.table, started, json)


@app.command()
def throughput(
    model: Models = None,
    scheme: Schemes = None,
    context: Annotated[int, typer.Option(help="Tokens in the cache of each sequence.")] = 512,
    fit: Fit = None,
    largest: Annotated[int, typer.Option(help="Batch to stop at.")] = 1024,
    layers: Layers = None,
    baseline: Baseline = True,
    dtype: Dtype = "bfloat16",
    repeats: Repeats = 5,
    device: options.Device = "auto",
    records: Records = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Time a token of ever larger batches until the memory is full: tokens per second and GPU.

    \b
    bitwright bench throughput --model llama-2-70b --scheme w4a16-g128 --context 1024

    A model is measured as one rank of the fewest GPUs that hold it and of twice as many, communication left out.
    """
    started = time.perf_counter()
    with output.one_line_errors(debug):
        from bitwright.bench import throughput as bench
        from bitwright.calibrate.memory import parse_bytes

        found: list[dict[str, Any]] = []
        with output.shown_progress() as progress:
            for shape in _shapes(model):
                asked = bench.Options(
                    shape=shape,
                    schemes=tuple(scheme or ("w4a16-g128",)),
                    context=context,
                    memory=None if fit is None else parse_bytes(fit),
                    largest=largest,
                    layers=layers,
                    baseline=baseline,
                    dtype=dtype,
                    device=device,
                    repeats=repeats,
                    command=_command(),
                )
                swept = _kept(bench.measure(asked, progress), records)
                found += swept + _kept([bench.summary(swept)], records)
        _show("throughput", found, bench.table, started, json)


@app.command()
def memory(
    model: Models = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(metavar="SCHEME", help="Repeatable; 16-bit: unquantized.", show_default="16-bit, w4a16-g128"),
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    context: Annotated[int, typer.Option(help="Tokens of each, prompt and answer.")] = 2048,
    fit: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory to fill, such as 24GB.", show_default="the GPU's, or 80GB"),
    ] = None,
    check: Annotated[bool, typer.Option(help="Make the matrices of one layer and count their bytes.")] = True,
    dtype: Dtype = "bfloat16",
    device: options.Device = "auto",
    records: Records = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Count what a model takes: weights, cache, workspace, and the largest batch that fits.

    \b
    bitwright bench memory --model llama-2-70b --scheme 16-bit --scheme w4a16-g128 --context 4096
    bitwright bench memory --model opt-175b --scheme w3a16-g128 --fit 80GB

    Bytes are computed from the shape of the model and checked against the packed matrices of one layer, made here.
    """
    started = time.perf_counter()
    with output.one_line_errors(debug):
        from bitwright.bench import memory as bench
        from bitwright.calibrate.memory import parse_bytes

        defaults = bench.Options()
        asked = bench.Options(
            models=tuple(model or defaults.models),
            schemes=tuple(scheme or defaults.schemes),
            batch=batch,
            context=context,
            memory=None if fit is None else parse_bytes(fit),
            dtype=dtype,
            device=device,
            check=check,
            command=_command(),
        )
        with output.shown_progress() as progress:
            found = _kept([bench.run(asked, progress)], records)
        _show("memory", found, bench.table, started, json)


def _shapes(names: list[str] | None) -> list[ModelShape]:
    from bitwright.bench.shapes import models

    return [models(name) for name in names or ["llama-2-7b"]]


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise BitwrightError(f"--{name} {text!r} is not a list of numbers; write it as in 1,16,256") from None


def _command() -> str:
    from bitwright.bench.records import command_line

    return command_line(sys.argv[1:])


def _kept(batches: Iterable[list[dict[str, Any]]], file: Path | None) -> list[dict[str, Any]]:
    """All records, each batch written as soon as it is there: what was measured outlives a later failure."""
    from bitwright.bench.records import append

    found: list[dict[str, Any]] = []
    for batch in batches:
        if file is not None:
            append(file, batch)
        found += batch
    return found


def _show(name: str, records: list[dict[str, Any]], table: Any, started: float, json: bool) -> None:
    """Print records; exit code 1 if anything of ours was wrong or failed."""
    if json:
        output.print_json({"command": f"bench {name}", "records": records, **output.usage(started)})
    else:
        _print_table(table(records))
    bad = [r for r in records if r["status"] in ("wrong", "failed") and r.get("kind", "ours") == "ours"]
    if bad:
        first = bad[0]
        what = first.get("name") or f"{first.get('model')} at {first.get('scheme')}"
        raise BitwrightError(f"{len(bad)} measurements failed; the first: {what}, {first['status']}: {first['reason']}")


def _print_table(table: Any) -> None:
    from rich.console import Console

    # A file or a pipe has no width; 80 columns would fold the rows.
    Console(width=None if sys.stdout.isatty() else output.WIDTH_WITHOUT_TERMINAL).print(table)
