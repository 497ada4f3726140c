"""Quality, measured: perplexity, divergence from the unquantized model, and lm-eval tasks.

The definitions are in `perplexity` and `divergence`. This file holds the one public function and imports nothing heavy:
torch and transformers are loaded by the first call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitwright.evaluate.report import Divergence, Estimate, Perplexity, Report

if TYPE_CHECKING:
    from bitwright.calibrate.data import Text

__all__ = ["Divergence", "Estimate", "Perplexity", "Report", "evaluate"]


def evaluate(
    model: Any,
    text: str | Text | None = None,
    *,
    reference: Any = None,
    tokenizer: Any = None,
    seq_len: int = 2048,
    num_windows: int | None = None,
    tasks: Sequence[str] | None = None,
    task_limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Callable[[str, int, int, str], None] | None = None,
) -> Report:
    """Perplexity of a model on a text, its divergence from a reference on the same windows, and lm-eval tasks.

    model, reference: a folder (unquantized, or quantized in compressed-tensors or the native format), a hub id, a GGUF
        file, or a causal LM that is already loaded. A quantized folder runs packed. The reference is usually the
        unquantized model.
    text: a TEXT spec (see `bitwright.calibrate.data`) or a `Text`. At least one of text and tasks is needed.
    tokenizer: needed when `model` is an object; otherwise read from its folder.
    seq_len, num_windows: the text is cut in windows of seq_len tokens; num_windows keeps that many, evenly spaced.
    tasks: names of lm-eval tasks, or paths of its .yaml files; task_limit: examples of each.
    device: "auto" takes a CUDA device if there is one. dtype: "auto" is float32 on a CPU (bf16 products are emulated on
        many) and the checkpoint's own elsewhere; or the name of a torch dtype. Both concern models given by name.
    trust_remote_code: run Python code that comes with a model given by name, the reference included.
    progress: called as progress(stage, done, total, detail).

    Memory: the model(s), the activations of one window, and the logits of 256 tokens. Raises the errors of
    `bitwright.errors`: CalibrationError (text), CheckpointError (model), NumericsError (NaN or Inf in the logits).
    """
    from bitwright.evaluate import run

    return run.evaluate(
        model,
        text,
        reference=reference,
        tokenizer=tokenizer,
        seq_len=seq_len,
        num_windows=num_windows,
        tasks=tasks,
        task_limit=task_limit,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )


def name_of(model: Any) -> str:
    """How a report calls a model: the path or id it was given by, or the class of an object."""
    return str(model) if isinstance(model, str | Path) else type(model).__name__
