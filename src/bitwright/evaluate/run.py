"""The evaluation itself: load what was named, stream the windows, gather the report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bitwright.calibrate.data import Text, Windows, evaluation_windows, read_text
from bitwright.devices import choose_device
from bitwright.errors import BitwrightError, CalibrationError, CheckpointError
from bitwright.evaluate import name_of
from bitwright.evaluate.divergence import WindowScores, window_divergence
from bitwright.evaluate.loading import choose_dtype, load_model, load_tokenizer
from bitwright.evaluate.perplexity import LogitSource, window_nll
from bitwright.evaluate.report import Divergence, Estimate, Perplexity, Report

Progress = Callable[[str, int, int, str], None]


def evaluate(
    model: Any,
    text: str | Text | None,
    *,
    reference: Any,
    tokenizer: Any,
    seq_len: int,
    num_windows: int | None,
    tasks: Sequence[str] | None,
    task_limit: int | None,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    progress: Progress | None,
) -> Report:
    """See `bitwright.evaluate.evaluate`. The text is read and cut before any model is loaded."""
    started = time.perf_counter()
    if text is None and not tasks:
        raise CalibrationError("nothing to evaluate: give a text, tasks, or both")
    if text is None and reference is not None:
        raise CalibrationError("a reference is compared on the windows of a text: give a text")
    where, kind = choose_device(device), choose_dtype(dtype)
    report = progress or _ignore
    model_at, reference_at = (_resolve(m, trust_remote_code) for m in (model, reference))
    if tokenizer is None:
        if not isinstance(model_at, Path):
            raise CalibrationError(
                "a model given as an object needs its tokenizer: evaluate(model, text, tokenizer=...)"
            )
        tokenizer = load_tokenizer(model_at, trust_remote_code)
    windows = None
    if text is not None:
        text = text if isinstance(text, Text) else read_text(text)
        windows = evaluation_windows(tokenizer, text, seq_len, num_windows)
    loaded, expected = (_load(m, where, kind, trust_remote_code, report) for m in (model_at, reference_at))
    fields: dict[str, Any] = {}
    if text is not None and windows is not None:
        for m in (loaded, expected):
            _check_fits(m, windows)
        fields = _scores(loaded, expected, None if expected is None else name_of(reference), tokenizer, windows, report)
        fields |= {"text": text.source, "text_sha256": text.sha256}
    if tasks:
        from bitwright.evaluate.tasks import run_tasks

        report("tasks", 0, 1, ", ".join(tasks))
        fields["tasks"] = run_tasks(loaded, tokenizer, tasks, limit=task_limit)
        report("tasks", 1, 1, ", ".join(tasks))
    return Report(
        model=name_of(model),
        device=str(loaded.device),
        dtype=str(loaded.dtype).removeprefix("torch."),
        seconds=time.perf_counter() - started,
        **fields,
    )


def _scores(
    model: Any, reference: Any, reference_name: str | None, tokenizer: Any, windows: Windows, progress: Progress
) -> dict[str, Any]:
    """The report's fields that come from the windows."""
    count, seq_len = windows.ids.shape
    source = LogitSource(model, windows.ids[0])
    expected = None if reference is None else LogitSource(reference, windows.ids[0])
    started = time.perf_counter()
    scores: list[WindowScores] = []
    for i, ids in enumerate(windows.ids):
        so_far = f"perplexity {math.exp(min(_mean_nll(scores), 700)):.4g}" if scores else f"{seq_len} tokens a window"
        progress("evaluate", i, count, so_far)
        try:
            if expected is None:
                scores.append(WindowScores(window_nll(source, ids), math.nan, math.nan, math.nan))
            else:
                scores.append(window_divergence(source, expected, ids))
        except BitwrightError as error:
            raise type(error)(f"window {i} (token {windows.starts[i]} of the text): {error}") from error
    progress("evaluate", count, count, f"perplexity {math.exp(min(_mean_nll(scores), 700)):.4g}")
    seconds = time.perf_counter() - started
    scored_bytes = sum(_num_bytes(tokenizer, ids[1:]) for ids in windows.ids)
    scored_tokens = count * (seq_len - 1)
    divergence = None
    if expected is not None:
        divergence = Divergence(
            name=reference_name or "",
            kl=Estimate.of([s.kl for s in scores]),
            top1_agreement=Estimate.of([s.top1_agreement for s in scores]),
            nll_increase=Estimate.of([s.nll - s.reference_nll for s in scores]),
            reference=_perplexity([s.reference_nll for s in scores], scored_tokens, scored_bytes),
        )
    return {
        "seq_len": seq_len,
        "num_windows": count,
        "available_windows": windows.available,
        "text_tokens": windows.tokens,
        "scored_tokens": scored_tokens,
        "tokens_per_second": count * seq_len / seconds,
        "logits": "chunked" if source.chunked else "whole",
        "quality": _perplexity([s.nll for s in scores], scored_tokens, scored_bytes),
        "divergence": divergence,
    }


def _mean_nll(scores: list[WindowScores]) -> float:
    return sum(s.nll for s in scores) / len(scores)


def _perplexity(nll: list[float], tokens: int, num_bytes: int) -> Perplexity:
    """Every window scores the same number of tokens, so the mean of window means is the mean over tokens."""
    estimate = Estimate.of(nll)
    return Perplexity(estimate.exp(), estimate, estimate.mean * tokens / math.log(2) / num_bytes)


def _num_bytes(tokenizer: Any, ids: torch.Tensor) -> int:
    """UTF-8 bytes of the tokens' text; a character cut by the window's edge counts as its replacement, 3 bytes."""
    return max(1, len(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False).encode()))


def _check_fits(model: Any, windows: Windows) -> None:
    if model is None:
        return
    if model.training:
        raise BitwrightError("the model is in training mode, where dropout would change its scores; call model.eval()")
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and windows.ids.shape[1] > positions:
        raise CalibrationError(
            f"seq_len {windows.ids.shape[1]} is longer than the {positions} positions of {name_of(model)}; "
            f"use seq_len {positions} or less"
        )
    largest = int(windows.ids.max())
    if largest >= config.vocab_size:
        raise CheckpointError(
            f"the tokenizer made token {largest}, but {name_of(model)} knows {config.vocab_size}; "
            "use the tokenizer that belongs to the model"
        )


def _resolve(model: Any, trust_remote_code: bool) -> Any:
    """The folder of a model given by name; an object, or None, as it is."""
    if not isinstance(model, str | Path):
        return model
    from bitwright.models.source import resolve

    return resolve(str(model), trust_remote_code)


def _load(
    model: Any, device: torch.device, dtype: torch.dtype | None, trust_remote_code: bool, progress: Progress
) -> Any:
    if not isinstance(model, Path):
        return model
    progress("load", 0, 1, str(model))
    loaded = load_model(model, device, dtype, trust_remote_code)
    progress("load", 1, 1, str(model))
    return loaded


def _ignore(stage: str, done: int, total: int, detail: str) -> None:
    """Progress nobody asked for."""
