"""Smoothing: the range of activations moves into weights, channel by channel (SmoothQuant, arXiv 2211.10438).

x_j / s_j meets W_nj * s_j: the product is the same, and a channel that is far larger than the others, which all share a
token's one scale, is rounded where it does less harm. The paper's s_j = max|x_j|^alpha / max_n|W_nj|^(1 - alpha)
(equation 4) is here

    s_j = 2^e_j,   e_j = round(log2 of that) - median over j, within ±`LIMIT`,

because a power of two commutes with every rounding: the model with factors computes the same bits as the one without
(short of underflow and overflow), so that whoever moves them can verify it. The paper has one alpha for a whole model.
Here each input takes the one that rounds best on some of its tokens, or none.
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

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# |e_j|. Channels that differ by more are as good as dead, and 16-bit floats hold no more of a norm's weight.
LIMIT = 10
# Rows of all weights together, and least tokens, that an error is measured with.
ROWS = 4096
MIN_TOKENS = 32


@dataclass(frozen=True)
class Factors:
    """exponents: e_j, fp32 whole numbers [C]. alpha. error: of the rounded product, relative to that without factors."""

    exponents: Tensor
    alpha: float
    error: float


def exponents(largest: Tensor, columns: Tensor, alpha: float) -> Tensor:
    """e [C] of max|x_j| [C] and max_n|W_nj| [C]; 0 for a channel whose input or weight is always zero."""
    alive = (largest > 0) & (columns > 0)
    if not bool(alive.any()):
        return torch.zeros_like(largest)
    e = (alpha * largest.log2() - (1 - alpha) * columns.log2()).round()
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
    C = int(channel.max()) + 1

    def reduced(columns: Tensor) -> Tensor:
        return columns.new_zeros(C).scatter_reduce(0, channel, columns.float(), "amax")

    largest = reduced(profile.largest)
    across = reduced(torch.stack([W.abs().amax(0) for W in weights]).amax(0).float())
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
        e = exponents(largest, across, alpha)
        if bool(e.any()):
            relative = error(e.exp2()[channel]) / max(plain, 1e-30)
            if relative < (1.0 if best is None else best.error):
                best = Factors(e, alpha, relative)
    return best
