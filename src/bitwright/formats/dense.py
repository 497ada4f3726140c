"""The tensors of one quantized linear, packed densely: the layout that our two formats share.

=====================  ==========  ======================  =============================================
``weight_packed``      int32       [N, ceil(K*bits/32)]    codes + 2^(bits-1), packed along K
``weight_scale``       16-bit      [N, G]                  may be negative
``weight_zero_point``  int32       [ceil(N*bits/32), G]    offset like the codes, packed along N; asymmetric only
``weight_shape``       int64       [2]                     [N, K]: the packed width alone does not tell K
=====================  ==========  ======================  =============================================

It is compressed-tensors' `pack-quantized` layout of version 0.18 and later. Nothing in it needs K to be a multiple of
the group size, so the native format uses it too, ragged last group included.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bitwright.errors import FormatError, NumericsError
from bitwright.packing import pack_rows, packed_words, unpack_rows
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import WeightScheme

PACKED = "weight_packed"
SCALE = "weight_scale"
ZERO_POINT = "weight_zero_point"
SHAPE = "weight_shape"


def pack(qt: QuantizedTensor, layer: str = "") -> dict[str, Tensor]:
    """The local tensors of `qt`. `layer` only names it in errors.

    Raises FormatError for a scale that is not 16-bit, columns in activation order or codes off the grid, NumericsError
    for a NaN or Inf scale.
    """
    bits = qt.scheme.bits
    check_scale(qt.scale, layer)
    refuse_order(qt, layer)
    tensors = {
        PACKED: pack_rows(_unsigned(qt.codes, bits), bits),
        SCALE: qt.scale.contiguous(),
        SHAPE: torch.tensor(qt.shape, dtype=torch.int64),
    }
    if qt.zero_point is not None:
        tensors[ZERO_POINT] = pack_rows(_unsigned(qt.zero_point.t(), bits), bits).t().contiguous()
    return tensors


def unpack(tensors: Mapping[str, Tensor], scheme: WeightScheme, layer: str = "") -> QuantizedTensor:
    """The QuantizedTensor that `pack` stored. Raises FormatError naming the tensor that is missing or malformed."""
    N, K = stored_shape(tensors, layer)
    packed, bits = take(tensors, PACKED, layer), scheme.bits
    expect(packed, PACKED, (N, packed_words(K, bits)), torch.int32, layer)
    groups = scheme.num_groups(K)
    scale = take(tensors, SCALE, layer)
    expect(scale, SCALE, (N, groups), None, layer)
    zero_point = None
    if not scheme.symmetric:
        stored = take(tensors, ZERO_POINT, layer)
        expect(stored, ZERO_POINT, (packed_words(N, bits), groups), torch.int32, layer)
        zero_point = signed(unpack_rows(stored.t(), bits, N), bits).t().contiguous()
    return QuantizedTensor(signed(unpack_rows(packed, bits, K), bits), scale, zero_point, scheme)


def stored_shape(tensors: Mapping[str, Tensor], layer: str) -> tuple[int, int]:
    """(N, K) from ``weight_shape``."""
    shape = take(tensors, SHAPE, layer)
    if shape.dtype.is_floating_point or tuple(shape.shape) != (2,) or int(shape.min()) < 1:
        raise FormatError(
            f"{full(layer, SHAPE)} must hold two positive integers [N, K], not {shape.dtype} {shape.tolist()}"
        )
    return int(shape[0]), int(shape[1])


def take(tensors: Mapping[str, Tensor], key: str, layer: str) -> Tensor:
    """The tensor `key`; FormatError if the checkpoint lacks it."""
    if key not in tensors:
        raise FormatError(
            f"{full(layer, key)} is missing (found {', '.join(sorted(tensors)) or 'nothing'}); "
            "the checkpoint is incomplete or its config names another format"
        )
    return tensors[key]


def expect(tensor: Tensor, key: str, shape: tuple[int, ...], dtype: torch.dtype | None, layer: str) -> None:
    """FormatError unless `tensor` has this shape and this dtype (None = any floating point)."""
    right_dtype = tensor.dtype.is_floating_point if dtype is None else tensor.dtype == dtype
    if tuple(tensor.shape) != shape or not right_dtype:
        raise FormatError(
            f"{full(layer, key)} is {tensor.dtype} {tuple(tensor.shape)}, but its config needs "
            f"{dtype or 'floating point'} {shape}; the config or the file is damaged"
        )


def check_scale(scale: Tensor, layer: str) -> None:
    """Scales are stored in 16 bits and counted as such; a 32-bit one would be a silent extra half bit at g32."""
    if scale.dtype not in (torch.float16, torch.bfloat16):
        raise FormatError(
            f"{full(layer, SCALE)} is {scale.dtype}; scales are stored in 16 bits: round it to torch.bfloat16 or "
            "torch.float16 before the codes are chosen"
        )
    if not bool(torch.isfinite(scale).all()):
        raise NumericsError(
            f"{full(layer, SCALE)} holds NaN or Inf as {scale.dtype}; the weights are not finite, or exceed the range "
            "of float16: use torch.bfloat16 scales"
        )


def refuse_order(qt: QuantizedTensor, layer: str) -> None:
    """Formats here have no place for `order`; leaving it out would store another weight."""
    if qt.order is not None:
        raise FormatError(
            f"{layer or 'weight'}: its columns are in activation order (g_idx), which is read but not written; keep "
            "the original checkpoint, or quantize its dequantized weights again"
        )


def signed(codes: Tensor, bits: int) -> Tensor:
    """int8 in [-2^(bits-1), 2^(bits-1)) of unsigned uint8 codes; the subtraction wraps, which is what 8 bits need."""
    return (codes - (1 << (bits - 1))).view(torch.int8)


def full(layer: str, key: str) -> str:
    """`layer.key`, or the key alone where the layer is not known."""
    return f"{layer}.{key}" if layer else key


def _unsigned(codes: Tensor, bits: int) -> Tensor:
    return codes.contiguous().view(torch.uint8) + (1 << (bits - 1))
