"""Packed linears on an NVIDIA GPU: weights in fragment order, one operator call per linear, bias included.

All kernels read the same words. Those for Hopper have asynchronous copies and the weight in registers: the Gluon one
takes any number of tokens, and those in CUDA C++ (`hopper`) some numbers of tokens faster. The Triton one runs on every
GPU that Triton compiles for; above some number of tokens it loses to a temporary 16-bit weight and cuBLAS, because what
it saves is the reading of weights, and that is spread over ever more tokens; `gemm_above` says from where.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from bitwright.kernels.fragments import BAND, COLUMNS, Fragments, dequantize_rows, join, pack
from bitwright.kernels.ops import DEQUANTIZE, fragment_dequantize, fragment_linear
from bitwright.kernels.problem import (
    GLUON,
    GLUON_VERSIONS,
    HOPPER,
    NVRTC,
    NVRTC_MISSING,
    TRITON,
    Implementation,
    PackedWeight,
    Problem,
)
from bitwright.qtensor import QuantizedTensor

_DTYPES = (torch.bfloat16, torch.float16)


class FragmentWeight(Implementation):
    """What the kernels over `Fragments` share; NAME is the kernel's in `ops`.

    fragments: the packed weight. gemm_above: tokens above which it is dequantized for cuBLAS; None = never.
    """

    _WHAT: ClassVar[str]  # the kernel in words, for `describe`

    def __init__(self, problem: Problem, fragments: Fragments) -> None:
        self.shape, self.dtype = (problem.N, problem.K), problem.dtype
        self.fragments = fragments
        self.gemm_above = gemm_above(problem, self.NAME)
        self._set_operands()

    @classmethod
    def refuse(cls, problem: Problem) -> str | None:
        if problem.device != "cuda":
            return "runs on a CUDA device only"
        if problem.scheme.activation_bits != 16:
            return "takes 16-bit activations"
        if problem.dtype not in _DTYPES:
            return f"takes bfloat16 or float16 activations, not {problem.dtype}"
        if TRITON not in problem.features:
            return "needs Triton, and an NVIDIA GPU of compute capability 8.0 or later"
        return None

    @classmethod
    def describe(cls, problem: Problem) -> str:
        above = gemm_above(problem, cls.NAME)
        many = "at any M" if above is None else f"to M = {above}, dequantize + cuBLAS above"
        return f"{cls._WHAT} {many}; {_bits_in_memory(problem):.2f} bits per weight in memory"

    @classmethod
    def prepare(cls, qt: QuantizedTensor, problem: Problem) -> Self:
        fragments = pack(qt, problem.dtype)
        if fragments.scale.is_cuda:
            # Hopper kernels ask for weights before they wait for the launch before them: they must be there.
            torch.cuda.current_stream(fragments.scale.device).synchronize()
        return cls(problem, fragments)

    def over(self, fragments: Fragments) -> Self:
        """The same over other fragments, with as many columns, of the same kind and on the same device."""
        weight = copy.copy(self)
        weight.shape, weight.fragments = (fragments.N, fragments.K), fragments
        weight._set_operands()
        return weight

    def _set_operands(self) -> None:
        f = self.fragments
        self._operands = (list(f.words), f.scale, f.zero)
        self._numbers = (f.N, f.bits, f.group_size)

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(x, None)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        many = self.gemm_above is not None and x.shape[0] > self.gemm_above
        if bias is not None and bias.dtype is not self.dtype:
            bias = bias.to(self.dtype)
        y: Tensor = fragment_linear(x, *self._operands, bias, *self._numbers, DEQUANTIZE if many else self.NAME)
        return y

    def rows(self, index: Tensor) -> Tensor:
        return dequantize_rows(self.fragments, index, self.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        N, bits, group_size = self._numbers
        weight: Tensor = fragment_dequantize(*self._operands, N, self.shape[1], bits, group_size, dtype)
        return weight

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.fragments.tensors


class GluonWeight(FragmentWeight):
    """Hopper: scales in the activations' dtype, groups that a step of the kernel does not cut."""

    NAME = "gluon"
    _WHAT = "Hopper kernel in Gluon with the weight in registers"

    @classmethod
    def refuse(cls, problem: Problem) -> str | None:
        refusal = super().refuse(problem)
        if refusal is not None:
            return refusal
        if HOPPER not in problem.features:
            return "needs a Hopper GPU (compute capability 9.0)"
        if GLUON not in problem.features:
            return f"needs the Gluon it is written for, of Triton {_listed(GLUON_VERSIONS)}"
        if problem.scale_dtype != problem.dtype:
            return f"takes scales of the activations' dtype {problem.dtype}, not {problem.scale_dtype}"
        group_size = _group_size(problem)
        if group_size not in (32, problem.K) and group_size % 64:
            return f"takes groups of 32, of a multiple of 64 or the whole row, not of {group_size}"
        return None


