"""Smoothing: the range of activations moves into weights, channel by channel (SmoothQuant, arXiv 2211.10438).

x_j / s_j meets W_nj * s_j: the product is the same, and a channel that is far larger than the others, which all share a
token's one scale, is rounded where it does less harm. The factors here are

    s_j = 2^e_j,   e_j = round(alpha * log2 max|x_j|) - median over j, within ±`LIMIT`,

powers of two because these commute with every rounding: short of underflow and overflow a model with factors computes
the same bits as one without, and whoever moves them can verify that. The paper also divides s_j by
max_n|W_nj|^(1 - alpha) (equation 4) and has one alpha for a whole model. Here each input takes the alpha that rounds
best on some of its tokens, or none; with that search the weights' share did harm (`dev/LOG.md`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.activations import quantize_symmetric
from bitwright.algorithms.quik import InputProfile
from bitwright.algorithms.rtn import rtn
from bitwright.scheme import WeightScheme

ALPHAS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
# |e_j|. Channels that differ by more are as good as dead, and 16-bit floats hold no more of a norm's weight.
LIMIT = 10
# Rows of all weights together, and least tokens, that an error is measured with.
ROWS = 4096
MIN_TOKENS = 32


@dataclass(frozen=True)
class Factors:
    """exponents: e_j, fp32 whole numbers [C]. alpha: what they were made with. error: of the rounded product, as a
    share of that without factors."""

    exponents: Tensor
    alpha: float
    error: float


def exponents(largest: Tensor, alpha: float) -> Tensor:
    """e [C] of max|x_j| [C]; 0 for a channel that was always zero."""
    alive = largest > 0
    if not bool(alive.any()):
        return torch.zeros_like(largest)
    e = (alpha * largest.log2()).round()
    return torch.where(alive, (e - e[alive].median()).clamp(-LIMIT, LIMIT), 0.0)


def choose_factors(
    profile: InputProfile,
    weights: Sequence[Tensor],
    channel: Tensor,
    alphas: Sequence[float],
    scheme: WeightScheme,
) -> Factors | None:
    """The factors, among those of `alphas`, with the least error of the rounded product over the profile's sample; None
    if no factors are as good, or fewer than `MIN_TOKENS` tokens were seen.

    weights: every [N, K] matrix that reads the input. channel: int64 [K], which of the C channels an input column
    belongs to (several where heads share one). Rows of weights are taken evenly, `ROWS` of them.
    """
    x = profile.sample
    if len(x) < MIN_TOKENS:
        return None
    largest = profile.largest.new_zeros(int(channel.max()) + 1).scatter_reduce(0, channel, profile.largest, "amax")
    step = -(-sum(len(W) for W in weights) // ROWS)
    W = torch.cat([W[::step] for W in weights]).float()
    exact = x @ W.T
    energy = exact.square().sum(1).clamp_min(1e-30)

    def error(factor: Tensor) -> float:
        codes, scale = quantize_symmetric(x / factor)
        rounded = (codes * scale) @ rtn(W * factor, scheme, search="minmax").dequantize().T
        return float(((rounded - exact).square().sum(1) / energy).mean())

    plain = error(torch.ones_like(profile.largest))
    best: Factors | None = None
    for alpha in alphas:
        e = exponents(largest, alpha)
        if bool(e.any()):
            relative = error(e.exp2()[channel]) / max(plain, 1e-30)
            if relative < (1.0 if best is None else best.error):
                best = Factors(e, alpha, relative)
    return best
