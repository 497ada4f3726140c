"""What an evaluation returns: plain frozen values that turn into JSON."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """A mean over windows and its standard error (None for a single window, where there is no spread to see)."""

    mean: float
    standard_error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Mean and sample standard deviation / sqrt(n) of one value per window."""
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), error)

    def exp(self) -> Estimate:
        """exp of the mean; the error is carried to first order, exp(mean) * standard_error."""
        value = math.exp(self.mean)
        return Estimate(value, None if self.standard_error is None else value * self.standard_error)

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if self.standard_error is None else f"{self.mean:.4g} ± {self.standard_error:.2g}"


@dataclass(frozen=True)
class Perplexity:
    """perplexity = exp(nll); nll in nats per token; bits_per_byte counts the bytes of the scored tokens' text."""

    perplexity: Estimate
    nll: Estimate
    bits_per_byte: float


@dataclass(frozen=True)
class Divergence:
    """Against the reference on the same tokens.

    kl: KL(reference || model), nats per token. top1_agreement: share of positions where both rank the same token first.
    nll_increase: model minus reference, paired per window, so its error is far smaller than either perplexity's.
    reference: the reference's own perplexity.
    """

    name: str
    kl: Estimate
    top1_agreement: Estimate
    nll_increase: Estimate
    reference: Perplexity


@dataclass(frozen=True)
class Report:
    """One evaluation. scored_tokens = num_windows * (seq_len - 1): the first token of a window is not scored.

    The text fields are None without a text, `divergence` without a reference, `tasks` (task -> metric -> value) without
    tasks. logits: "chunked" if the output layer ran over a few tokens at a time, "whole" if the model computes its
    logits in a way that only its full forward reproduces.
    """

    model: str
    device: str
    dtype: str
    seconds: float
    text: str | None = None
    text_sha256: str | None = None
    seq_len: int | None = None
    num_windows: int | None = None
    available_windows: int | None = None
    text_tokens: int | None = None
    scored_tokens: int | None = None
    tokens_per_second: float | None = None
    logits: str | None = None
    quality: Perplexity | None = None
    divergence: Divergence | None = None
    tasks: dict[str, dict[str, Any]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, ready for json.dumps."""
        return dataclasses.asdict(self)
