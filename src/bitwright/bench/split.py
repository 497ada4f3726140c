"""Weights whose input is split (outlier columns, 4-bit activations, 2:4): random ones, what must come out of them, and
the parts of the time that a linear over one takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from bitwright.activations import quantize_asymmetric, quantize_symmetric, rotation_block
from bitwright.kernels.problem import Problem
from bitwright.kernels.shared_input import Alone, Codes
from bitwright.kernels.split_cuda import Int8Weight, as_split
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import UNQUANTIZED_BITS, Scheme
from bitwright.split import InputSplit, SplitTensor

_PIECE = 1 << 26  # weights that go through float64 at a time

# Of a call that quantizes its input: that alone; all the rest, as a linear takes it that finds the input quantized by
# another; and of that rest the product of the base columns with its scales, without outliers.
QUANTIZE, READY, PRODUCT = "quantize", "codes ready", "product alone"


class SplitLinear:
    """x [M, K] -> [M, N] over a packed weight that quantizes its input at every call, shared with nobody."""

    def __init__(self, weight: Int8Weight) -> None:
        self.weight = weight

    @classmethod
    def prepare(cls, implementation: type[Int8Weight], qt: QuantizedTensor | SplitTensor, problem: Problem) -> Self:
        """`qt` packed by `implementation`."""
        tensor = as_split(qt, problem)
        return cls(implementation(problem, tensor, Alone(tensor.split)))

    def __call__(self, x: Tensor) -> Tensor:
        return self.weight.linear(x, None)

    def parts(self, x: Tensor) -> dict[str, Callable[[], object]]:
        """Calls that do a part of the work on x each, by name."""
        weight, codes = self.weight, self.weight.quantizer.codes(x)
        base, bare = weight.without_outliers(), Codes(codes.codes, codes.scale, codes.zero, codes.outliers[:, :0])
        return {
            QUANTIZE: lambda: weight.quantizer.codes(x),
            READY: lambda: weight.multiply(codes),
            PRODUCT: lambda: base.multiply(bare),
        }


def random_split(
    N: int, K: int, scheme: Scheme, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> SplitTensor:
    """A weight [N, K] on the scheme's grid with codes over its whole range and outputs near 1; outlier columns spread
    over the input, as calibration finds them, and drawn by shape alone, so that all weights of one input agree on them.

    With 2:4 the last two of every four base columns are zero in even rows and the first two in odd ones. Raises
    SchemeError as `Scheme` does for counts that do not fit K.
    """
    scheme = scheme.resolved(K)
    generator = torch.Generator(device).manual_seed(seed)
    outliers = 0 if scheme.outliers is None else scheme.outliers.columns(K)
    where = torch.randperm(K, generator=torch.Generator().manual_seed(K))[:outliers].sort().values.to(device)
    base = torch.ones(K, dtype=torch.bool, device=device)
    base[where] = False
    columns = base.nonzero()[:, 0]
    B = len(columns)
    block = rotation_block(B) if scheme.rotated else 0
    split = InputSplit(columns, where, scheme.activation_bits, block)
    stored = torch.bfloat16 if dtype == torch.float32 else dtype
    # A rotation that is not normalised makes the input larger by the root of its block; its inverse is in the weight.
    size = K**-0.5 * (block or 1) ** -0.5
    kept = _kept(N, B, device) if scheme.sparse else None
    wide = torch.randn(N, outliers, device=device, generator=generator).mul_(K**-0.5).to(stored)
    w = scheme.weight
    if w.bits == UNQUANTIZED_BITS:
        values = torch.randn(N, B, device=device, generator=generator).mul_(size).to(stored)
        return SplitTensor(values if kept is None else values * kept, wide, split, scheme)
    codes = torch.randint(w.qmin, w.qmax + 1, (N, B), dtype=torch.int8, device=device, generator=generator)
    if kept is not None:
        codes *= kept
    grid = (N, w.num_groups(B))
    scale = (torch.rand(grid, device=device, generator=generator) + 0.5) * (4 * size / (w.qmax - w.qmin))
    return SplitTensor(QuantizedTensor(codes, scale.to(stored), None, w), wide, split, scheme)


def _kept(N: int, B: int, device: torch.device) -> Tensor:
    """bool [N, B]: two of every four columns, the first or the last two."""
    column = torch.arange(B, device=device) % 4 < 2
    return column[None] == (torch.arange(N, device=device) % 2 == 1)[:, None]


def expected_split(x: Tensor, tensor: SplitTensor) -> Tensor:
    """float64 [m, N] of a few tokens x [m, K]: the definition in `kernels.reference`, without its roundings to float32.

    In pieces, so that it fits beside the rest, and in float64, which holds the integer sums exactly on any device.
    """
    N, K = tensor.shape
    step = max(1, _PIECE // K)
    base, outliers = tensor.split.parts(x)
    B = base.shape[1]
    if tensor.split.bits == UNQUANTIZED_BITS:
        arranged = torch.cat((base.double(), outliers.double()), dim=1)
        rows = (_rows(tensor, n, step).arranged().double() for n in range(0, N, step))
        return torch.cat([arranged @ part.t() for part in rows], dim=1)
    assert isinstance(tensor.base, QuantizedTensor), "quantized activations meet a grid"
    if tensor.split.bits == 8:
        codes, scale = quantize_symmetric(base)
        left = codes.double()
    else:
        codes, scale, zero = quantize_asymmetric(base, tensor.split.clip)
        left = codes.double() - zero.double()
    pieces = []
    for n in range(0, N, step):
        q = tensor.base.codes[n : n + step, :B].double()
        y = (left @ q.t()) * scale.double() * tensor.base.scale[n : n + step].double().t()
        pieces.append(y + outliers.double() @ tensor.outliers[n : n + step].double().t())
    return torch.cat(pieces, dim=1)


def _rows(tensor: SplitTensor, first: int, count: int) -> SplitTensor:
    part = slice(first, first + count)
    base = tensor.base
    if isinstance(base, QuantizedTensor):
        base = QuantizedTensor(base.codes[part], base.scale[part], None, base.scheme)
    else:
        base = base[part]
    return replace(tensor, base=base, outliers=tensor.outliers[part])
