"""For each number of tokens one of the Hopper kernels, over the same packed weight: by measurements the fastest.

Few tokens are bound by reading the weight: a kernel in CUDA C++ whose launches overlap (`nvrtc.few_tokens`). More are
bound by products: up to 128 the Gluon kernel, in tiles whose sides are powers of two, then one in CUDA C++
(`nvrtc.many_tokens`) with tiles of any number of tokens, but where the Gluon kernel's divide the problem better.
"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from bitwright.kernels.fragments import Fragments, Kind
from bitwright.kernels.gluon import config, gemm
from bitwright.kernels.machine import machine
from bitwright.kernels.nvrtc import few_tokens, many_config, many_tokens

_HUGE = 1 << 29  # 4-bit numbers of a weight, from which on few tokens are 2 % faster with the Gluon kernel
_FEW_ROWS = 4  # of sorted tokens, in all, up to which experts are bound by reading them
_MANY_TOKENS = 128  # up to which the Gluon kernel has tiles that suit
_MARGIN = 1.03  # of the Gluon kernel's time, which heats the GPU more and falls behind in long runs (dev/LOG.md)


def linear(x: Tensor, fragments: Fragments, bias: Tensor | None = None) -> Tensor:
    """What `gluon.gemm.linear` gives: x Wᵀ + bias for x [M, K] bf16 or fp16, M > 0, as [M, N] in the dtype of x."""
    f, M = fragments, x.shape[0]
    huge = f.bits == 4 and f.N * f.K >= _HUGE
    if M <= few_tokens.MOST_TOKENS and few_tokens.takes(f.group_size, f.K) and not huge:
        return few_tokens.linear(x, f, bias)
    if M > _MANY_TOKENS and _suits(M, f.kind(x.dtype, bias is not None), machine(x.device)[1]):
        return many_tokens.linear(x, f, bias)
    return gemm.linear(x, f, bias)


def experts(x: Tensor, offsets: Tensor, fragments: Fragments, settled: bool = False) -> Tensor:
    """What `gluon.gemm.experts` gives."""
    f = fragments
    if x.shape[0] <= _FEW_ROWS and few_tokens.takes(f.group_size, f.K):
        return few_tokens.experts(x, offsets, f, settled)
    return gemm.experts(x, offsets, f, settled)


@lru_cache(maxsize=4096)
def _suits(M: int, kind: Kind, processors: int) -> bool:
    """Whether the kernel with tiles of any number of tokens is no slower than that with powers of two.

    The estimates are those of 4-bit weights; other widths and groups differ alike with both (dev/LOG.md).
    """
    N, K = kind.N, kind.K
    tiles = many_config.choose(M, kind, processors)
    return many_config.best(M, N, K, tiles, processors) < _MARGIN * config.estimate(M, N, K, processors)
