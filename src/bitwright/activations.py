"""How activations become integers at run time: one definition for calibration, the reference, the CPU and the GPU.

Everything is float32, operation by operation, with true division and round half to even; nothing depends on the order
in which a sum is taken, so every implementation can and must give the same bits.

* 8 bits, symmetric, per token: scale = max|x| / 127, code = round(x / scale).
* 4 bits, asymmetric, per token: lo = min(min x, 0) · clip, hi = max(max x, 0) · clip, scale = (hi - lo) / 15,
  zero = round(-lo / scale) - 8, code = clamp(round(x / scale) + zero, -8, 7), and x ≈ (code - zero) · scale.
  QUIK (arXiv 2310.09259) subtracts the minimum itself, a real number; with a whole zero point the correction it needs
  in the product is an integer too, zero maps to zero exactly, and perplexity is lower (`dev/LOG.md`).
* rotation: a Walsh-Hadamard transform over blocks of n columns, n a power of two, not normalised: for h = 1, 2, 4, ...,
  n/2 the values at i and i + h (bit h of i clear) become their sum and their difference. The weight takes the inverse,
  which is the same transform divided by n, a power of two.
"""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATION_MAX = 127
_LEVELS = 15
_LOWEST = -8
# Larger blocks mix better but cost a kernel more passes over its registers; what is gained above is small. Checkpoints
# do not store the block, they store that there is one: changing this number needs a new version of the native format.
MAX_ROTATION_BLOCK = 1024


def quantize_symmetric(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [..., K] and float32 scale [..., 1] of activations at 8 bits, one scale per token.

    Codes lie in [-127, 127]. A token of zeros has scale 1 and codes 0. NaN or Inf in a token makes its scale NaN or
    Inf, and so its outputs.
    """
    values = x.to(torch.float32)
    scale = _divided(values.abs().amax(dim=-1, keepdim=True), ACTIVATION_MAX)
    scale = torch.where(scale == 0, 1.0, scale)
    return (values / scale).round_().to(torch.int8), scale


def quantize_asymmetric(x: Tensor, clip: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """int8 codes [..., K] in [-8, 7], float32 scale [..., 1] and int8 zero point [..., 1] in [-8, 7] at 4 bits.

    clip: what share of a token's range the grid spans (rounded to float32); values beyond saturate. A token of zeros
    has scale 1, codes 0 and zero point 0. NaN or Inf in a token makes its scale NaN or Inf, and so its outputs.
    """
    values = x.to(torch.float32)
    lo = values.amin(dim=-1, keepdim=True).clamp_max(0.0) * clip
    hi = values.amax(dim=-1, keepdim=True).clamp_min(0.0) * clip
    scale = _divided(hi - lo, _LEVELS)
    idle = scale == 0
    scale = torch.where(idle, 1.0, scale)
    zero = torch.where(idle, 0.0, (-lo / scale).round_() + _LOWEST)
    codes = (values / scale).round_().add_(zero).clamp_(_LOWEST, _LOWEST + _LEVELS)
    return codes.to(torch.int8), scale, zero.to(torch.int8)


def _divided(x: Tensor, number: int) -> Tensor:
    """x / number rounded once. By a plain number torch multiplies with the reciprocal on CUDA, which rounds twice."""
    return x / torch.full_like(x, number)


def rotation_block(K: int) -> int:
    """The largest power of two that divides K, at most `MAX_ROTATION_BLOCK`."""
    return min(K & -K, MAX_ROTATION_BLOCK)


def rotate(x: Tensor, block: int) -> Tensor:
    """x [..., K] as float32 after the transform over each block of columns; block divides K."""
    shape = x.shape
    y = x.to(torch.float32).reshape(-1, shape[-1])
    h = 1
    while h < block:
        pair = y.view(y.shape[0], shape[-1] // (2 * h), 2, h)
        y = torch.stack((pair[:, :, 0] + pair[:, :, 1], pair[:, :, 0] - pair[:, :, 1]), dim=2).view(y.shape)
        h *= 2
    return y.view(shape)
