"""How far a model is from its reference: KL divergence and top-1 agreement on the same windows.

Perplexity asks how well a model predicts a text; these ask how much it changed, which is what quantization is about:
they are steadier (paired token by token) and do not reward a change that happens to suit the text.

Both models read each window one after the other and their logits meet a few tokens at a time, so nothing of size
[tokens, vocabulary] is kept in memory or on disk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.errors import CheckpointError
from bitwright.evaluate.perplexity import LogitSource, check_finite, token_nll


@dataclass(frozen=True)
class WindowScores:
    """Means over the scored tokens of one window: nats, nats, nats, share."""

    nll: float
    reference_nll: float
    kl: float
    top1_agreement: float


def token_divergence(reference: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(reference || model) in nats, float64 [M]; whether both rank the same token first, bool [M]).

    reference, logits: float32 [M, V].
    """
    log_p = torch.log_softmax(reference, dim=1)
    log_q = torch.log_softmax(logits, dim=1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=1).double()
    return kl, reference.argmax(dim=1) == logits.argmax(dim=1)


def window_divergence(source: LogitSource, reference: LogitSource, ids: Tensor) -> WindowScores:
    """Scores of one window, int64 [seq_len]. CheckpointError: the vocabularies differ. NumericsError: NaN or Inf."""
    nll = reference_nll = kl = agreed = 0.0
    for (positions, logits), (_, expected) in zip(source.chunks(ids), reference.chunks(ids), strict=True):
        expected = expected.to(logits.device)
        if expected.shape[1] != logits.shape[1]:
            raise CheckpointError(
                f"the reference has {expected.shape[1]} logits per token and the model {logits.shape[1]}; "
                "the reference must be the model that was quantized"
            )
        targets = ids[1:][positions].to(logits.device)
        nll += token_nll(logits, targets).sum().item()
        reference_nll += token_nll(expected, targets).sum().item()
        token_kl, same = token_divergence(expected, logits)
        kl += token_kl.sum().item()
        agreed += same.sum().item()
    count = len(ids) - 1
    check_finite(reference_nll, "the reference's logits")
    return WindowScores(
        check_finite(nll / count, "the model's logits"),
        reference_nll / count,
        check_finite(kl / count, "the model's and the reference's logits"),
        agreed / count,
    )
