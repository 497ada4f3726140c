"""2:4 weights on an NVIDIA GPU: products by cuSPARSELt, which skips the zeros.

Quantized activations: cuSPARSELt multiplies int8 and writes int32 sums; scales, zero points, outliers and the bias come
from a kernel of ours after it. It knows no 4-bit codes, so those are bytes here too: half of them are zeros and not
held, and two bits a kept one say which it is, 5 bits per weight, and the sums go through memory. On Hopper `sparse_mma`
is preferred, and without NVRTC the dense kernel for 4-bit weights (`dispatch`). 16-bit values take 9 bits per weight.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitwright.kernels.int8_fragments import padded
from bitwright.kernels.int8_ops import int8_finish
from bitwright.kernels.problem import CUSPARSELT, Implementation, Problem
from bitwright.kernels.split_cuda import Int8Weight, Quantized, Quantizer, outlier_columns
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import UNQUANTIZED_BITS
from bitwright.split import SplitTensor

_STEP = 32  # rows and columns of a weight, and tokens, come in multiples of this; 16 or 8 would do for some of them
_MOST_SUMS = 1 << 28  # int32 sums of a product: 1 GiB; fewer, that stay in L2, gain nothing (dev/LOG.md)
_LARGEST_BUCKET = 1 << 14  # tokens; beyond, one algorithm serves all
_DTYPES = (torch.bfloat16, torch.float16)
_MISSING = "needs cuSPARSELt, which this torch does not bring"
_algorithms: dict[Hashable, int] = {}  # of products, by device, shape of the weight, dtype and size


class Compressed:
    """A 2:4 matrix [N, K] as cuSPARSELt holds it, int8 or 16-bit, padded with zeros; and its products.

    cuSPARSELt's algorithms differ in speed (sums of 16-bit values also in the order of additions). The best one is
    looked for at the first call of a size, powers of two apart, by trying them all, which takes up to seconds; so
    matrices of one shape share what was found. Not while a graph is captured or a program traced: these take the
    default where nothing was found before. Nor for float16: one of the candidates for a product written by tokens is an
    illegal instruction on an H100 (cuSPARSELt 0.8.0), after which the process has no GPU.
    """

    def __init__(self, dense: Tensor) -> None:
        self.shape, self.dtype = tuple(dense.shape), dense.dtype
        N, K = dense.shape
        self.tensor = torch._cslt_compress(pad(dense, (0, -K % _STEP, 0, -N % _STEP)).contiguous())

    def sums(self, tokens: Tensor) -> Tensor:
        """int32 [at least N, at least M], W tokensᵀ of int8 tokens [M, K or more, zeros beyond]."""
        right = self._padded(tokens)
        algorithm = self._algorithm(right, False)
        return torch._cslt_sparse_mm(self.tensor, right, out_dtype=torch.int32, alg_id=algorithm)

    def linear(self, tokens: Tensor) -> Tensor:
        """[M, N] = tokens Wᵀ of 16-bit tokens [M, K], in their dtype."""
        right = self._padded(tokens)
        algorithm = self._algorithm(right, True)
        y = torch._cslt_sparse_mm(self.tensor, right, transpose_result=True, alg_id=algorithm)
        return y[: tokens.shape[0], : self.shape[0]].contiguous()

    def dense(self) -> Tensor:
        """The matrix [N, K], read back column by column: the product with one-hot tokens."""
        N, K = self.shape
        dense = torch.empty(N, K, dtype=self.dtype, device=self.tensor.device)
        for k in range(0, K, 128):
            one_hot = dense.new_zeros(128, K)
            one_hot[:, k : k + 128].fill_diagonal_(1)
            columns = self.sums(one_hot)[:N] if self.dtype == torch.int8 else self.linear(one_hot).t()
            dense[:, k : k + 128] = columns[:, : min(128, K - k)]
        return dense

    def _padded(self, tokens: Tensor) -> Tensor:
        """tokens as a right operand [K padded, M padded], columns contiguous."""
        M, width = tokens.shape
        wanted = -(-self.shape[1] // _STEP) * _STEP
        return pad(tokens, (0, wanted - width, 0, -M % _STEP)).contiguous().t()

    def _algorithm(self, right: Tensor, transposed: bool) -> int:
        if self.dtype == torch.float16:
            return 0
        bucket = min(right.shape[1] - 1, _LARGEST_BUCKET).bit_length()
        problem = right.device, self.shape, self.dtype, transposed, bucket
        found = _algorithms.get(problem)
        if found is None:
            if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
                return 0
            out_dtype = torch.int32 if self.dtype == torch.int8 else None
            found = torch._cslt_sparse_mm_search(self.tensor, right, out_dtype=out_dtype, transpose_result=transposed)
            _algorithms[problem] = found
        return found


class SplitSparse(Int8Weight):
    """Codes of 4 or 8 bits as bytes, compressed; integer sums, so every algorithm gives the same bits.

    most_sums: int32 numbers that a product may write; more tokens are taken in pieces.
    """

    NAME = "int8-sparse"
    _WHAT = "2:4 int8 products by cuSPARSELt, a Triton kernel for the input and one for the outputs"

    def __init__(
        self, problem: Problem, tensor: SplitTensor, quantizer: Quantizer, most_sums: int = _MOST_SUMS
    ) -> None:
        super().__init__(problem, tensor, quantizer)
        assert isinstance(tensor.base, QuantizedTensor)
        self._most_sums = most_sums
        self._compressed = Compressed(pad(tensor.base.codes, (0, padded(self._B) - self._B)))

    @classmethod
    def refuse(cls, problem: Problem) -> str | None:
        if not problem.scheme.sparse:
            return "takes 2:4 weights"
        if (refusal := super().refuse(problem)) is not None:
            return refusal
        return None if CUSPARSELT in problem.features else _MISSING

    @classmethod
    def _code_bits(cls, problem: Problem) -> float:
        return 5 * -(-problem.N // _STEP) * _STEP * padded(problem.K - outlier_columns(problem))

    def multiply(self, q: Quantized, bias: Tensor | None = None) -> Tensor:
        M, N = q.codes.shape[0], self.shape[0]
        out = torch.empty(M, N, dtype=self.dtype, device=q.codes.device)
        step = max(_STEP, self._most_sums // N // _STEP * _STEP)
        of_rows = (self._scale, self._row_sums, self._outliers, bias)
        for first in range(0, M, step):
            tokens = slice(first, first + step)
            of_tokens = (q.scale[tokens], q.zero[tokens], q.outliers[tokens])
            int8_finish(out[tokens], self._compressed.sums(q.codes[tokens]), *of_tokens, *of_rows)
        return out

    def _codes(self, index: Tensor | None) -> Tensor:
        codes = self._compressed.dense()[:, : self._B]
        return codes if index is None else codes[index]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self._compressed.tensor, *self._held


class SparseValues(Implementation):
    """w16a16-24: values in the activations' dtype (rounded to it once where the checkpoint has another), compressed."""

    NAME = "sparse"

    def __init__(self, problem: Problem, tensor: SplitTensor) -> None:
        assert isinstance(tensor.base, Tensor), "refuse lets 16-bit values through alone"
        self.shape, self.dtype = (problem.N, problem.K), problem.dtype
        self._split = tensor.split
        self._gathered = not tensor.split.ascending  # asked once: the answer comes from the device
        self._compressed = Compressed(tensor.base.to(problem.dtype))

    @classmethod
    def refuse(cls, problem: Problem) -> str | None:
        if not problem.scheme.sparse or problem.scheme.weight.bits != UNQUANTIZED_BITS:
            return "takes 2:4 weights of 16 bits"
        if problem.device != "cuda":
            return "runs on a CUDA device only"
        if problem.dtype not in _DTYPES:
            return f"takes bfloat16 or float16 activations, not {problem.dtype}"
        return None if CUSPARSELT in problem.features else _MISSING

    @classmethod
    def describe(cls, problem: Problem) -> str:
        N, K = (-(-size // _STEP) * _STEP for size in (problem.N, problem.K))
        bits = 9 * N * K / (problem.N * problem.K)
        return f"2:4 products of 16-bit values by cuSPARSELt; about {bits:.2f} bits per weight in memory"

    @classmethod
    def prepare(cls, qt: QuantizedTensor | SplitTensor, problem: Problem) -> Self:
        assert isinstance(qt, SplitTensor), "the table of split weights"
        return cls(problem, qt)

    def __call__(self, x: Tensor) -> Tensor:
        if not x.shape[0]:
            return x.new_empty(0, self.shape[0])
        return self._compressed.linear(x[:, self._split.base_idx] if self._gathered else x)

    def rows(self, index: Tensor) -> Tensor:
        return self.dequantize(self.dtype)[index]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._split.restore_weight(self._compressed.dense().to(torch.float32)).to(dtype)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self._compressed.tensor, self._split.base_idx
