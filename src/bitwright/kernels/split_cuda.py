"""Packed weights that meet quantized activations on an NVIDIA GPU: two operator calls per linear.

The first splits and quantizes the input (shared by linears that read the same one), the second multiplies codes on int8
tensor cores and adds the outliers and the bias. Int4 tensor cores are gone from recent GPUs, so 4-bit codes of weights
become bytes in registers, and those of activations are bytes in memory.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitwright.kernels import int8_fragments
from bitwright.kernels.fragments import ROWS
from bitwright.kernels.int8_fragments import MAX_COLUMNS, padded
from bitwright.kernels.int8_ops import FEW_TOKENS, OUTLIER_STEP, int8_linear
from bitwright.kernels.problem import GLUON, HOPPER, TRITON, Implementation, Problem
from bitwright.kernels.shared_input import Operands, share
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import UNQUANTIZED_BITS
from bitwright.split import InputSplit, SplitTensor

_DTYPES = (torch.bfloat16, torch.float16)


class Quantized(Protocol):
    """An input of M tokens as the operators take it (`int8_ops`)."""

    @property
    def codes(self) -> Tensor: ...
    @property
    def scale(self) -> Tensor: ...
    @property
    def zero(self) -> Tensor: ...
    @property
    def outliers(self) -> Tensor: ...


class Quantizer(Protocol):
    """Splits and quantizes an input [M, K]."""

    def codes(self, x: Tensor) -> Quantized: ...
    @property
    def operands(self) -> Operands: ...


class Int8Weight(Implementation):
    """What weights for int8 tensor cores share: scale float32 [N], row sums int32 [N], outliers [N, O padded to 16].

    Outliers are held in the activations' dtype: where the checkpoint has another, they are rounded to it, once.
    """

    _WHAT: ClassVar[str]  # the product in words, for `describe`

    def __init__(self, problem: Problem, tensor: SplitTensor, quantizer: Quantizer) -> None:
        assert isinstance(tensor.base, QuantizedTensor), "refuse lets grids through alone"
        self.shape, self.dtype = (problem.N, problem.K), problem.dtype
        self.split, self.quantizer = tensor.split, quantizer
        self._B, self._O = tensor.base.shape[1], tensor.outliers.shape[1]
        self._scale = tensor.base.scale[:, 0].to(torch.float32).contiguous()
        self._row_sums = tensor.base.codes.sum(dim=1, dtype=torch.int32)
        self._outliers = pad(tensor.outliers.to(problem.dtype), (0, -self._O % OUTLIER_STEP)).contiguous()

    @classmethod
    def refuse(cls, problem: Problem) -> str | None:
        if problem.device != "cuda":
            return "runs on a CUDA device only"
        if problem.scheme.activation_bits == UNQUANTIZED_BITS:
            return "takes quantized activations"
        if problem.dtype not in _DTYPES:
            return f"takes bfloat16 or float16 activations, not {problem.dtype}"
        if TRITON not in problem.features:
            return "needs Triton, and an NVIDIA GPU of compute capability 8.0 or later"
        if (B := problem.K - outlier_columns(problem)) > MAX_COLUMNS:
            return f"takes up to {MAX_COLUMNS} base columns, whose sums 32 bits hold, not {B}"
        return None

    @classmethod
    def describe(cls, problem: Problem) -> str:
        return f"{cls._WHAT}; about {cls._bits(problem):.2f} bits per weight in memory"

    @classmethod
    def prepare(cls, qt: QuantizedTensor | SplitTensor, problem: Problem) -> Self:
        tensor = as_split(qt, problem)
        return cls(problem, tensor, share(tensor.split))

    @classmethod
    @abstractmethod
    def _code_bits(cls, problem: Problem) -> float:
        """Bits of memory that all codes take."""

    @classmethod
    def _bits(cls, problem: Problem) -> float:
        """Bits of memory per weight, all in all but the indices of columns, which linears share."""
        N, K = problem.N, problem.K
        Op = -(-outlier_columns(problem) // OUTLIER_STEP) * OUTLIER_STEP
        return (cls._code_bits(problem) + N * (64 + 16 * Op)) / (N * K)

    @abstractmethod
    def _codes(self, index: Tensor | None) -> Tensor:
        """Codes int8 [n, B] of rows `index`, or of all."""

    @abstractmethod
    def multiply(self, q: Quantized, bias: Tensor | None = None) -> Tensor:
        """[M, N] of an input that `quantizer` quantized."""

    def without_outliers(self) -> Self:
        """The product of the base columns alone, over the same memory."""
        other = copy.copy(self)
        other._outliers, other._O = self._outliers[:, :0].contiguous(), 0
        return other

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(x, None)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.multiply(self.quantizer.codes(x), bias)

    def rows(self, index: Tensor) -> Tensor:
        return self._values(index).to(self.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._values(None).to(dtype)

    def _values(self, index: Tensor | None) -> Tensor:
        which: Any = slice(None) if index is None else index
        base = self._codes(index) * self._scale[which, None]
        outliers = self._outliers[which, : self._O].to(torch.float32)
        return self.split.restore_weight(torch.cat((base, outliers), dim=1))

    @property
    def _held(self) -> tuple[Tensor, ...]:
        return self._scale, self._row_sums, self._outliers, self.split.base_idx, self.split.outlier_idx


class SplitMma(Int8Weight):
    """4-bit codes in the order of registers (`int8_fragments`), 8-bit codes in rows; zeros of 2:4 are held as codes."""

    NAME = "int8-mma"
    _WHAT = "int8 tensor cores at any M, one more kernel for the input"

    @classmethod
    def describe(cls, problem: Problem) -> str:
        many = f"Hopper kernel above M = {FEW_TOKENS}" if {HOPPER, GLUON} <= problem.features else "Triton kernel"
        return f"{super().describe(problem)}; {many}"

    def __init__(self, problem: Problem, tensor: SplitTensor, quantizer: Quantizer) -> None:
        super().__init__(problem, tensor, quantizer)
        assert isinstance(tensor.base, QuantizedTensor)
        codes, self._weight_bits = tensor.base.codes, tensor.base.scheme.bits
        if self._weight_bits == 4:
            self._weight = int8_fragments.pack(codes)
        else:
            self._weight = pad(codes, (0, padded(self._B) - self._B)).contiguous()

    @classmethod
    def _code_bits(cls, problem: Problem) -> float:
        Bp = padded(problem.K - outlier_columns(problem))
        return 4 * -(-problem.N // ROWS) * ROWS * Bp if problem.scheme.weight.bits == 4 else 8 * problem.N * Bp

    def multiply(self, q: Quantized, bias: Tensor | None = None) -> Tensor:
        y: Tensor = int8_linear(
            q.codes, q.scale, q.zero, q.outliers, self._weight, self._scale, self._row_sums, self._outliers, bias,
            self._weight_bits, self.shape[0], self._B, self.dtype,
        )  # fmt: skip
        return y

    def _codes(self, index: Tensor | None) -> Tensor:
        if self._weight_bits == 8:
            return (self._weight if index is None else self._weight[index])[:, : self._B]
        if index is None:
            return int8_fragments.unpack(self._weight, self.shape[0], self._B)
        return int8_fragments.unpack_rows(self._weight, index, self._B)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self._weight, *self._held


def outlier_columns(problem: Problem) -> int:
    """O of the problem's scheme."""
    outliers = problem.scheme.outliers
    return 0 if outliers is None else outliers.columns(problem.K)


def as_split(qt: QuantizedTensor | SplitTensor, problem: Problem) -> SplitTensor:
    """A split weight as it is; a plain w8a8 weight as one whose input has no outliers and stays in order."""
    if isinstance(qt, SplitTensor):
        return qt
    N, K = qt.shape
    device = qt.codes.device
    none = torch.empty(0, dtype=torch.int64, device=device)
    split = InputSplit(torch.arange(K, device=device), none, problem.scheme.activation_bits)
    return SplitTensor(qt, torch.empty(N, 0, dtype=problem.dtype, device=device), split, problem.scheme)
