"""Launching the Gluon kernel for Hopper: descriptors, workspace, division of work."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from bitwright.kernels import tma
from bitwright.kernels.fragments import Fragments
from bitwright.kernels.gluon.config import PIECE, Config, Division, choose, choose_experts, divide, divide_experts
from bitwright.kernels.gluon.fragment import stage
from bitwright.kernels.gluon.kernel import fragment_gemm
from bitwright.kernels.machine import machine
from bitwright.kernels.workspace import zeros

_WORDS = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)
_SCALES = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=16, rank=2)
_TOKENS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def linear(x: Tensor, fragments: Fragments, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias for x [M, K] bf16 or fp16, M > 0; returns [M, N] in the dtype of x.

    Scales must have that dtype, group_size be 32, a multiple of 64, or K.
    """
    f, M, processors = fragments, x.shape[0], machine(x.device)[1]
    config = choose(M, f.kind(x.dtype, bias is not None), processors)
    return launch(x, f, bias, config, divide(M, f.N, f.K, config, processors))


def experts(x: Tensor, offsets: Tensor, fragments: Fragments, settled: bool = False) -> Tensor:
    """Rows offsets[e] ... offsets[e + 1] - 1 of x [T, K] times weight e of the stack, transposed; returns [T, N].

    offsets: int32 [E + 1] on the device, never read by the host. Rows from offsets[E] on are left unwritten. T > 0.
    settled: see `ops.fragment_experts`.
    """
    f, processors = fragments, machine(x.device)[1]
    assert f.experts is not None, "a stack of experts"
    config = choose_experts(x.shape[0], f.experts, f.kind(x.dtype), settled)
    return launch(x, f, None, config, divide_experts(x.shape[0], f.N, config, processors), offsets)


def launch(
    x: Tensor, f: Fragments, bias: Tensor | None, config: Config, division: Division, offsets: Tensor | None = None
) -> Tensor:
    """One launch at a given configuration."""
    M, K = x.shape
    x = tma.rows(x)
    out = torch.empty(M, f.N, dtype=x.dtype, device=x.device)
    flags = zeros(division.flags, x.device)
    partial = flags.view(torch.float32)
    if division.partial_size:
        partial = torch.empty(division.partial_size, dtype=torch.float32, device=x.device)
    words = [_stages(f, plane, config) for plane in range(len(f.words))]
    scale = _rows(f.scale, config)
    zero = scale if f.zero is None else _rows(f.zero, config)
    tokens = TensorDescriptor(x, [M, x.shape[1]], [x.shape[1], 1], [config.BM, config.BK], _TOKENS)
    written = tokens
    if config.TMA_OUT:
        written = TensorDescriptor(out, [M, f.N], [f.N, 1], [min(config.BM, PIECE), 64 * config.REST], _TOKENS)
    fragment_gemm[(division.programs,)](
        words[0],
        words[-1],
        tokens,
        scale,
        zero,
        written,
        out,
        out if bias is None else bias,
        partial,
        flags,
        flags if offsets is None else offsets,
        M,
        f.N,
        K,
        f.words[0].shape[-4],
        f.scale.shape[-2],
        division.whole,
        division.per,
        config,
        num_warps=4,
        maxnreg=config.MAXNREG,
        launch_pdl=True,
    )
    return out


def _stages(f: Fragments, plane: int, config: Config) -> TensorDescriptor:
    """Words as bands, lines of a band, words of a line. A step is a box of it, zeros past the last column block."""
    words, columns = f.words[plane], f.words[plane].shape[-3]
    _, lines, line = stage(f.bits, plane, 1, columns)
    shape = [words.numel() // (lines * line), lines, line]
    return TensorDescriptor(
        words, shape, [lines * line, line, 1], stage(f.bits, plane, config.BN // 64, config.BK // 64), _WORDS
    )


def _rows(values: Tensor, config: Config) -> TensorDescriptor:
    """Scales or zero points [..., G, rows] as one table of rows."""
    width = values.shape[-1]
    return TensorDescriptor(values, [values.numel() // width, width], [width, 1], [config.GROUPS, config.BN], _SCALES)
