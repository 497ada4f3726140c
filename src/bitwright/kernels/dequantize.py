"""Packed linears on any device and in any dtype: unpack a few rows, multiply, go on.

The last resort of the table, and the first choice where no integer operator fits: float32 or float16 activations on a
CPU, groups that are no multiple of 32. Codes keep their own width in memory (3 bits stay 3); what is unpacked at a
time is bounded, so nothing ever stands in memory whole.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import linear

from bitwright.kernels.layouts import pack_planes, unpack_planes
from bitwright.kernels.problem import NATIVE_BF16, Implementation, Problem
from bitwright.kernels.reference import quantize_activations
from bitwright.qtensor import QuantizedTensor, spread

_CHUNK = 1 << 21  # weights unpacked at a time: 8 MB in float32
_GPU_CHUNK = 1 << 26  # on a GPU a launch costs more than memory does: 256 MB in float32
_EXACT_COLUMNS = 1024  # 1024 · 127 · 128 < 2^24: a float32 sum of that many products of int8 codes is exact


class DequantizedWeight(Implementation):
    """Codes in planes [N, ...], scale as given [N, G], zero_point int8 [N, G] or None."""

    NAME = "dequantize"

    def __init__(self, problem: Problem, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> None:
        self.shape, self.dtype = (problem.N, problem.K), problem.dtype
        self._codes, self._scale, self._zero_point = codes, scale, zero_point
        self._bits, self._group = problem.scheme.weight.bits, problem.scheme.weight.group_size or problem.K
        self._gemm_dtype = _gemm_dtype(problem)
        self._chunk = _CHUNK if problem.device == "cpu" else _GPU_CHUNK

    @classmethod
    def refuse(cls, problem: Problem) -> str | None:
        return "takes 16-bit activations" if problem.scheme.activation_bits != 16 else None

    @classmethod
    def describe(cls, problem: Problem) -> str:
        w = problem.scheme.weight
        groups = w.num_groups(problem.K) * (8 * problem.scale_dtype.itemsize + (0 if w.symmetric else 8))
        held = w.bits + groups / problem.K
        how = str(_gemm_dtype(problem)).removeprefix("torch.")
        return f"unpacks a few rows per call and multiplies in {how}; {held:.2f} bits per weight in memory"

    @classmethod
    def prepare(cls, qt: QuantizedTensor, problem: Problem) -> Self:
        bits = qt.scheme.bits
        unsigned = qt.codes.contiguous().view(torch.uint8) + (1 << (bits - 1))
        zero_point = None if qt.zero_point is None else qt.zero_point.contiguous()
        return cls(problem, pack_planes(unsigned, bits), qt.scale.contiguous(), zero_point)

    def __call__(self, x: Tensor) -> Tensor:
        N, K = self.shape
        x = x.to(self._gemm_dtype)
        step = max(1, self._chunk // K)
        pieces = [linear(x, self._part(slice(n, n + step), x.dtype)) for n in range(0, N, step)]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)).to(self.dtype)

    def rows(self, index: Tensor) -> Tensor:
        return self._part(index, self.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._part(slice(None), dtype)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        held = (self._codes, self._scale)
        return held if self._zero_point is None else (*held, self._zero_point)

    def _part(self, which: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `which` of the weight [n, K], formed in float32 and rounded once."""
        K, g = self.shape[1], self._group
        values = unpack_planes(self._codes[which], self._bits, K).to(torch.float32)
        scale, zero = self._scale[which].float(), float(1 << (self._bits - 1))
        if self._zero_point is not None:
            zero = self._zero_point[which].float() + zero
        if K % g == 0 and scale.shape[1] > 1:  # no need to repeat scales over columns
            grouped = values.view(-1, K // g, g)
            grouped.sub_(zero if isinstance(zero, float) else zero[..., None]).mul_(scale[..., None])
        else:
            values.sub_(zero if isinstance(zero, float) else spread(zero, g, K)).mul_(spread(scale, g, K))
        return values.to(dtype)


def exact_products(codes: Tensor, weight: Tensor) -> Tensor:
    """codes int8 [M, K] times weight int8 [n, K], transposed: exact integers [M, n] in float32 or float64.

    By float32 GEMMs over 1024 inputs each, which are exact; their sum, where K is larger, is taken in float64.
    """
    K = codes.shape[1]
    if K <= _EXACT_COLUMNS:
        return linear(codes.to(torch.float32), weight.to(torch.float32))
    total = torch.zeros(codes.shape[0], weight.shape[0], dtype=torch.float64, device=codes.device)
    for k in range(0, K, _EXACT_COLUMNS):
        part = slice(k, k + _EXACT_COLUMNS)
        total += linear(codes[:, part].to(torch.float32), weight[:, part].to(torch.float32))
    return total


class Int8Exact(Implementation):
    """w8a8 anywhere: codes int8 [N, K], scale float32 [1, N]; integer sums by `exact_products`."""

    NAME = "int8-exact"

    def __init__(self, problem: Problem, codes: Tensor, scale: Tensor) -> None:
        self.shape, self.dtype = (problem.N, problem.K), problem.dtype
        self._codes, self._scale = codes, scale

    @classmethod
    def refuse(cls, problem: Problem) -> str | None:
        return "takes 8-bit activations" if problem.scheme.activation_bits != 8 else None

    @classmethod
    def describe(cls, problem: Problem) -> str:
        return (
            f"exact integer sums through float32 products of {_EXACT_COLUMNS} inputs; "
            f"{8 + 32 / problem.K:.2f} bits per weight in memory"
        )

    @classmethod
    def prepare(cls, qt: QuantizedTensor, problem: Problem) -> Self:
        return cls(problem, qt.codes.contiguous(), qt.scale.float().t().contiguous())

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(x, None)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.shape[0] == 0:
            return x.new_empty(0, self.shape[0])
        codes, scale = quantize_activations(x)
        y = self._sums(codes).to(torch.float32).mul_(scale).mul_(self._scale)
        return (y if bias is None else y.add_(bias)).to(self.dtype)

    def _sums(self, codes: Tensor) -> Tensor:
        """Exact integers [M, N] of codes int8 [M, K], in any dtype that holds them."""
        step = max(1, _CHUNK // min(self.shape[1], _EXACT_COLUMNS))
        pieces = [exact_products(codes, part) for part in self._codes.split(step)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def rows(self, index: Tensor) -> Tensor:
        return (self._codes[index] * self._scale[0, index, None]).to(self.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self._codes * self._scale.t()).to(dtype)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self._codes, self._scale


def _gemm_dtype(problem: Problem) -> torch.dtype:
    """The activations' own, except where a CPU would emulate it."""
    if problem.device != "cpu" or problem.dtype == torch.float32:
        return problem.dtype
    return torch.bfloat16 if problem.dtype == torch.bfloat16 and NATIVE_BF16 in problem.features else torch.float32
