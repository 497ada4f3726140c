"""`bitwright evaluate`: perplexity, divergence from a reference, lm-eval tasks."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from bitwright.cli import options, output


def evaluate(
    model: options.Model,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help=f"Text to score: {options.TEXT_HELP}.")] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Unquantized model: adds KL divergence and top-1 agreement.")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    num_windows: Annotated[
        int | None, typer.Option(help="Windows to score, evenly spaced over the text.", show_default="all")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="lm-eval tasks, separated by commas; names or .yaml files.", metavar="TASKS")
    ] = None,
    task_limit: Annotated[int | None, typer.Option(help="Examples of each task.", show_default="all")] = None,
    device: options.Device = "auto",
    dtype: options.EvaluationDtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Measure the quality of a model, quantized or not.

    \b
    bitwright evaluate MODEL-w4 --text held-out.txt --reference MODEL --num-windows 10
    bitwright evaluate MODEL-w4 --tasks arc_easy,hellaswag --task-limit 200

    The text is tokenized once and cut in windows of --seq-len tokens; the first token of a window is not scored.
    Perplexity is exp of the mean negative log likelihood, with its standard error over windows. With --reference both
    models read the same windows: KL(reference || model) in nats per token, and how often they agree on the first token.
    """
    started = time.perf_counter()
    with output.one_line_errors(debug):
        import bitwright

        with output.shown_progress() as progress:
            report = bitwright.evaluate(
                model,
                text,
                reference=reference,
                seq_len=seq_len,
                num_windows=num_windows,
                tasks=[t for t in tasks.split(",") if t] if tasks else None,
                task_limit=task_limit,
                device=device,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
        if json:
            output.print_json({"command": "evaluate", **report.to_dict(), **output.usage(started)})
            return
        shown: dict[str, Any] = {
            "model": report.model,
            "text": report.text,
            "device": report.device,
            "dtype": report.dtype,
        }
        if report.quality is not None:
            shown |= {
                "windows": f"{report.num_windows} of {report.available_windows}, {report.seq_len} tokens each",
                "text sha256": report.text_sha256,
                "perplexity": str(report.quality.perplexity),
                "nll (nats/token)": str(report.quality.nll),
                "bits per byte": report.quality.bits_per_byte,
            }
        if report.divergence is not None:
            d = report.divergence
            shown |= {
                "reference": d.name,
                "reference perplexity": str(d.reference.perplexity),
                "nll increase (paired)": str(d.nll_increase),
                "KL (nats/token)": str(d.kl),
                "top-1 agreement": str(d.top1_agreement),
            }
        output.print_values(shown | output.usage(started) | ({"tasks": report.tasks} if report.tasks else {}))
