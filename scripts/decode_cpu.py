"""Batch-1 generation on the CPU: speed and memory of a folder, each in a process of its own.

    python scripts/decode_cpu.py MODEL QUANTIZED [--tokens 128] [--context 150]

Prints one JSON line per folder: prefill and decode milliseconds, and the resident memory above the bare imports (after
generation, and at its peak). A plain folder runs in float32, a quantized one in what bw.load chooses.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPT = "The state of the union is strong, and the people of this nation have shown it in every year of our history. "


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def measure(folder: str, tokens: int, context: int) -> dict[str, object]:
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401, so that the bare imports are complete
    from transformers import AutoTokenizer

    import bitwright.nn.load as nn_load

    bare = resident("VmRSS")
    quantized = "quantization_config" in json.loads((Path(folder) / "config.json").read_text())
    model = nn_load.load(folder, dtype=None if quantized else torch.float32).eval()
    loaded = resident("VmRSS")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT * 60, return_tensors="pt")["input_ids"][:, :context]
    seconds, prefill = [], 0.0
    with torch.inference_mode():
        for warm in (True, False):
            cache, step = None, ids
            for i in range(8 if warm else tokens):
                started = time.perf_counter()
                out = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
                spent = time.perf_counter() - started
                if i == 0:
                    prefill = spent
                elif not warm:
                    seconds.append(spent)
    return {
        "folder": Path(folder).name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "context": context,
        "prefill_ms": round(1e3 * prefill, 1),
        "decode_ms_per_token": round(1e3 * statistics.median(seconds), 2),
        "tokens_per_second": round(1 / statistics.median(seconds), 1),
        "loaded_above_imports_mb": round((loaded - bare) / 1e6),
        "generated_above_imports_mb": round((resident("VmRSS") - bare) / 1e6),
        "peak_above_imports_mb": round((resident("VmHWM") - bare) / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--context", type=int, default=150)
    parser.add_argument(
        "--here", action="store_true", help="measure in this process (what the script calls itself with)"
    )
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.folders[0], args.tokens, args.context)))
        return
    for folder in args.folders:
        subprocess.run(
            [sys.executable, __file__, folder, "--here", "--tokens", str(args.tokens), "--context", str(args.context)],
            check=True,
        )


if __name__ == "__main__":
    main()
