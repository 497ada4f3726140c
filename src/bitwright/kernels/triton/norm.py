"""RMSNorm as device code, in front of a kernel that reads its result once.

It rounds where transformers' LlamaRMSNorm does: float32 up to x / rms, rounded to the dtype of x, then times the weight
in that dtype. The sum of squares has an order of its own here, so results agree within the rounding of that sum, not
bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitwright.kernels.triton.fragment import rounded


@triton.jit
def square(x, column, K):
    """float32: squares of a token's columns, 0 from K on."""
    v = tl.load(x + column, mask=column < K, other=0.0).to(tl.float32)
    return v * v


@triton.jit
def inverse_rms(total, K, eps):
    """1 / sqrt(mean + eps) of the sum of K squares."""
    return tl.rsqrt(total / K + eps)


@triton.jit
def normed(x, rstd, weight):
    """x · rstd · weight in the dtype of x, rounded after each product."""
    unit = rounded(x.to(tl.float32) * rstd, x.dtype)
    return rounded(unit.to(tl.float32) * weight.to(tl.float32), x.dtype)
