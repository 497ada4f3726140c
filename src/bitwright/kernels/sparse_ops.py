"""The operator for 2:4 weights and quantized activations on Hopper's sparse int8 tensor cores.

Operands and result are those of `int8_ops.int8_linear`, but for the weight: int8 [ceil(N / 16), Bp / 128,
`sparse_fragments.block_bytes`] of codes of 4 or 8 bits (`sparse_fragments.pack`). On a CPU it is a slow and obvious
program.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.errors import SchemeError
from bitwright.kernels import sparse_fragments
from bitwright.kernels.fragments import ROWS
from bitwright.kernels.int8_fragments import MAX_COLUMNS, STEP, padded
from bitwright.kernels.int8_ops import check_rest, cpu_finish, fake_linear
from bitwright.kernels.ops import define


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
    unpacked = sparse_fragments.unpack(weight, N, B, bits)
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
    from bitwright.kernels.nvrtc.launch import linear

    _check(codes, weight, bits, N, B)
    check_rest(
        scale, zero, outliers, weight_scale, row_sums, weight_outliers, bias, codes.shape[0], N, dtype, codes.device
    )
    return linear(
        codes, scale, zero, outliers, weight, weight_scale, row_sums, weight_outliers, bias, bits, N, B, dtype
    )


def _check(codes: Tensor, weight: Tensor, bits: int, N: int, B: int) -> None:
    """The kernel would read past the end of operands that do not fit, and int32 sums of more columns would wrap."""
    if bits not in (4, 8):
        raise SchemeError(f"sparse int8 tensor cores take codes of 4 or 8 bits, not of {bits}")
    if not 0 < B <= MAX_COLUMNS:
        raise SchemeError(f"{B} base columns: int32 holds the sums of 1 to {MAX_COLUMNS}; use 16-bit activations")
    Bp = padded(B)
    held = (-(-N // ROWS), Bp // STEP, sparse_fragments.block_bytes(bits))
    for name, tensor, shape in (("codes", codes, (codes.shape[0], Bp)), ("weight", weight, held)):
        if tensor.dtype != torch.int8 or tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise SchemeError(
                f"{name} must be contiguous int8 {list(shape)} for {bits}-bit 2:4 codes of a weight [{N}, {B}], not "
                f"{tensor.dtype} {list(tensor.shape)}"
            )
    if weight.device != codes.device:
        raise SchemeError(f"the weight is on {weight.device}, the codes on {codes.device}; move the linear there")


# -> [M, N]
int8_sparse_linear = define(
    "int8_sparse_linear",
    "(Tensor codes, Tensor scale, Tensor zero, Tensor outliers, Tensor weight, Tensor weight_scale, Tensor row_sums, "
    "Tensor weight_outliers, Tensor? bias, int bits, int N, int B, ScalarType dtype) -> Tensor",
    _cpu_linear,
    _cuda_linear,
    fake_linear,
)
