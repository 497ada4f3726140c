"""Random split tensors for tests, and an input quantized the plain way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitwright.activations import quantize_asymmetric, quantize_symmetric, rotation_block
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import Scheme
from bitwright.split import InputSplit, SplitTensor


def random_split_tensor(
    N: int,
    K: int,
    text: str,
    seed: int = 0,
    *,
    clip: float = 1.0,
    shuffled: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> SplitTensor:
    """Random codes over the whole grid, scales of both signs, outliers; 2:4 where the scheme says so. shuffled: base
    columns in a random order."""
    g = torch.Generator().manual_seed(seed)
    scheme = Scheme.parse(text)
    O = 0 if scheme.outliers is None else scheme.outliers.columns(K)
    order = torch.randperm(K, generator=g)
    outlier_idx, base_idx = order[:O].sort().values, order[O:]
    if not shuffled:
        base_idx = base_idx.sort().values
    B, w = K - O, scheme.weight
    mask = torch.ones(N, B, dtype=torch.bool)
    if scheme.sparse:
        ranks = torch.rand(N, B // 4, 4, generator=g).argsort(-1)
        mask = (ranks < 2).view(N, B)
    base: QuantizedTensor | torch.Tensor
    if w.bits == 16:
        base = torch.where(mask, torch.randn(N, B, generator=g), 0.0).to(dtype)
    else:
        codes = torch.randint(w.qmin, w.qmax + 1, (N, B), generator=g).to(torch.int8)
        scale = (torch.randn(N, w.num_groups(B), generator=g) * 0.1).to(dtype)
        base = QuantizedTensor(torch.where(mask, codes, 0).to(torch.int8), scale, None, w)
    split = InputSplit(base_idx, outlier_idx, scheme.activation_bits, rotation_block(B) if scheme.rotated else 0, clip)
    return SplitTensor(base, torch.randn(N, O, generator=g).to(dtype), split, scheme)


@dataclass(frozen=True)
class Codes:
    """A quantized input as the int8 operators take it."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    outliers: Tensor


class PlainInput:
    """Quantizes by `activations` alone."""

    def __init__(self, split: InputSplit) -> None:
        self.split = split

    def codes(self, x: Tensor) -> Codes:
        base, outliers = self.split.parts(x)
        if self.split.bits == 8:
            codes, scale = quantize_symmetric(base)
            zero = torch.zeros_like(scale, dtype=torch.int32)
        else:
            codes, scale, zero = quantize_asymmetric(base, self.split.clip)
        B, O = base.shape[1], outliers.shape[1]
        wide = pad(codes, (0, -B % 128))
        return Codes(wide, scale[:, 0].contiguous(), zero[:, 0].to(torch.int32), pad(outliers, (0, -O % 16)))
