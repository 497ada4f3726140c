"""The linears of a benchmark's model, 16-bit or quantized, with random weights: the one thing in which models differ.

Quantized ones are what `dispatch` chooses for the machine, made directly in the layout of their kernel: a weight of
49152 x 12288 need not pass through a quantizer to be timed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, linear

from bitwright.bench.peers import random_weight
from bitwright.errors import SchemeError
from bitwright.kernels import dispatch, fragments
from bitwright.kernels.cuda import FragmentWeight, TritonWeight
from bitwright.kernels.fragments import Fragments
from bitwright.kernels.ops import fragment_experts
from bitwright.kernels.problem import Implementation, PackedWeight, Problem, cpu_features, cuda_features
from bitwright.kernels.shared_input import Codes
from bitwright.kernels.split import SplitInteger
from bitwright.kernels.split_cuda import Int8Weight
from bitwright.kernels.split_ops import add_rms_norm_quantize, rms_norm_quantize, silu_mul_quantize
from bitwright.scheme import Scheme
from bitwright.split import InputSplit


@dataclass(frozen=True)
class DenseLinear:
    """x [M, K] -> x Wᵀ + bias [M, N] by torch: weight [N, K], bias [N] or None."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def dense(self) -> DenseLinear:
        """Itself."""
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return self.weight.nbytes


@dataclass(frozen=True)
class RoundedLinear:
    """What a linear over quantized activations computes, by plain operations in float32: the input rounded to its codes
    and arranged as `split` says, weight float32 [N, K] in that arrangement."""

    split: InputSplit
    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        y = (self.split.seen(x) @ self.weight.t()).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def dense(self) -> RoundedLinear:
        """Itself."""
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return self.weight.nbytes


@dataclass(frozen=True)
class PackedLinear:
    """The same over a packed weight."""

    weight: PackedWeight
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return self.weight.linear(x, self.bias)

    def behind_norm(
        self, x: Tensor | None, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor] | None:
        """(the linear of the RMSNorm of residual + x, residual + x), rounded like `elementwise.add_norm`, quantized
        by the kernel of the norm; None if this linear does not quantize its input so."""
        packed = self._fusible
        if packed is None:
            return None
        split = packed.quantizer.operands
        if x is None:
            quantized, total = rms_norm_quantize(residual, weight, eps, *split, once=True), residual
        else:
            *quantized, total = add_rms_norm_quantize(x, residual, weight, eps, *split, once=True)
        return packed.multiply(Codes(*quantized), self.bias), total

    def behind_silu(self, gate_up: Tensor) -> Tensor | None:
        """The linear of silu(gate) * up, quantized by the kernel of the product; None as in `behind_norm`."""
        packed = self._fusible
        if packed is None:
            return None
        return packed.multiply(Codes(*silu_mul_quantize(gate_up, *packed.quantizer.operands)), self.bias)

    @property
    def _fusible(self) -> Int8Weight | SplitInteger | None:
        """The weight, if its input is quantized and nothing but that: rotations take their time in any kernel."""
        packed = self.weight
        return packed if isinstance(packed, Int8Weight | SplitInteger) and not packed.split.block else None

    def dense(self) -> DenseLinear | RoundedLinear:
        """With the weight dequantized and none of our kernels; quantized activations stay rounded."""
        packed, dtype = self.weight, self.weight.dtype
        if isinstance(packed, Int8Weight | SplitInteger):
            return RoundedLinear(packed.split, packed.split.arrange_weight(packed.dequantize()), self.bias)
        if isinstance(packed, FragmentWeight):
            return DenseLinear(fragments.dequantize(packed.fragments, dtype), self.bias)
        return DenseLinear(packed.dequantize(dtype), self.bias)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight."""
        return self.weight.nbytes


@dataclass(frozen=True)
class DenseExperts:
    """x [T, K] sorted by expert, offsets int32 [E + 1] -> [T, N]: weight [E, N, K].

    method "grouped": torch's grouped GEMM. "rows": a kernel of ours that reads one expert per row; better for a handful
    of rows. Both read the chosen experts and no others.
    """

    weight: Tensor
    method: Literal["grouped", "rows"] = "grouped"

    def __call__(self, x: Tensor, offsets: Tensor) -> Tensor:
        if self.method == "rows":
            from bitwright.kernels.triton.route import rows

            return rows(x, offsets, self.weight)
        return grouped_mm(x, self.weight.transpose(-2, -1), offs=offsets[1:])

    def dense(self) -> DenseExperts:
        """Itself."""
        return self

    def by(self, method: Literal["grouped", "rows"]) -> DenseExperts:
        """The same weights by another method."""
        return replace(self, method=method)

    @property
    def nbytes(self) -> int:
        """Bytes of all experts."""
        return self.weight.nbytes


@dataclass(frozen=True)
class PackedExperts:
    """The same over a stack of packed weights; `kernel` as in `kernels.ops`."""

    weight: Fragments
    dtype: torch.dtype
    kernel: str

    def __call__(self, x: Tensor, offsets: Tensor, settled: bool = False) -> Tensor:
        """settled: the offsets are those of an earlier call, see `ops.fragment_experts`."""
        f = self.weight
        y: Tensor = fragment_experts(
            x, offsets, list(f.words), f.scale, f.zero, f.N, f.bits, f.group_size, self.kernel, settled
        )
        return y

    def dense(self) -> DenseExperts:
        """With the weights dequantized."""
        return DenseExperts(fragments.dequantize(self.weight, self.dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of all experts."""
        return self.weight.nbytes


