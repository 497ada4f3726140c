"""Perplexity, stated exactly, and logits a few tokens at a time.

The text is tokenized once and cut in non-overlapping windows; the first token of a window is not scored. A window's
score is the mean negative log likelihood of its other tokens; the perplexity is exp of the mean over windows, and its
standard error comes from the spread between windows (Estimate.exp).

Memory. The logits of a 2048-token window over 49152 words are 400 MB in float32, more than a small model itself. They
are never needed at once: `LogitSource` runs the body of the model on a whole window, then the output layer on slices.
That is right only for models whose logits are exactly `output_layer(body(ids))`; some scale or cap them afterwards. So
it is tried on the first tokens against the model's own forward and used only if every bit agrees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import NumericsError

CHUNK_TOKENS = 256
PROBE_TOKENS = 8


class LogitSource:
    """Logits of a causal LM for one window at a time, in slices of `chunk_tokens` tokens.

    chunked: whether the output layer runs on slices (see the module docstring).
    """

    def __init__(self, model: Any, ids: Tensor, chunk_tokens: int = CHUNK_TOKENS) -> None:
        """ids: int64 [seq_len], a window whose first tokens are used for the trial."""
        self._model = model
        self._chunk_tokens = chunk_tokens
        self._device = model.device
        self._head = model.get_output_embeddings()
        self._body = getattr(model, "base_model", None)
        self.chunked = self._agrees(ids[:PROBE_TOKENS])

    @torch.no_grad()
    def chunks(self, ids: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(positions, float32 logits [positions, V]) over the positions 0 .. seq_len - 2, those that predict a token.

        ids: int64 [seq_len].
        """
        positions = len(ids) - 1
        batch = ids[None].to(self._device)
        rows = self._hidden(batch) if self.chunked else self._full(batch)
        for start in range(0, positions, self._chunk_tokens):
            part = slice(start, min(start + self._chunk_tokens, positions))
            yield part, (self._head(rows[part]) if self.chunked else rows[part]).float()

    def _hidden(self, batch: Tensor) -> Tensor:
        return self._body(input_ids=batch, use_cache=False)[0][0]

    def _full(self, batch: Tensor) -> Tensor:
        return self._model(input_ids=batch, use_cache=False).logits[0]

    @torch.no_grad()
    def _agrees(self, ids: Tensor) -> bool:
        if self._head is None or self._body is None or self._body is self._model:
            return False
        batch = ids[None].to(self._device)
        hidden = self._hidden(batch)
        width = getattr(self._head, "in_features", hidden.shape[-1])
        return hidden.shape[-1] == width and torch.equal(self._head(hidden), self._full(batch))


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log likelihood in nats of each target, float64 [M]. logits: float32 [M, V]; targets: int64 [M]."""
    picked = logits.gather(1, targets[:, None])[:, 0]
    return (torch.logsumexp(logits, dim=1) - picked).double()


def window_nll(source: LogitSource, ids: Tensor) -> float:
    """Mean negative log likelihood of ids[1:], nats per token. ids: int64 [seq_len]. NumericsError if not finite."""
    total = 0.0
    for positions, logits in source.chunks(ids):
        targets = ids[1:][positions].to(logits.device)
        total += token_nll(logits, targets).sum().item()
    return check_finite(total / (len(ids) - 1), "the model's logits")


def check_finite(value: float, what: str) -> float:
    """`value`, or NumericsError if it is NaN or infinite."""
    if not math.isfinite(value):
        raise NumericsError(
            f"{what} give a score of {value}; look for NaN or Inf in the checkpoint, or evaluate with dtype float32 if "
            "the model overflows its own dtype"
        )
    return value
