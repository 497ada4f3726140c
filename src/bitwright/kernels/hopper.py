"""The fastest of the Hopper kernels for each number of tokens, over the same packed weight.

Few tokens are bound by reading the weight: a kernel in CUDA C++ whose launches overlap (`nvrtc.few_tokens`). More are
bound by products: the Gluon kernel in tiles whose sides are powers of two, and one in CUDA C++ (`nvrtc.many_tokens`)
where these do not suit the number of tokens.
"""

from __future__ import annotations

from torch import Tensor

from bitwright.kernels.fragments import Fragments
from bitwright.kernels.gluon import gemm
from bitwright.kernels.nvrtc import few_tokens

# Rows of sorted tokens, in all, up to which experts are bound by reading them.
_FEW_ROWS = 4


def linear(x: Tensor, fragments: Fragments, bias: Tensor | None = None) -> Tensor:
    """What `gluon.gemm.linear` gives: x Wᵀ + bias for x [M, K] bf16 or fp16, M > 0, as [M, N] in the dtype of x."""
    f = fragments
    if x.shape[0] <= few_tokens.MOST_TOKENS and few_tokens.takes(f.group_size, f.K):
        return few_tokens.linear(x, f, bias)
    return gemm.linear(x, f, bias)


def experts(x: Tensor, offsets: Tensor, fragments: Fragments, settled: bool = False) -> Tensor:
    """What `gluon.gemm.experts` gives."""
    f = fragments
    if x.shape[0] <= _FEW_ROWS and few_tokens.takes(f.group_size, f.K):
        return few_tokens.experts(x, offsets, f, settled)
    return gemm.experts(x, offsets, f, settled)
