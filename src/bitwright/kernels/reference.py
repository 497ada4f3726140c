"""The slow, obvious twin of every packed linear: what an implementation is compared with.

Weights are dequantized whole and multiplied in float64 (or in 64-bit integers for quantized activations), so the only
errors left are those of the scheme itself. `quantize_activations` is the definition that every w8a8 path shares, and
`bitwright.activations` has those of split inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.activations import quantize_asymmetric, quantize_symmetric
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import Scheme
from bitwright.split import SplitTensor

quantize_activations = quantize_symmetric


def linear(x: Tensor, qt: QuantizedTensor | SplitTensor, scheme: Scheme, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias for x [..., K], any floating dtype; returns [..., N] in the dtype of x.

    16-bit activations: y = x · dequantize(qt)ᵀ. 8-bit activations, per token m and output n::

        y[m, n] = (Σ_k codes_x[m, k] · codes_w[n, k]) · scale_x[m] · scale_w[n]

    with an exact integer sum, rounded once to float32, and the two products in float32, in this order. (The sum runs
    over columns; where the weight has an `order`, so do the activations' codes.) A split weight goes to `split_linear`.
    The bias is added before the result is rounded to the dtype of x: in float32, with 16-bit activations in float64.
    """
    if isinstance(qt, SplitTensor):
        y = split_linear(x, qt)
        return (y if bias is None else y + bias.to(torch.float32)).to(x.dtype)
    if scheme.activation_bits == 16:
        y = x.to(torch.float64) @ qt.dequantize(torch.float64).t()
    else:
        codes, scale = quantize_activations(x)
        codes = codes if qt.order is None else codes[..., qt.order]
        exact = codes.to(torch.int64) @ qt.codes.to(torch.int64).t()
        y = exact.to(torch.float32) * scale * qt.scale.to(torch.float32).t()
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype)


def split_linear(x: Tensor, tensor: SplitTensor) -> Tensor:
    """x [..., K] times a split weight, float32 [..., N].

    With `tensor.split` x falls into base columns x_B [..., B] (rotated, if they are) and outliers x_O [..., O].

    16-bit activations: y = [x_B, x_O] · arranged(tensor)ᵀ in float64, rounded once.

    4 and 8 bits, per token m and output n, with codes, scale_x and zero_x of x_B from `bitwright.activations` (zero_x
    = 0 at 8 bits), codes_w and scale_w of the weight and its row sums R[n] = Σ_k codes_w[n, k]::

        acc[m, n] = Σ_k codes_x[m, k] · codes_w[n, k] - zero_x[m] · R[n]          an exact integer
        y[m, n] = (float32(acc[m, n]) · scale_x[m]) · scale_w[n] + Σ_o x_O[m, o] · W_O[n, o]

    Each of float32(), the two products and the final sum rounds once to float32, with no fused multiply-add. The sum
    over outliers is in float32 with products of 16-bit values: its order alone is left to the implementation, and with
    no outliers nothing is added and every bit is fixed. A bias is added in float32, and the result rounded once.
    """
    base, outliers = tensor.split.parts(x)
    if tensor.split.bits == 16:
        z = torch.cat((base.to(torch.float64), outliers.to(torch.float64)), dim=-1)
        return (z @ tensor.arranged(torch.float64).t()).to(torch.float32)
    assert isinstance(tensor.base, QuantizedTensor), "quantized activations meet a grid"
    weight = tensor.base.codes.to(torch.int64)
    if tensor.split.bits == 8:
        codes, scale = quantize_symmetric(base)
        acc = codes.to(torch.int64) @ weight.t()
    else:
        codes, scale, zero = quantize_asymmetric(base, tensor.split.clip)
        acc = codes.to(torch.int64) @ weight.t() - zero.to(torch.int64) * weight.sum(dim=1)
    y = acc.to(torch.float32) * scale * tensor.base.scale.to(torch.float32).t()
    if tensor.outliers.shape[1]:
        y = y + outliers.to(torch.float32) @ tensor.outliers.to(torch.float32).t()
    return y
