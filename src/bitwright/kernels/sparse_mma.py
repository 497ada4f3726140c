"""2:4 weights on Hopper: the sparse products of its int8 tensor cores, by a kernel of ours.

The zeros are neither held nor multiplied: 4-bit codes take 3 bits per weight, those of 8 bits 5. Scales, zero points,
outliers and the bias are added by the same kernel, from the registers that hold the sums.
"""

from __future__ import annotations

from torch import Tensor

from bitwright.kernels import sparse_fragments
from bitwright.kernels.fragments import ROWS
from bitwright.kernels.int8_fragments import STEP, padded
from bitwright.kernels.problem import HOPPER, NVRTC, NVRTC_MISSING, Problem
from bitwright.kernels.sparse_ops import int8_sparse_linear
from bitwright.kernels.split_cuda import Int8Weight, Quantized, Quantizer, outlier_columns
from bitwright.qtensor import QuantizedTensor
from bitwright.split import SplitTensor


class SparseMma(Int8Weight):
    """Codes of 4 or 8 bits and the columns they were kept at, in the order of registers (`sparse_fragments`)."""

    NAME = "int8-sparse-mma"
    _WHAT = "sparse int8 tensor cores at any M, one more kernel for the input"

    def __init__(self, problem: Problem, tensor: SplitTensor, quantizer: Quantizer) -> None:
        super().__init__(problem, tensor, quantizer)
        assert isinstance(tensor.base, QuantizedTensor)
        self._weight_bits = tensor.base.scheme.bits
        self._weight = sparse_fragments.pack(tensor.base.codes, self._weight_bits)

    @classmethod
    def refuse(cls, problem: Problem) -> str | None:
        if not problem.scheme.sparse:
            return "takes 2:4 weights"
        if (refusal := super().refuse(problem)) is not None:
            return refusal
        if HOPPER not in problem.features:
            return "needs a Hopper GPU (compute capability 9.0)"
        if NVRTC not in problem.features:
            return NVRTC_MISSING
        return None

    @classmethod
    def _code_bits(cls, problem: Problem) -> float:
        blocks = -(-problem.N // ROWS) * padded(problem.K - outlier_columns(problem)) // STEP
        return 8 * blocks * sparse_fragments.block_bytes(problem.scheme.weight.bits)

    def multiply(self, q: Quantized, bias: Tensor | None = None) -> Tensor:
        y: Tensor = int8_sparse_linear(
            q.codes, q.scale, q.zero, q.outliers, self._weight, self._scale, self._row_sums, self._outliers, bias,
            self._weight_bits, self.shape[0], self._B, self.dtype,
        )  # fmt: skip
        return y

    def _codes(self, index: Tensor | None) -> Tensor:
        if index is None:
            return sparse_fragments.unpack(self._weight, self.shape[0], self._B, self._weight_bits)
        return sparse_fragments.unpack_rows(self._weight, index, self._B, self._weight_bits)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self._weight, *self._held
