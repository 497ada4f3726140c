"""RMSNorm and the sum before it as device code, in front of a kernel that reads the result once.

It rounds where transformers' LlamaRMSNorm does: float32 up to x / rms, rounded to the dtype of x, then times the weight
in that dtype. The sum of squares has an order of its own here, so results agree within the rounding of that sum, not
bit for bit. ONCE rounds behind the weight alone, as kernels that fuse the two products do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitwright.kernels.triton.fragment import INTERPRET, rounded


@triton.jit
def inverse_rms(total, K, eps):
    """1 / sqrt(mean + eps) of the sum of K squares."""
    return tl.rsqrt(total / K + eps)


@triton.jit
def added(x, residual, total, inside):
    """What `residual` points to, plus x, in the dtype of x; it is also stored in `total`."""
    h = tl.load(residual, mask=inside, other=0.0)
    h = rounded(h.to(tl.float32) + x.to(tl.float32), x.dtype)
    tl.store(total, h, mask=inside)
    return h


@triton.jit
def rounded_float(x, DTYPE: tl.constexpr):
    """float32 x rounded to DTYPE, as float32; in pairs, which a GPU does four times as fast."""
    if DTYPE.is_fp32():
        y = x
    elif INTERPRET:
        y = rounded(x, DTYPE).to(tl.float32)
    elif DTYPE.is_bf16():
        y = tl.inline_asm_elementwise(
            "{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16; and.b32 $1, t, 0xffff0000; }",
            "=r,=r,r,r", [x], tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        y = tl.inline_asm_elementwise(
            "{ .reg .b32 t; .reg .b16 a, b; cvt.rn.f16x2.f32 t, $3, $2; mov.b32 {a, b}, t; "
            "cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }",
            "=r,=r,r,r", [x], tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    return y


@triton.jit
def normed(x, rstd, weight, ONCE: tl.constexpr):
    """x · rstd · weight as float32, rounded to the dtype of x after each product, or ONCE: behind both."""
    unit = x.to(tl.float32) * rstd
    if not ONCE:
        unit = rounded_float(unit, x.dtype)
    return rounded_float(unit * weight.to(tl.float32), x.dtype)
