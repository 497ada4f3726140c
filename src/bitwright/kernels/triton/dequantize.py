"""The weight dense again, [N, K], at the speed of writing it: for a GEMM of cuBLAS where tokens are many."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitwright.errors import SchemeError
from bitwright.kernels.fragments import Fragments
from bitwright.kernels.triton.fragment import load_groups, load_words, weights
from bitwright.kernels.triton.gemm import DTYPES, group_of, has_asm, on_device

_BN, _BK = 64, 128


def dequantize(fragments: Fragments, dtype: torch.dtype) -> Tensor:
    """[N, K] ([E, N, K] of a stack) in bf16 or fp16: what `QuantizedTensor.dequantize` gives, bit for bit.

    Raises SchemeError for other dtypes and for groups the kernel does not know.
    """
    f = fragments
    if dtype not in DTYPES or f.scale.dtype not in (dtype, torch.float32):
        raise SchemeError(
            f"the Triton kernel makes bfloat16 and float16 from scales of that dtype or float32, not {dtype} from "
            f"{f.scale.dtype}; pack the weight for {dtype}"
        )
    group = group_of(f)
    E = f.experts
    out = torch.empty(*(() if E is None else (E,)), f.N, f.K, dtype=dtype, device=f.scale.device)
    if out.numel() == 0:
        return out
    grid = triton.cdiv(f.N, _BN) * triton.cdiv(f.K, _BK), 1 if E is None else E
    with on_device(out.device):
        dequantize_kernel[grid](
            f.words[0], f.words[-1], f.scale, f.zero, out, f.N, f.K,
            BITS=f.bits, GROUP=group, BN=_BN, BK=_BK, ASM=has_asm(out.device, dtype), num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def dequantize_kernel(
    words, plane, scale, zero, out, N, K,
    BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of [N, K], experts."""
    across = tl.cdiv(K, BK)
    row = tl.program_id(0) // across
    step = tl.program_id(0) % across
    expert = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(N, 64) * 4
    columns = tl.cdiv(K, 64)
    groups = 1 if GROUP == 0 else tl.cdiv(K, GROUP)
    PER_BLOCK: tl.constexpr = 64 if BITS == 3 else 32 * BITS
    block = expert * blocks * columns
    block_row = row * (BN // 16)
    col = step * (BK // 64)
    w = load_words(words + block * PER_BLOCK, block_row, col, blocks, columns, BN, BK, PER_BLOCK, True)
    v = w
    if BITS == 3:
        v = load_words(plane + block * 32, block_row, col, blocks, columns, BN, BK, 32, True)
    of_scale = expert * groups * blocks * 16
    s0, s1 = load_groups(scale + of_scale, block_row, col, blocks, groups, BN, BK, GROUP)
    z0 = None
    z1 = None
    if zero is not None:
        z0, z1 = load_groups(zero + of_scale, block_row, col, blocks, groups, BN, BK, GROUP)
    tile = weights(w, v, s0, s1, z0, z1, BITS, out.dtype.element_ty, ASM)
    n = (row * BN + tl.arange(0, BN)).to(tl.int64)
    k = step * BK + tl.arange(0, BK)
    at = out + expert * N * K + n[:, None] * K + k[None, :]
    tl.store(at, tile, mask=(n < N)[:, None] & (k < K)[None, :])
