"""The slow, obvious twin of every packed linear: what an implementation is compared with.

Weights are dequantized whole and multiplied in float64 (or in 64-bit integers for 8-bit activations), so the only
errors left are those of the scheme itself. `quantize_activations` is the definition that every w8a8 path shares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import Scheme

ACTIVATION_MAX = 127


def linear(x: Tensor, qt: QuantizedTensor, scheme: Scheme, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias for x [..., K], any floating dtype; returns [..., N] in the dtype of x.

    16-bit activations: y = x · dequantize(qt)ᵀ. 8-bit activations, per token m and output n::

        y[m, n] = (Σ_k codes_x[m, k] · codes_w[n, k]) · scale_x[m] · scale_w[n]

    with an exact integer sum, rounded once to float32, and the two products in float32, in this order. (The sum runs
    over columns; where the weight has an `order`, so do the activations' codes.)
    """
    if scheme.activation_bits == 16:
        y = x.to(torch.float64) @ qt.dequantize(torch.float64).t()
    else:
        codes, scale = quantize_activations(x)
        codes = codes if qt.order is None else codes[..., qt.order]
        exact = codes.to(torch.int64) @ qt.codes.to(torch.int64).t()
        y = exact.to(torch.float32) * scale * qt.scale.to(torch.float32).t()
    if bias is not None:
        y = y.to(x.dtype) + bias.to(x.dtype) if scheme.activation_bits == 8 else y + bias.to(torch.float64)
    return y.to(x.dtype)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [..., K] and float32 scale [..., 1] of activations, symmetric, one scale per token.

    scale = max|x| / 127 in float32 with true division, codes = round half to even of x / scale, in [-127, 127]. A
    token of zeros has scale 1 and codes 0. NaN or Inf in a token makes its scale NaN or Inf, and so its outputs.
    """
    values = x.to(torch.float32)
    scale = values.abs().amax(dim=-1, keepdim=True) / ACTIVATION_MAX
    scale = torch.where(scale == 0, 1.0, scale)
    return (values / scale).round_().to(torch.int8), scale
