"""The command line: parse, call the Python API, print. One file per command; the work is done elsewhere.

Every command prints its result on stdout and its progress on stderr. With --json the result is one JSON object on the
last line. An error of bitwright's own is one line on stderr and exit code 1. Nothing heavy is imported before a command
runs, so that --help answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from bitwright.cli import bench
from bitwright.cli.evaluate import evaluate
from bitwright.cli.generate import generate
from bitwright.cli.inspect import inspect
from bitwright.cli.quantize import quantize

app = typer.Typer(
    name="bitwright",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (inspect, quantize, evaluate, generate):
    app.command()(command)
app.add_typer(bench.app, name="bench")


def _show_version(wanted: bool) -> None:
    if wanted:
        import bitwright

        typer.echo(f"bitwright {bitwright.__version__}")
        raise typer.Exit()


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Make large language models small, run them packed, and measure what it cost.

    \b
    bitwright inspect  MODEL
    bitwright quantize MODEL --out MODEL-w4 --scheme w4a16-g128 --calibration speeches.txt
    bitwright evaluate MODEL-w4 --text held-out.txt --reference MODEL
    bitwright generate MODEL-w4 --prompt "The state of the union is"
    bitwright bench    kernels | decode | prefill | memory

    MODEL is a Hugging Face folder, a hub id or a .gguf file. `bitwright COMMAND --help` explains a command.
    """


def main() -> None:
    """Entry point of the `bitwright` command."""
    app()
