"""The tensors of one split linear (`bitwright.split`): what the native format stores for schemes that are not plain.

======================  ===========  ========================  ===============================================
``weight_packed``       int32        [N, ceil(S*bits/32)]      base codes + 2^(bits-1), packed along K as in `dense`
``weight_scale``        16-bit       [N, G]                    may be negative; scales of the base columns
``weight_values``       16-bit       [N, S]                    instead of the two above: 16-bit weights
``weight_shape``        int64        [2]                       [N, K]
``weight_kept``         uint8        [N, ceil(B/8)]            2:4 only: which two of each four are stored
``weight_outliers``     16-bit       [N, O]                    absent if O = 0
``weight_outlier_idx``  int32        [O]                       original columns, ascending; absent if O = 0
``weight_base_idx``     int16/int32  [B]                       original columns as stored; absent if ascending
``weight_clip``         float32      [1]                       of 4-bit activations; absent if 1
======================  ===========  ========================  ===============================================

B = K - O base columns; S = B, for 2:4 S = B/2: the two stored values of each group of four, in their order. A group's
nibble holds the position of the first in its low two bits and of the second in the next two, first < second; group 2i
is the low nibble of byte i. Rows with fewer than two values that are not zero store zeros. Row sums, which kernels
need for zero points, follow from the codes and are not stored; the block of a rotation follows from B. Base columns are
written as int16 where K <= 32768, and read in both widths: older folders have int32 throughout.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bitwright.activations import rotation_block
from bitwright.errors import FormatError, NumericsError
from bitwright.formats.dense import PACKED, SCALE, SHAPE, check_scale, expect, full, signed, stored_shape, take
from bitwright.packing import pack_rows, packed_words, unpack_rows
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import UNQUANTIZED_BITS, Scheme
from bitwright.split import InputSplit, SplitTensor, order_bits

VALUES = "weight_values"
KEPT = "weight_kept"
OUTLIERS = "weight_outliers"
OUTLIER_IDX = "weight_outlier_idx"
BASE_IDX = "weight_base_idx"
CLIP = "weight_clip"


def pack(tensor: SplitTensor, layer: str = "") -> dict[str, Tensor]:
    """The local tensors of `tensor`. `layer` only names it in errors.

    Raises FormatError for values that are not 16-bit or not 2:4 where the scheme says so, NumericsError for NaN or Inf.
    """
    scheme, split = tensor.scheme, tensor.split
    base = tensor.base.codes if isinstance(tensor.base, QuantizedTensor) else tensor.base
    tensors = {SHAPE: torch.tensor(tensor.shape, dtype=torch.int64)}
    if scheme.sparse:
        base, tensors[KEPT] = _compressed(base, layer)
    if isinstance(tensor.base, QuantizedTensor):
        check_scale(tensor.base.scale, layer)
        bits = scheme.weight.bits
        tensors[PACKED] = pack_rows(base.contiguous().view(torch.uint8) + (1 << (bits - 1)), bits)
        tensors[SCALE] = tensor.base.scale.contiguous()
    else:
        _check_values(base, VALUES, layer)
        tensors[VALUES] = base.contiguous()
    if len(split.outlier_idx):
        _check_values(tensor.outliers, OUTLIERS, layer)
        tensors[OUTLIERS] = tensor.outliers.contiguous()
        tensors[OUTLIER_IDX] = split.outlier_idx.to(torch.int32)
    if not split.ascending:
        tensors[BASE_IDX] = split.base_idx.to(torch.int16 if order_bits(split.K) == 16 else torch.int32)
    if split.clip != 1:
        tensors[CLIP] = torch.tensor([split.clip], dtype=torch.float32)
    return tensors


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme, layer: str = "") -> SplitTensor:
    """The SplitTensor that `pack` stored. Raises FormatError naming the tensor that is missing or malformed."""
    N, K = stored_shape(tensors, layer)
    device = tensors[SHAPE].device
    outliers, outlier_idx = torch.empty(N, 0, device=device), torch.empty(0, dtype=torch.int64, device=device)
    if OUTLIERS in tensors or OUTLIER_IDX in tensors:
        asked = 0 if scheme.outliers is None else scheme.outliers.columns(K)
        outlier_idx, outliers = take(tensors, OUTLIER_IDX, layer), take(tensors, OUTLIERS, layer)
        expect(outlier_idx, OUTLIER_IDX, (asked,), torch.int32, layer)
        expect(outliers, OUTLIERS, (N, asked), None, layer)
        _check_values(outliers, OUTLIERS, layer)
        outlier_idx = outlier_idx.to(torch.int64)
    B = K - len(outlier_idx)
    if BASE_IDX in tensors:
        narrow = tensors[BASE_IDX].dtype == torch.int16 and order_bits(K) == 16
        expect(tensors[BASE_IDX], BASE_IDX, (B,), torch.int16 if narrow else torch.int32, layer)
        base_idx = tensors[BASE_IDX].to(torch.int64)
    else:
        free = torch.ones(K, dtype=torch.bool, device=device)
        if len(outlier_idx) and (int(outlier_idx.min()) < 0 or int(outlier_idx.max()) >= K):
            raise FormatError(f"{full(layer, OUTLIER_IDX)} names a column outside the {K} of the input; it is damaged")
        free[outlier_idx] = False
        base_idx = free.nonzero()[:, 0]
    clip = 1.0
    if CLIP in tensors:
        expect(tensors[CLIP], CLIP, (1,), torch.float32, layer)
        clip = float(tensors[CLIP])
    try:
        block = rotation_block(B) if scheme.rotated else 0
        split = InputSplit(base_idx, outlier_idx, scheme.activation_bits, block, clip)
        base = _base(tensors, scheme, N, B, layer)
        return SplitTensor(base, outliers.to(_dtype(base)), split, scheme)
    except (FormatError, RuntimeError) as error:
        known = isinstance(error, FormatError) and layer and str(error).startswith(layer)
        raise error if known else FormatError(f"{layer or 'weight'}: {error}") from error


def _base(tensors: Mapping[str, Tensor], scheme: Scheme, N: int, B: int, layer: str) -> QuantizedTensor | Tensor:
    stored, bits = B // 2 if scheme.sparse else B, scheme.weight.bits
    if bits == UNQUANTIZED_BITS:
        values = take(tensors, VALUES, layer)
        expect(values, VALUES, (N, stored), None, layer)
        _check_values(values, VALUES, layer)
        return _expanded(values, tensors, B, layer) if scheme.sparse else values
    packed, scale = take(tensors, PACKED, layer), take(tensors, SCALE, layer)
    expect(packed, PACKED, (N, packed_words(stored, bits)), torch.int32, layer)
    expect(scale, SCALE, (N, scheme.weight.num_groups(B)), None, layer)
    check_scale(scale, layer)
    codes = signed(unpack_rows(packed, bits, stored), bits)
    if scheme.sparse:
        codes = _expanded(codes, tensors, B, layer)
    return QuantizedTensor(codes, scale, None, scheme.weight)


def _compressed(base: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    """[N, B/2] stored values of a 2:4 matrix [N, B], and their positions uint8 [N, ceil(B/8)]."""
    N, B = base.shape
    fours = base.reshape(N, B // 4, 4)
    if int((fours != 0).sum(-1).max()) > 2:
        raise FormatError(f"{layer or 'weight'}: more than two of four neighbours are not zero, so it is not 2:4")
    # Values that are not zero first, each kind in its order; the two taken are then put back into their order.
    positions = torch.argsort((fours == 0).to(torch.uint8), dim=-1, stable=True)[..., :2].sort(-1).values
    values = fours.gather(-1, positions).reshape(N, B // 2)
    nibbles = (positions[..., 0] | positions[..., 1] << 2).to(torch.uint8)
    nibbles = torch.nn.functional.pad(nibbles, (0, (B // 4) % 2))
    return values, (nibbles[:, ::2] | nibbles[:, 1::2] << 4).contiguous()


def _expanded(values: Tensor, tensors: Mapping[str, Tensor], B: int, layer: str) -> Tensor:
    """The inverse of `_compressed`."""
    N, kept = values.shape[0], take(tensors, KEPT, layer)
    expect(kept, KEPT, (N, -(-B // 8)), torch.uint8, layer)
    nibbles = torch.stack((kept & 15, kept >> 4), dim=-1).view(N, -1)[:, : B // 4]
    positions = torch.stack((nibbles & 3, nibbles >> 2), dim=-1).to(torch.int64)
    if not bool((positions[..., 0] < positions[..., 1]).all()):
        raise FormatError(f"{full(layer, KEPT)} names one position twice or out of order; the file is damaged")
    out = torch.zeros(N, B // 4, 4, dtype=values.dtype, device=values.device)
    return out.scatter_(-1, positions, values.view(N, B // 4, 2)).view(N, B)


def _dtype(base: QuantizedTensor | Tensor) -> torch.dtype:
    return base.scale.dtype if isinstance(base, QuantizedTensor) else base.dtype


def _check_values(values: Tensor, key: str, layer: str) -> None:
    if values.dtype not in (torch.float16, torch.bfloat16):
        raise FormatError(f"{full(layer, key)} is {values.dtype}; such weights are stored in 16 bits")
    if not bool(torch.isfinite(values).all()):
        raise NumericsError(f"{full(layer, key)} holds NaN or Inf as {values.dtype}; use bfloat16, or repair the file")
