"""Matrices whose input columns are split: most on an integer grid, a few outliers at 16 bits.

`InputSplit` belongs to an input, not to a linear: linears that read the same tensor get the same one, so that
calibration gathers their statistics once, and packed they quantize the input once (`kernels.shared_input`). It maps an
input x [..., K] to its *arranged* form z [..., K], base columns first (in the order in which they are stored),
outliers last; with a rotation, the base part of z is rotated. `SplitTensor` is a weight in arranged form: W x = W_z z.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from bitwright.activations import quantize_asymmetric, quantize_symmetric, rotate
from bitwright.errors import FormatError
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import Scheme

CLIP_BITS = 32


def order_bits(K: int) -> int:
    """Bits that a stored base column of a width-K input takes where their order is stored."""
    return 16 if K <= 1 << 15 else 32


@dataclass(frozen=True, eq=False)
class InputSplit:
    """What becomes of an input [..., K] before it meets a weight.

    base_idx int64 [B], outlier_idx int64 [O], B + O = K: original columns in stored order, each column once; outliers
    ascending. bits: of the base activations (4, 8, or 16 = as they are). block: of the rotation, 0 = none. clip: share
    of a token's range that a 4-bit grid spans.
    """

    base_idx: Tensor
    outlier_idx: Tensor
    bits: int
    block: int = 0
    clip: float = 1.0

    def __post_init__(self) -> None:
        order = self.order
        if not torch.equal(order.sort().values, torch.arange(len(order), device=order.device)):
            raise FormatError(
                f"base and outlier columns must name each of the {len(order)} input columns once; "
                "the indices are damaged"
            )
        if not 0 < self.clip <= 1:
            raise FormatError(f"clip {self.clip} is no share of a range; it lies above 0 and at most at 1")
        if self.block and len(self.base_idx) % self.block:
            raise FormatError(f"a rotation over blocks of {self.block} does not fit {len(self.base_idx)} base columns")

    @cached_property
    def order(self) -> Tensor:
        """Original column of every arranged one, int64 [K]."""
        return torch.cat((self.base_idx, self.outlier_idx))

    @cached_property
    def ascending(self) -> bool:
        """Whether base columns are stored in the order of the input, which then need not be stored itself."""
        return bool((self.base_idx[1:] > self.base_idx[:-1]).all())

    @property
    def K(self) -> int:
        """Width of the input."""
        return len(self.base_idx) + len(self.outlier_idx)

    def to(self, device: torch.device | str) -> InputSplit:
        """The same with its indices on `device`."""
        return replace(self, base_idx=self.base_idx.to(device), outlier_idx=self.outlier_idx.to(device))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., K] -> base [..., B] (float32 if rotated, else as x) and outliers [..., O] as x."""
        base = x[..., self.base_idx]
        return (rotate(base, self.block) if self.block else base), x[..., self.outlier_idx]

    def arrange(self, x: Tensor) -> Tensor:
        """x [..., K] -> z [..., K] float32, nothing quantized."""
        base, outliers = self.parts(x)
        return torch.cat((base.float(), outliers.float()), dim=-1)

    def seen(self, x: Tensor) -> Tensor:
        """x [..., K] -> z [..., K] float32 as the integer product sees it: the base part rounded to its codes."""
        base, outliers = self.parts(x)
        if self.bits == 8:
            codes, scale = quantize_symmetric(base)
            base = codes * scale
        elif self.bits == 4:
            codes, scale, zero = quantize_asymmetric(base, self.clip)
            base = (codes - zero) * scale
        return torch.cat((base.float(), outliers.float()), dim=-1)

    def arrange_mask(self, mask: Tensor) -> Tensor:
        """bool [K] of the input's columns -> bool [K] of the arranged ones: where a rotation mixes columns, those of a
        block in which it holds for all."""
        base = mask[self.base_idx]
        if self.block:
            base = base.view(-1, self.block).all(1, keepdim=True).expand(-1, self.block).reshape(-1)
        return torch.cat((base, mask[self.outlier_idx]))

    def arrange_weight(self, W: Tensor) -> Tensor:
        """W [N, K] -> W_z [N, K] float32 with W_z · arrange(x) = W · x."""
        base, outliers = W[:, self.base_idx].float(), W[:, self.outlier_idx].float()
        return torch.cat((rotate(base, self.block) / self.block if self.block else base, outliers), dim=1)

    def restore_weight(self, Wz: Tensor) -> Tensor:
        """W [N, K] of W_z, the inverse of `arrange_weight` (up to float32 rounding if rotated)."""
        B = len(self.base_idx)
        base = rotate(Wz[:, :B], self.block) if self.block else Wz[:, :B]
        out = torch.empty_like(Wz)
        out[:, self.order] = torch.cat((base, Wz[:, B:]), dim=1)
        return out


