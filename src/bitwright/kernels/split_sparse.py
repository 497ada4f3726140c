"""2:4 weights that meet quantized activations on an NVIDIA GPU: integer products by cuSPARSELt, which skips the zeros.

cuSPARSELt multiplies int8 and writes int32 sums; scales, zero points, outliers and the bias come from a kernel of ours
after it. It knows no 4-bit codes, so those are bytes here too: half of them are zeros and not held, and two bits say
which half, 5 bits per weight. For 4-bit weights and few tokens that is more to read than the dense kernel's 4, for many
tokens the products are what counts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitwright.kernels.int8_fragments import padded
from bitwright.kernels.int8_ops import int8_finish
from bitwright.kernels.problem import CUSPARSELT, Problem
from bitwright.kernels.split_cuda import Int8Weight, Quantized, Quantizer, outlier_columns
from bitwright.qtensor import QuantizedTensor
from bitwright.split import SplitTensor

_STEP = 32  # cuSPARSELt takes rows of an int8 weight, and tokens, in multiples of this (16 would do for tokens)
_MOST_SUMS = 1 << 28  # int32 sums held at a time: 1 GiB
_LARGEST_BUCKET = 1 << 14  # tokens; beyond, one algorithm serves all


class SplitSparse(Int8Weight):
    """Codes of 4 or 8 bits as cuSPARSELt compresses int8 [N padded to 32, B padded to 128].

    Its algorithms differ in speed, never in result: sums are integers. The best one is looked for at the first call of
    a size, powers of two apart, by trying them; not while a graph is captured or a program traced, which take the
    default where nothing was found before.
    """

    NAME = "int8-sparse"
    _WHAT = "2:4 int8 products by cuSPARSELt, a Triton kernel for the input and one for the outputs"

    def __init__(self, problem: Problem, tensor: SplitTensor, quantizer: Quantizer) -> None:
        super().__init__(problem, tensor, quantizer)
        assert isinstance(tensor.base, QuantizedTensor)
        more = (0, padded(self._B) - self._B, 0, -problem.N % _STEP)
        self._compressed = torch._cslt_compress(pad(tensor.base.codes, more).contiguous())
        self._algorithms: dict[int, int] = {}

    @classmethod
    def refuse(cls, problem: Problem) -> str | None:
        if not problem.scheme.sparse:
            return "takes 2:4 weights"
        if (refusal := super().refuse(problem)) is not None:
            return refusal
        return None if CUSPARSELT in problem.features else "needs cuSPARSELt, which this torch does not bring"

    @classmethod
    def _code_bits(cls, problem: Problem) -> float:
        rows = -(-problem.N // _STEP) * _STEP
        return 5 * rows * padded(problem.K - outlier_columns(problem))

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        q, N = self._quantizer.codes(x), self.shape[0]
        M = q.codes.shape[0]
        if M == 0:
            return x.new_empty(0, N)
        step = max(_STEP, _MOST_SUMS // N // _STEP * _STEP)
        pieces = [self._finished(q, slice(m, m + step), bias) for m in range(0, M, step)]
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _finished(self, q: Quantized, tokens: slice, bias: Tensor | None) -> Tensor:
        """[m, N] of some of the tokens."""
        of_tokens = (q.scale[tokens], q.zero[tokens], q.outliers[tokens])
        of_rows = (self._scale, self._row_sums, self._outliers, bias)
        y: Tensor = int8_finish(self._sums(q.codes[tokens]), *of_tokens, *of_rows, self.dtype)
        return y

    def _sums(self, codes: Tensor) -> Tensor:
        """int32 [N padded, M padded] of codes int8 [M, B padded]."""
        tokens = pad(codes, (0, 0, 0, -codes.shape[0] % _STEP)).t()
        algorithm = self._algorithm(tokens)
        return torch._cslt_sparse_mm(self._compressed, tokens, out_dtype=torch.int32, alg_id=algorithm)

    def _algorithm(self, tokens: Tensor) -> int:
        bucket = min(tokens.shape[1] - 1, _LARGEST_BUCKET).bit_length()
        found = self._algorithms.get(bucket)
        if found is None:
            if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
                return 0
            found = torch._cslt_sparse_mm_search(self._compressed, tokens, out_dtype=torch.int32)
            self._algorithms[bucket] = found
        return found

    def _codes(self, index: Tensor | None) -> Tensor:
        """Read back column by column: the product with one-hot tokens."""
        Bp = padded(self._B)
        codes = torch.empty(self.shape[0], Bp, dtype=torch.int8, device=self._scale.device)
        one_hot = torch.zeros(128, Bp, dtype=torch.int8, device=codes.device)
        for k in range(0, Bp, 128):
            one_hot.zero_()[:, k : k + 128].fill_diagonal_(1)
            sums = torch._cslt_sparse_mm(self._compressed, one_hot.t(), out_dtype=torch.int32)
            codes[:, k : k + 128] = sums[: self.shape[0]]
        codes = codes[:, : self._B]
        return codes if index is None else codes[index]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self._compressed, *self._held