class HopperWeight(GluonWeight):
    """The same with kernels in CUDA C++ for the numbers of tokens that these take faster."""

    NAME = "hopper"
    _WHAT = "Hopper kernels with the weight in registers"

    @classmethod
    def refuse(cls, problem: Problem) -> str | None:
        refusal = super().refuse(problem)
        if refusal is None and NVRTC not in problem.features:
            return NVRTC_MISSING
        return refusal


class TritonWeight(FragmentWeight):
    """Any GPU with Triton, scales of any dtype."""

    NAME = "triton"
    _WHAT = "Triton kernel with the weight in registers"

    @classmethod
    def refuse(cls, problem: Problem) -> str | None:
        refusal = super().refuse(problem)
        if refusal is not None:
            return refusal
        group_size = _group_size(problem)
        if group_size != problem.K and group_size % 32:
            return f"takes groups of a multiple of 32 or the whole row, not of {group_size}"
        return None


def one_after_the_other(weights: Sequence[PackedWeight]) -> tuple[FragmentWeight, list[FragmentWeight]] | None:
    """(all rows of `weights` as one weight, the same weights over views of its words); None if they cannot be one.

    That is for weights of one kernel and kind whose rows fill bands of 64, but for the last. Words are copied once, and
    the old ones go with `weights`; scales are held twice from then on.
    """
    found = [w for w in weights if isinstance(w, FragmentWeight)]
    if len(found) < len(weights) or len({(type(w), w.gemm_above, w.dtype) for w in found}) > 1:
        return None
    joined = join([w.fragments for w in found])
    if joined is None:
        return None
    whole, parts = joined
    if whole.scale.is_cuda:
        torch.cuda.current_stream(whole.scale.device).synchronize()  # as in `prepare`
    return found[0].over(whole), [w.over(f) for w, f in zip(found, parts, strict=True)]


def gemm_above(problem: Problem, kernel: str) -> int | None:
    """Tokens above which a temporary 16-bit weight and cuBLAS are faster than `kernel`; None where they never are."""
    return None if kernel in (HopperWeight.NAME, GluonWeight.NAME) else 128


def _listed(versions: Sequence[tuple[int, int]]) -> str:
    return " or ".join(f"{major}.{minor}" for major, minor in versions)


def _group_size(problem: Problem) -> int:
    """Inputs per scale; K for one scale per row, however the scheme says it."""
    group_size = problem.scheme.weight.group_size
    return problem.K if group_size is None or group_size >= problem.K else group_size


def _bits_in_memory(problem: Problem) -> float:
    """Words, scales and zero points with their padding, as `pack` makes them, per weight."""
    w, N, K = problem.scheme.weight, problem.N, problem.K
    rows, columns = -(-N // BAND) * BAND, -(-K // COLUMNS) * COLUMNS
    per_group = 8 * (problem.dtype.itemsize if problem.scale_dtype == problem.dtype else 4)
    groups = w.num_groups(K) * (1 if w.symmetric else 2)
    return (rows * columns * w.bits + rows * groups * per_group) / (N * K)
