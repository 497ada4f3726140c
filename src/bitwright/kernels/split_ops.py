"""Operators of split inputs (`bitwright.split`), declared like those of `ops`.

`quantize_activations` is what every packed split linear does first. Its outputs are padded for the kernels that
multiply them: base columns to a multiple of 128, outliers to a multiple of 16, all of the padding zeros. The others do
the same behind what comes before a linear, a norm or an activation function, whose result is not written to memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import silu

from bitwright.activations import MAX_ROTATION_BLOCK, quantize_asymmetric, quantize_symmetric, rotate
from bitwright.errors import SchemeError
from bitwright.kernels.ops import define

BASE_PAD, OUTLIER_PAD = 128, 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Quantized = tuple[Tensor, Tensor, Tensor, Tensor]


def _cpu_quantize(
    x: Tensor, base_idx: Tensor | None, outlier_idx: Tensor, bits: int, block: int, clip: float
) -> Quantized:
    _check(x, base_idx, outlier_idx, bits, block)
    out = _allocated(x, base_idx, outlier_idx)
    codes, scale, zero, outliers = out
    O = outlier_idx.shape[0]
    B = x.shape[1] - O if base_idx is None else base_idx.shape[0]
    base = x[:, :B] if base_idx is None else x.index_select(1, base_idx)
    if block:
        base = rotate(base, block)
    codes[:, B:], outliers[:, O:] = 0, 0
    outliers[:, :O] = x.index_select(1, outlier_idx)
    if bits == 8:
        values, of_token = quantize_symmetric(base)
        zero.zero_()
    else:
        values, of_token, zero_point = quantize_asymmetric(base, clip)
        zero.copy_(zero_point[:, 0])
    codes[:, :B] = values
    scale.copy_(of_token[:, 0])
    return out


def _cuda_quantize(
    x: Tensor, base_idx: Tensor | None, outlier_idx: Tensor, bits: int, block: int, clip: float
) -> Quantized:
    run = _kernel()
    if run is None:
        return _cpu_quantize(x, base_idx, outlier_idx, bits, block, clip)
    _check(x, base_idx, outlier_idx, bits, block)
    out = _allocated(x, base_idx, outlier_idx)
    x = x if x.stride(1) == 1 else x.contiguous()
    run(x, base_idx, outlier_idx, bits, block, clip, out)
    return out


def _cpu_norm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    base_idx: Tensor | None,
    outlier_idx: Tensor,
    bits: int,
    block: int,
    clip: float,
    once: bool = False,
) -> Quantized:
    _check(x, base_idx, outlier_idx, bits, block)
    _check_norm(x, weight)
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + eps)
    normed = (weight.to(torch.float32) * h).to(x.dtype) if once else weight * h.to(x.dtype)
    return _cpu_quantize(normed, base_idx, outlier_idx, bits, block, clip)


def _cuda_norm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    base_idx: Tensor | None,
    outlier_idx: Tensor,
    bits: int,
    block: int,
    clip: float,
    once: bool = False,
) -> Quantized:
    run = _kernel()
    if run is None:
        return _cpu_norm_quantize(x, weight, eps, base_idx, outlier_idx, bits, block, clip, once)
    _check(x, base_idx, outlier_idx, bits, block)
    _check_norm(x, weight)
    out = _allocated(x, base_idx, outlier_idx)
    x = x if x.stride(1) == 1 else x.contiguous()
    norm = {"weight": weight.contiguous(), "eps": eps, "once": once}
    run(x, base_idx, outlier_idx, bits, block, clip, out, norm=norm)
    return out


def _cpu_add_norm_quantize(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    base_idx: Tensor | None,
    outlier_idx: Tensor,
    bits: int,
    block: int,
    clip: float,
    once: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_sum(x, residual)
    total = (residual.to(torch.float32) + x.to(torch.float32)).to(x.dtype)
    return *_cpu_norm_quantize(total, weight, eps, base_idx, outlier_idx, bits, block, clip, once), total


def _cuda_add_norm_quantize(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    base_idx: Tensor | None,
    outlier_idx: Tensor,
    bits: int,
    block: int,
    clip: float,
    once: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    run = _kernel()
    if run is None:
        return _cpu_add_norm_quantize(x, residual, weight, eps, base_idx, outlier_idx, bits, block, clip, once)
    _check(x, base_idx, outlier_idx, bits, block)
    _check_sum(x, residual)
    _check_norm(x, weight)
    out, total = _allocated(x, base_idx, outlier_idx), _total(x)
    norm = {"weight": weight.contiguous(), "eps": eps, "once": once, "residual": residual.contiguous(), "total": total}
    run(x.contiguous(), base_idx, outlier_idx, bits, block, clip, out, norm=norm)
    return *out, total


def _cpu_silu_quantize(
    x: Tensor, base_idx: Tensor | None, outlier_idx: Tensor, bits: int, block: int, clip: float
) -> Quantized:
    _check(_gates(x), base_idx, outlier_idx, bits, block)
    gate, up = x.to(torch.float32).chunk(2, dim=1)
    return _cpu_quantize((silu(gate) * up).to(x.dtype), base_idx, outlier_idx, bits, block, clip)


def _cuda_silu_quantize(
    x: Tensor, base_idx: Tensor | None, outlier_idx: Tensor, bits: int, block: int, clip: float
) -> Quantized:
    run = _kernel()
    if run is None:
        return _cpu_silu_quantize(x, base_idx, outlier_idx, bits, block, clip)
    _check(_gates(x), base_idx, outlier_idx, bits, block)
    out = _allocated(_gates(x), base_idx, outlier_idx)
    x = x if x.stride(1) == 1 else x.contiguous()
    run(x, base_idx, outlier_idx, bits, block, clip, out, silu=True)
    return out


def _fake_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, base_idx: Tensor | None, outlier_idx: Tensor, *rest: object
) -> Quantized:
    return _allocated(x, base_idx, outlier_idx)


def _fake_add_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, base_idx: Tensor | None, outlier_idx: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return *_allocated(x, base_idx, outlier_idx), _total(x)


def _fake_silu_quantize(x: Tensor, base_idx: Tensor | None, outlier_idx: Tensor, *rest: object) -> Quantized:
    return _allocated(_gates(x), base_idx, outlier_idx)


def _total(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _gates(x: Tensor) -> Tensor:
    """The first half of the columns."""
    if x.ndim != 2 or x.shape[1] % 2:
        raise SchemeError(f"gates and what they are multiplied with must be [M, 2 K], not {_text(x)}")
    return x[:, : x.shape[1] // 2]


def _allocated(x: Tensor, base_idx: Tensor | None, outlier_idx: Tensor) -> Quantized:
    """Room for the result; it is also what tracing sees."""
    M, O = x.shape[0], outlier_idx.shape[0]
    B = x.shape[1] - O if base_idx is None else base_idx.shape[0]
    codes = torch.empty(M, -(-B // BASE_PAD) * BASE_PAD, dtype=torch.int8, device=x.device)
    scale = torch.empty(M, dtype=torch.float32, device=x.device)
    zero = torch.empty(M, dtype=torch.int32, device=x.device)
    outliers = torch.empty(M, -(-O // OUTLIER_PAD) * OUTLIER_PAD, dtype=x.dtype, device=x.device)
    return codes, scale, zero, outliers


def _fake_quantize(x: Tensor, base_idx: Tensor | None, outlier_idx: Tensor, *rest: object) -> Quantized:
    return _allocated(x, base_idx, outlier_idx)


def _check(x: Tensor, base_idx: Tensor | None, outlier_idx: Tensor, bits: int, block: int) -> None:
    """Kernels take the operands at their word; SchemeError for words they would misread."""
    if x.ndim != 2 or x.dtype not in _DTYPES:
        raise SchemeError(f"activations to quantize must be float32, bfloat16 or float16 [M, K], not {_text(x)}")
    for name, index in (("base_idx", base_idx), ("outlier_idx", outlier_idx)):
        if index is not None and (index.dtype != torch.int32 or index.ndim != 1 or not index.is_contiguous()):
            raise SchemeError(f"{name} must be int32, contiguous and of one dimension, not {_text(index)}")
    K, O = x.shape[1], outlier_idx.shape[0]
    B = K - O if base_idx is None else base_idx.shape[0]
    if B + O != K or B < 1:
        raise SchemeError(f"{B} base and {O} outlier columns do not make up an input of {K}; B + O = K, B at least 1")
    if bits not in (4, 8):
        raise SchemeError(f"activations are quantized to 4 or 8 bits, not {bits}")
    if block < 0 or block > MAX_ROTATION_BLOCK or block & (block - 1) or (block and B % block):
        raise SchemeError(
            f"a rotation over blocks of {block} does not fit {B} base columns; a block is a power of two up to "
            f"{MAX_ROTATION_BLOCK} that divides them, or 0"
        )


def _check_norm(x: Tensor, weight: Tensor) -> None:
    if weight.dtype != x.dtype or weight.shape != (x.shape[1],):
        raise SchemeError(
            f"the norm of {_text(x)} activations needs a weight of that dtype and [{x.shape[1]}], not {_text(weight)}"
        )


def _check_sum(x: Tensor, residual: Tensor) -> None:
    if residual.dtype != x.dtype or residual.shape != x.shape:
        raise SchemeError(f"what is added must be alike, not {_text(x)} and a residual of {_text(residual)}")


def _text(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


@cache
def _kernel() -> Callable[..., None] | None:
    """The Triton kernel; None where there is no Triton, and the obvious program serves the GPU as well."""
    if find_spec("triton") is None:
        return None
    from bitwright.kernels.triton.quantize import quantize

    return quantize


# x [M, K] float32, bf16 or fp16 -> codes int8 [M, Bp], scale float32 [M], zero int32 [M] (0 at 8 bits), outliers
# [M, Op] in the dtype of x; Bp and Op are B and O padded. base_idx int32 [B]: base columns as stored, None = the first
# B; outlier_idx int32 [O]; B + O = K. block: of the rotation, 0 = none. The numbers are those of
# `bitwright.activations`, bit for bit. Codes and zero point of a token whose scale is NaN or Inf mean nothing.
quantize_activations = define(
    "quantize_activations",
    "(Tensor x, Tensor? base_idx, Tensor outlier_idx, int bits, int block, float clip)"
    " -> (Tensor codes, Tensor scale, Tensor zero, Tensor outliers)",
    _cpu_quantize,
    _cuda_quantize,
    _fake_quantize,
)

# The same of RMSNorm(x): in float32 with `eps`, rounded to the dtype of x, times weight [K] in that dtype; once: the
# product too in float32, and rounded after it alone. The order of the sum of squares is the implementation's own, so
# the numbers agree within its rounding, not bit for bit.
rms_norm_quantize = define(
    "rms_norm_quantize",
    "(Tensor x, Tensor weight, float eps, Tensor? base_idx, Tensor outlier_idx, int bits, int block, float clip,"
    " bool once=False) -> (Tensor codes, Tensor scale, Tensor zero, Tensor outliers)",
    _cpu_norm_quantize,
    _cuda_norm_quantize,
    _fake_norm_quantize,
)

# The same of RMSNorm(residual + x), both [M, K] in one dtype; the sum, rounded to it, is also returned: total [M, K].
add_rms_norm_quantize = define(
    "add_rms_norm_quantize",
    "(Tensor x, Tensor residual, Tensor weight, float eps, Tensor? base_idx, Tensor outlier_idx, int bits, int block,"
    " float clip, bool once=False) -> (Tensor codes, Tensor scale, Tensor zero, Tensor outliers, Tensor total)",
    _cpu_add_norm_quantize,
    _cuda_add_norm_quantize,
    _fake_add_norm_quantize,
)

# `quantize_activations` of silu(gate) * up, computed in float32 and rounded once to the dtype of x [M, 2 K], which
# holds gates first. Implementations agree within the rounding of their exponentials.
silu_mul_quantize = define(
    "silu_mul_quantize",
    "(Tensor x, Tensor? base_idx, Tensor outlier_idx, int bits, int block, float clip)"
    " -> (Tensor codes, Tensor scale, Tensor zero, Tensor outliers)",
    _cpu_silu_quantize,
    _cuda_silu_quantize,
    _fake_silu_quantize,
)
