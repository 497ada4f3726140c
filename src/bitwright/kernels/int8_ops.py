"""Operators on quantized activations: the packed linear on int8 tensor cores, and its end for sums made elsewhere.

Operands, the same in both, for M tokens, N outputs, B base columns (Bp = B rounded up to 128) and O outliers (Op = O
rounded up to 16; 0 where there are none); what pads is 0:

* codes int8 [M, Bp], scale float32 [M], zero int32 [M] (0 at 8 bits), outliers [M, Op]: an input, split and quantized;
* weight: int8 [ceil(N / 16), Bp / 64, 512] of 4 bits (`int8_fragments.pack`), int8 [N, Bp] of 8 bits; weight_scale
  float32 [N]; row_sums int32 [N] of the codes; weight_outliers [N, Op] in the dtype of outliers; bias [N] or None.

The result is what `reference.split_linear` defines, plus the bias, rounded once to `dtype`. On a CPU both are slow and
obvious programs, in any floating dtype; on CUDA dtype and outliers are bfloat16 or float16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.errors import SchemeError
from bitwright.kernels import int8_fragments
from bitwright.kernels.fragments import COLUMNS, ROWS
from bitwright.kernels.int8_fragments import BYTES, MAX_COLUMNS, padded
from bitwright.kernels.machine import machine
from bitwright.kernels.ops import define
from bitwright.kernels.problem import GLUON, HOPPER, cuda_features

_DTYPES = (torch.bfloat16, torch.float16)  # of what goes in and out on CUDA
OUTLIER_STEP = 16  # outliers are padded to a multiple: what one instruction takes of them
FEW_TOKENS = 64  # up to which the Triton kernel multiplies on every GPU; beyond, Hopper has one of its own


def _cpu_linear(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    outliers: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    row_sums: Tensor,
    weight_outliers: Tensor,
    bias: Tensor | None,
    bits: int,
    N: int,
    B: int,
    dtype: torch.dtype,
) -> Tensor:
    _check(codes, weight, bits, N, B)
    unpacked = int8_fragments.unpack(weight, N, B) if bits == 4 else weight[:, :B]
    # float64 holds every one of these integers exactly.
    sums = unpacked.to(torch.float64) @ codes[:, :B].to(torch.float64).t()
    out = torch.empty(codes.shape[0], N, dtype=dtype)
    cpu_finish(out, sums, scale, zero, outliers, weight_scale, row_sums, weight_outliers, bias)
    return out


def _cuda_linear(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    outliers: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    row_sums: Tensor,
    weight_outliers: Tensor,
    bias: Tensor | None,
    bits: int,
    N: int,
    B: int,
    dtype: torch.dtype,
) -> Tensor:
    from bitwright.kernels.triton.int8 import linear

    _check(codes, weight, bits, N, B)
    check_rest(
        scale, zero, outliers, weight_scale, row_sums, weight_outliers, bias, codes.shape[0], N, dtype, codes.device
    )
    if codes.shape[0] > FEW_TOKENS and {HOPPER, GLUON} <= cuda_features(codes.device):
        from bitwright.kernels.gluon import int8

        if int8.fills(codes.shape[0], N, machine(codes.device)[1]):
            linear = int8.linear
    return linear(
        codes, scale, zero, outliers, weight, weight_scale, row_sums, weight_outliers, bias, bits, N, B, dtype
    )


def fake_linear(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    outliers: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    row_sums: Tensor,
    weight_outliers: Tensor,
    bias: Tensor | None,
    bits: int,
    N: int,
    B: int,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(codes.shape[0], N, dtype=dtype)


def cpu_finish(
    out: Tensor,
    sums: Tensor,
    scale: Tensor,
    zero: Tensor,
    outliers: Tensor,
    weight_scale: Tensor,
    row_sums: Tensor,
    weight_outliers: Tensor,
    bias: Tensor | None,
) -> None:
    """out [M, N] of sums [at least N, at least M] that hold integers exactly, slow and obvious."""
    M, N = scale.shape[0], weight_scale.shape[0]
    exact = sums[:N, :M].t().to(torch.float64) - zero.to(torch.float64)[:, None] * row_sums.to(torch.float64)
    y = exact.to(torch.float32) * scale[:, None] * weight_scale
    if outliers.shape[1]:
        y = y + outliers.to(torch.float32) @ weight_outliers.to(torch.float32).t()
    if bias is not None:
        y = y + bias.to(torch.float32)
    out.copy_(y)


def _cuda_finish(
    out: Tensor,
    sums: Tensor,
    scale: Tensor,
    zero: Tensor,
    outliers: Tensor,
    weight_scale: Tensor,
    row_sums: Tensor,
    weight_outliers: Tensor,
    bias: Tensor | None,
) -> None:
    from bitwright.kernels.triton.int8 import finish

    M, N = scale.shape[0], weight_scale.shape[0]
    check_rest(scale, zero, outliers, weight_scale, row_sums, weight_outliers, bias, M, N, out.dtype, out.device)
    if tuple(out.shape) != (M, N) or (M > 0 and N > 1 and out.stride(1) != 1):
        raise SchemeError(
            f"out is {list(out.shape)} with strides {out.stride()}; rows of [{M}, {N}] are needed, each contiguous"
        )
    if sums.dtype != torch.int32 or sums.ndim != 2 or sums.shape[0] < N or sums.shape[1] < M or sums.stride(1) != 1:
        raise SchemeError(
            f"sums are {sums.dtype} {list(sums.shape)} with strides {sums.stride()}; int32 rows of [{N}, {M}] are "
            "needed, or more of them"
        )
    finish(out, sums, scale, zero, outliers, weight_scale, row_sums, weight_outliers, bias)


def _fake_finish(
    out: Tensor,
    sums: Tensor,
    scale: Tensor,
    zero: Tensor,
    outliers: Tensor,
    weight_scale: Tensor,
    row_sums: Tensor,
    weight_outliers: Tensor,
    bias: Tensor | None,
) -> None:
    return None


def _check(codes: Tensor, weight: Tensor, bits: int, N: int, B: int) -> None:
    """A kernel would read past the end of operands that do not fit, and int32 sums of more columns would wrap."""
    if bits not in (4, 8):
        raise SchemeError(f"int8 tensor cores take codes of 4 or 8 bits, not of {bits}")
    if not 0 < B <= MAX_COLUMNS:
        raise SchemeError(f"{B} base columns: int32 holds the sums of 1 to {MAX_COLUMNS}; use 16-bit activations")
    Bp = padded(B)
    held = (-(-N // ROWS), Bp // COLUMNS, BYTES) if bits == 4 else (N, Bp)
    for name, tensor, shape in (("codes", codes, (codes.shape[0], Bp)), ("weight", weight, held)):
        if tensor.dtype != torch.int8 or tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise SchemeError(
                f"{name} must be contiguous int8 {list(shape)} for {bits}-bit codes of a weight [{N}, {B}], not "
                f"{tensor.dtype} {list(tensor.shape)}"
            )
    if weight.device != codes.device:
        raise SchemeError(f"the weight is on {weight.device}, the codes on {codes.device}; move the linear there")


def check_rest(
    scale: Tensor,
    zero: Tensor,
    outliers: Tensor,
    weight_scale: Tensor,
    row_sums: Tensor,
    weight_outliers: Tensor,
    bias: Tensor | None,
    M: int,
    N: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Kernels read bits as they are, where they are told to: a wrong dtype or shape would give wrong numbers in
    silence, and memory of another device ends the process's use of this one.
    """
    if dtype not in _DTYPES:
        raise SchemeError(f"the int8 kernels give bfloat16 or float16, not {dtype}; cast the activations")
    Op = outliers.shape[1]
    wanted = [
        ("scale", scale, torch.float32, (M,)),
        ("zero", zero, torch.int32, (M,)),
        ("outliers", outliers, dtype if Op else outliers.dtype, (M, -(-Op // OUTLIER_STEP) * OUTLIER_STEP)),
        ("weight_scale", weight_scale, torch.float32, (N,)),
        ("row_sums", row_sums, torch.int32, (N,)),
        ("weight_outliers", weight_outliers, dtype if Op else weight_outliers.dtype, (N, Op)),
    ]
    if bias is not None:
        wanted.append(("bias", bias, bias.dtype, (N,)))
    for name, tensor, kind, shape in wanted:
        if tensor.dtype != kind or tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise SchemeError(
                f"{name} must be contiguous {kind} {list(shape)}, not {tensor.dtype} {list(tensor.shape)}; quantize "
                f"the input and pack the weight for {dtype}"
            )
        if tensor.device != device:
            raise SchemeError(f"{name} is on {tensor.device}, the codes on {device}; move the linear there")


_REST = "Tensor weight_scale, Tensor row_sums, Tensor weight_outliers, Tensor? bias"

# -> [M, N]
int8_linear = define(
    "int8_linear",
    f"(Tensor codes, Tensor scale, Tensor zero, Tensor outliers, Tensor weight, {_REST}, int bits, int N, int B, "
    "ScalarType dtype) -> Tensor",
    _cpu_linear,
    _cuda_linear,
    fake_linear,
)

# out [M, N], columns contiguous, becomes the result, in its dtype, of sums int32 [at least N, at least M]: products of
# codes made by somebody else. Rows of out may be parts of longer ones: a weight can be multiplied in slabs of its rows.
int8_finish = define(
    "int8_finish",
    f"(Tensor(a!) out, Tensor sums, Tensor scale, Tensor zero, Tensor outliers, {_REST}) -> ()",
    cpu_finish,
    _cuda_finish,
    _fake_finish,
)
