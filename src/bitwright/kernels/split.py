"""Packed split weights (outlier columns, 4-bit activations, 2:4) through exact integer sums, on any device.

The arithmetic is that of `reference.split_linear`: the input is split and quantized, integer codes are multiplied, and
one float32 epilogue puts scales, zero points and outlier columns together. Codes keep their own width in memory and
are unpacked some rows at a time; zeros of 2:4 are held like other codes here, for no operator of PyTorch's skips them
on a CPU. Linears that read one tensor quantize it once (`shared_input`).
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from bitwright.kernels.dequantize import exact_products
from bitwright.kernels.layouts import pack_planes, unpack_planes
from bitwright.kernels.problem import VNNI, Implementation, Problem
from bitwright.kernels.shared_input import Codes, share
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import UNQUANTIZED_BITS
from bitwright.split import InputSplit, SplitTensor

_CHUNK = 1 << 20  # codes unpacked at a time: 1 MB
_SUMS = 1 << 18  # sums of products at a time: 1 MB as int32, and 1 MB as float32
_ROWS = 64


class SplitInteger(Implementation):
    """4 or 8-bit codes in planes, scale float32 [1, N], row sums int32 [1, N], outliers float32 [O, N]."""

    NAME = "split-exact"

    def __init__(self, problem: Problem, tensor: SplitTensor) -> None:
        assert isinstance(tensor.base, QuantizedTensor), "refuse lets grids through alone"
        self.shape, self.dtype = (problem.N, problem.K), problem.dtype
        self._bits, self.quantizer = tensor.scheme.weight.bits, share(tensor.split)
        self.split = self.quantizer.split
        codes = tensor.base.codes.contiguous()
        self._codes = pack_planes(codes.view(torch.uint8) + (1 << (self._bits - 1)), self._bits)
        self._scale = tensor.base.scale.float().t().contiguous()
        self._row_sums = codes.sum(dim=1, dtype=torch.int32)[None]
        self._outliers = tensor.outliers.float().t().contiguous()

    @classmethod
    def refuse(cls, problem: Problem) -> str | None:
        if problem.scheme.activation_bits == UNQUANTIZED_BITS:
            return "takes quantized activations"
        return None

    @classmethod
    def describe(cls, problem: Problem) -> str:
        return f"exact integer sums through float32 products; {_held(problem)}"

    @classmethod
    def prepare(cls, qt: QuantizedTensor | SplitTensor, problem: Problem) -> Self:
        assert isinstance(qt, SplitTensor), "the table of split weights"
        return cls(problem, qt)

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(x, None)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.multiply(self.quantizer.codes(x), bias)

    def multiply(self, q: Codes, bias: Tensor | None = None) -> Tensor:
        """[M, N] of an input that `quantizer` quantized, in its dtype."""
        M, N, B, O = q.codes.shape[0], self.shape[0], len(self.split.base_idx), len(self.split.outlier_idx)
        y = q.outliers.new_empty(M, N)
        if not M:
            return y
        codes, scale, zero = q.codes[:, :B].contiguous(), q.scale[:, None], q.zero[:, None]
        outliers = q.outliers[:, :O].to(torch.float32)
        # As many rows of the weight at a time as keep codes and sums in cache.
        step = max(_ROWS, min(_CHUNK // B, _SUMS // M) // _ROWS * _ROWS)
        for n in range(0, N, step):
            rows = slice(n, min(n + step, N))
            acc = self._products(codes, self._unpacked(rows))
            if self.split.bits == 4:
                acc.sub_(zero.to(acc.dtype) * self._row_sums[:, rows].to(acc.dtype))
            part = acc.to(torch.float32).mul_(scale).mul_(self._scale[:, rows])
            if O:
                part.add_(outliers @ self._outliers[:, rows])
            y[:, rows] = part if bias is None else part.add_(bias[rows])
        return y

    def _products(self, codes: Tensor, weight: Tensor) -> Tensor:
        """codes int8 [M, B] times weight int8 [n, B], exact integers [M, n] of any dtype that holds them."""
        return exact_products(codes, weight)

    def _unpacked(self, rows: slice | Tensor) -> Tensor:
        """Signed codes int8 [n, B]."""
        unsigned = unpack_planes(self._codes[rows], self._bits, len(self.split.base_idx))
        return (unsigned - (1 << (self._bits - 1))).view(torch.int8)

    def rows(self, index: Tensor) -> Tensor:
        return self._part(index).to(self.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._part(slice(None)).to(dtype)

    def _part(self, which: slice | Tensor) -> Tensor:
        base = self._unpacked(which).float() * self._scale.t()[which]
        return self.split.restore_weight(torch.cat((base, self._outliers.t()[which]), dim=1))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self._codes, self._scale, self._row_sums, self._outliers, *_indices(self.split))


class SplitVNNI(SplitInteger):
    """The same on int8 dot products of the CPU."""

    NAME = "split-vnni"

    @classmethod
    def refuse(cls, problem: Problem) -> str | None:
        if problem.device != "cpu":
            return "runs on a CPU only"
        if VNNI not in problem.features:
            return "needs int8 dot products in hardware (VNNI): without them torch._int_mm saturates in silence"
        return super().refuse(problem)

    @classmethod
    def describe(cls, problem: Problem) -> str:
        return f"int8 × int8 with int32 sums at any M; {_held(problem)}"

    def _products(self, codes: Tensor, weight: Tensor) -> Tensor:
        return torch._int_mm(codes, weight.t())


class SplitDequantized(Implementation):
    """16-bit activations: arranged weight as stored (codes in planes, scale [N, G]; or 16-bit values), unpacked a few
    rows at a time and multiplied in float32."""

    NAME = "split-dequantize"

    def __init__(self, problem: Problem, tensor: SplitTensor) -> None:
        self.shape, self.dtype = (problem.N, problem.K), problem.dtype
        self.split, self._scheme, self._outliers = tensor.split, tensor.scheme, tensor.outliers.contiguous()
        if isinstance(tensor.base, QuantizedTensor):
            bits = tensor.base.scheme.bits
            unsigned = tensor.base.codes.contiguous().view(torch.uint8) + (1 << (bits - 1))
            self._base, self._scale = pack_planes(unsigned, bits), tensor.base.scale.contiguous()
        else:
            self._base, self._scale = tensor.base.contiguous(), tensor.scale

    @classmethod
    def refuse(cls, problem: Problem) -> str | None:
        return None if problem.scheme.activation_bits == UNQUANTIZED_BITS else "takes 16-bit activations"

    @classmethod
    def describe(cls, problem: Problem) -> str:
        return f"unpacks a few rows per call and multiplies in float32; {_held(problem)}"

    @classmethod
    def prepare(cls, qt: QuantizedTensor | SplitTensor, problem: Problem) -> Self:
        assert isinstance(qt, SplitTensor), "the table of split weights"
        return cls(problem, qt)

    def __call__(self, x: Tensor) -> Tensor:
        N, K = self.shape
        z = self.split.arrange(x)
        step = max(1, _CHUNK // K)
        pieces = [z @ self._arranged(slice(n, n + step)).t() for n in range(0, N, step)]
        return torch.cat(pieces, dim=1).to(self.dtype)

    def rows(self, index: Tensor) -> Tensor:
        return self.split.restore_weight(self._arranged(index)).to(self.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.split.restore_weight(self._arranged(slice(None))).to(dtype)

    def _arranged(self, which: slice | Tensor) -> Tensor:
        B, w = len(self.split.base_idx), self._scheme.weight
        base = self._base[which]
        if w.bits < UNQUANTIZED_BITS:
            unsigned = unpack_planes(base, w.bits, B)
            codes = (unsigned - (1 << (w.bits - 1))).view(torch.int8)
            base = QuantizedTensor(codes, self._scale[which], None, w).dequantize()
        return torch.cat((base.float(), self._outliers[which].float()), dim=1)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self._base, self._scale, self._outliers, *_indices(self.split))


def _indices(split: InputSplit) -> tuple[Tensor, ...]:
    return split.base_idx, split.outlier_idx


def _held(problem: Problem) -> str:
    """What a description says of the memory: zeros of 2:4 count, as they are held."""
    scheme, K = problem.scheme, problem.K
    O = 0 if scheme.outliers is None else scheme.outliers.columns(K)
    wide = 16 if scheme.activation_bits == UNQUANTIZED_BITS else 32
    return f"about {(scheme.weight.bits * (K - O) + wide * O) / K:.2f} bits per weight in memory"
