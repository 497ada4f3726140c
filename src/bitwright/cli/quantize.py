"""`bitwright quantize`: a smaller model in a new folder, with the evidence of what it cost."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from bitwright.cli import options, output
from bitwright.cli.inspect import weights_bytes
from bitwright.errors import RecipeError


def quantize(
    model: options.Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write; must not exist, unless --overwrite.")],
    scheme: Annotated[
        str | None,
        typer.Option(
            help="w<bits>a<bits>[-g<group_size>][-asym][-o<outliers>][-rot][-24]: w4a16-g128, w3a16-g64-asym, w8a8, "
            "w4a4-o256-rot, w4a16-g128-24."
        ),
    ] = None,
    algorithm: Annotated[
        str | None,
        typer.Option(
            help="gptq, quik (outliers, 4-bit activations) or sparsegpt (2:4), which need text; or rtn or finequant.",
            show_default="gptq",
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="TOML", help="Rules per layer, instead of --scheme and --algorithm.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="TEXT", help=f"Text to calibrate on: {options.TEXT_HELP}.")
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens per calibration sequence.")] = 2048,
    seed: Annotated[int, typer.Option(help="Of the choice of calibration sequences.")] = 0,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Option of the algorithm; repeatable.")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="compressed-tensors (read by transformers and vLLM) or native (by bitwright alone).",
            show_default="compressed-tensors wherever it can",
        ),
    ] = None,
    device: options.Device = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="Of scales and unquantized tensors: float16, bfloat16, or auto: the model's own, bfloat16 for float32."
        ),
    ] = "auto",
    max_memory: Annotated[
        str | None, typer.Option(help="Memory to stay under, for example 8GB.", show_default="what is free")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in --out.")] = False,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Quantize a model into a new folder that transformers and vLLM can read.

    \b
    bitwright quantize MODEL --out MODEL-w4 --scheme w4a16-g128 --calibration speeches.txt
    bitwright quantize MODEL --out MODEL-w4a4 --scheme w4a4-o256-rot --algorithm quik --calibration speeches.txt
    bitwright quantize MODEL --out MODEL-w8 --scheme w8a16 --algorithm rtn
    bitwright quantize MODEL --out MODEL-mix --recipe recipe.toml --calibration hf:wikitext:wikitext-2-raw-v1

    The folder also gets bitwright.json (scheme and error of each layer, calibration hash, versions) and
    bitwright-run.json (time, memory, machine). An interrupted run continues when it is started again.
    """
    started = time.perf_counter()
    with output.one_line_errors(debug):
        if (scheme is None) == (recipe is None):
            raise RecipeError("give either --scheme, such as w4a16-g128, or --recipe FILE, and not both")
        if recipe is not None and (algorithm or option):
            raise RecipeError(f"--algorithm and --option go into the rules of {recipe}, not beside it")
        chosen = options.parse_pairs(option or [])
        from bitwright.pipeline import quantize as run

        with output.shown_progress() as progress:
            result = run(
                model,
                out,
                scheme=scheme,
                algorithm=algorithm or "gptq",
                recipe=recipe,
                calibration=calibration,
                num_samples=num_samples,
                seq_len=seq_len,
                seed=seed,
                options=chosen or None,
                format=format,
                device=device,
                dtype=dtype,
                max_memory=max_memory,
                overwrite=overwrite,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
        # The layers are in the folder's bitwright.json; here only what can be said in a line each.
        summary = {k: v for k, v in result.record.items() if not isinstance(v, dict | list)}
        if result.record.get("notes"):
            summary["notes"] = "; ".join(result.record["notes"])
        values = {"out": str(result.out), "weights_bytes": weights_bytes(Path(result.out)), **summary}
        if json:
            output.print_json({"command": "quantize", **values, "run": result.run, **output.usage(started)})
        else:
            output.print_values(values | output.usage(started))
