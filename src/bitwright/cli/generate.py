"""`bitwright generate`: text from a model."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from bitwright.cli import options, output


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the most likely tokens of this total probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    mode: Annotated[
        str, typer.Option(help="auto, transformers, static or cuda-graph. auto: a CUDA graph on a GPU where possible.")
    ] = "auto",
    device: options.Device = "auto",
    dtype: options.GenerationDtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Continue a prompt, greedily unless --temperature says otherwise.

    \b
    bitwright generate MODEL-w4 --prompt "The state of the union is" --max-new-tokens 40
    bitwright generate MODEL-w4 --prompt "What is a scale?" --chat --temperature 0.7

    The continuation goes to stdout, the speed to stderr. A quantized model runs packed.
    """
    started = time.perf_counter()
    with output.one_line_errors(debug):
        import bitwright
        from bitwright.devices import choose_device
        from bitwright.evaluate.loading import choose_dtype, load_tokenizer
        from bitwright.models.source import resolve

        where, kind = choose_device(device), choose_dtype(dtype)
        folder = resolve(model, trust_remote_code)
        tokenizer = load_tokenizer(folder, trust_remote_code)
        with output.shown_progress() as progress:
            progress("load", 0, 1, model)
            loaded = bitwright.load(folder, dtype=kind, device=where, trust_remote_code=trust_remote_code)
            progress("load", 1, 1, model)
        result = bitwright.generate(
            loaded,
            tokenizer,
            prompt,
            max_new_tokens,
            chat=chat,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            mode=mode,
        )
        ran = str(loaded.dtype).removeprefix("torch.")
        if json:
            values = {"command": "generate", "model": model, "device": str(loaded.device), "dtype": ran}
            output.print_json({**values, **result.to_dict(), **output.usage(started)})
            return
        typer.echo(result.text if chat else prompt + result.text)
        speed = "" if result.tokens_per_second is None else f", then {result.tokens_per_second:.1f} tokens/s"
        made = "" if result.setup_seconds < 0.005 else f" and {result.setup_seconds:.2f} s of preparation"
        first = f"first after {result.prefill_seconds:.2f} s{made}"
        typer.echo(f"{len(result.tokens)} tokens; {first}{speed} ({ran}, {result.mode})", err=True)
        if result.reason is not None:
            typer.echo(f"no CUDA graph: {result.reason}", err=True)