@dataclass(frozen=True, eq=False)
class SplitTensor:
    """A weight [N, K] in arranged form, unpacked.

    base: a QuantizedTensor [N, B] on the scheme's grid, or for 16-bit weights the values themselves, 16-bit [N, B].
    With 2:4 at most two of four neighbours of a row are not zero (codes of a pruned weight are 0). outliers: 16-bit
    [N, O]. scheme: with its outliers as a count; O is that count, or 0 for an input that needs none.
    """

    base: QuantizedTensor | Tensor
    outliers: Tensor
    split: InputSplit
    scheme: Scheme

    def __post_init__(self) -> None:
        N, B = self.base.shape
        O = len(self.split.outlier_idx)
        asked = 0 if self.scheme.outliers is None else self.scheme.outliers.count
        if len(self.split.base_idx) != B or tuple(self.outliers.shape) != (N, O) or O not in (0, asked):
            raise FormatError(
                f"a split weight at {self.scheme} has {B} base columns, outliers {tuple(self.outliers.shape)} and an "
                f"input of {len(self.split.base_idx)} + {O} columns; they do not belong together"
            )
        if B == 0 or (self.scheme.sparse and B % 4):
            raise FormatError(f"{B} base columns remain at {self.scheme}; 2:4 needs a multiple of 4, all need one")
        if isinstance(self.base, QuantizedTensor) != (self.scheme.weight.bits < 16) or (
            isinstance(self.base, QuantizedTensor) and self.base.scheme != self.scheme.weight
        ):
            raise FormatError(f"the base columns are not on the grid of {self.scheme}")
        if isinstance(self.base, QuantizedTensor) and self.base.order is not None:
            raise FormatError(
                "the base of a split weight has an order of its own; the split says how columns are stored"
            )
        if self.split.bits != self.scheme.activation_bits or bool(self.split.block) != self.scheme.rotated:
            raise FormatError(f"the input is not split as {self.scheme} says")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.base.shape[0], self.split.K

    @property
    def scale(self) -> Tensor:
        """[N, G] of the grid; for 16-bit weights an empty tensor of their dtype."""
        return self.base.scale if isinstance(self.base, QuantizedTensor) else self.base.new_empty(0)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, everything included: a clip and an order of the base columns where there is one, so
        that it may lie above what the scheme alone says."""
        N, K = self.shape
        taken = self.scheme if len(self.split.outlier_idx) else replace(self.scheme, outliers=None)
        extra = 0 if self.split.ascending else len(self.split.base_idx) * order_bits(K)
        extra += 0 if self.split.clip == 1 else CLIP_BITS
        return taken.bits_per_weight(N, K) + extra / (N * K)

    def arranged(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W_z [N, K]: base as dequantized, then outliers; formed in float32 and rounded once to `dtype`."""
        base = self.base.dequantize() if isinstance(self.base, QuantizedTensor) else self.base.float()
        return torch.cat((base, self.outliers.float()), dim=1).to(dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] for the input as it is: formed in float32 and rounded once to `dtype`."""
        return self.split.restore_weight(self.arranged()).to(dtype)

    def to(self, device: torch.device | str) -> SplitTensor:
        """The same on `device`."""
        base = self.base
        if isinstance(base, QuantizedTensor):
            base = QuantizedTensor(base.codes.to(device), base.scale.to(device), None, base.scheme)
        else:
            base = base.to(device)
        return SplitTensor(base, self.outliers.to(device), self.split.to(device), self.scheme)