@dataclass(frozen=True)
class Maker:
    """Makes linears of one kind: 16-bit without a scheme, else what `dispatch` chooses for it.

    generator: on `device`; every linear draws from it.
    """

    scheme: Scheme | None
    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    def linear(self, N: int, K: int, bias: bool = False) -> DenseLinear | PackedLinear:
        """A random linear [N, K] whose outputs are about as large as its inputs."""
        added = self.normal((N,), 0.1) if bias else None
        if self.scheme is None:
            return DenseLinear(self.normal((N, K), K**-0.5), added)
        problem, implementation = self._choose(N, K, self.scheme)
        if issubclass(implementation, FragmentWeight):
            return PackedLinear(implementation(problem, self._fragments(N, K, self.scheme, None)), added)
        seed = int(torch.randint(1 << 31, (), generator=self.generator, device=self.device))
        qt = random_weight(N, K, self.scheme, self.dtype, self.device, seed)
        return PackedLinear(implementation.prepare(qt, problem), added)

    def experts(self, E: int, N: int, K: int) -> DenseExperts | PackedExperts:
        """E random weights [N, K]; SchemeError if no kernel takes the scheme for experts."""
        if self.scheme is None:
            return DenseExperts(self.normal((E, N, K), K**-0.5))
        kernel = TritonWeight.NAME  # on a CPU all names mean the same program
        if self.device.type == "cuda":
            _, implementation = self._choose(N, K, self.scheme)
            if not issubclass(implementation, FragmentWeight):
                raise SchemeError(f"no kernel here runs experts at {self.scheme}; choose 16-bit activations, group 128")
            kernel = implementation.NAME
        return PackedExperts(self._fragments(N, K, self.scheme, E), self.dtype, kernel)

    def normal(self, shape: tuple[int, ...], std: float, mean: float = 0.0) -> Tensor:
        """A random tensor of the model's dtype, made in place: a second copy of a large one would not fit."""
        empty = torch.empty(shape, dtype=self.dtype, device=self.device)
        return empty.normal_(mean, std, generator=self.generator)

    def _choose(self, N: int, K: int, scheme: Scheme) -> tuple[Problem, type[Implementation]]:
        features = cuda_features(self.device) if self.device.type == "cuda" else cpu_features()
        problem = Problem(N, K, scheme, self.dtype, self.dtype, self.device.type, features)
        return problem, dispatch.choose(problem).implementation

    def _fragments(self, N: int, K: int, scheme: Scheme, experts: int | None) -> Fragments:
        w = scheme.weight
        return fragments.random(
            N, K, w.bits, w.group_size, w.symmetric, self.dtype, self.device, experts, generator=self.generator
        )
