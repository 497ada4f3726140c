"""Launching the Hopper kernel for packed weights and many tokens: tensor maps, workspace, division of work."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from bitwright.kernels import tma
from bitwright.kernels.fragments import COLUMNS, Fragments
from bitwright.kernels.machine import machine
from bitwright.kernels.nvrtc.driver import Kernel, bind, loading, tensor_map
from bitwright.kernels.nvrtc.many_config import Config, choose, divide
from bitwright.kernels.workspace import zeros

_THREADS = 384


def linear(
    x: Tensor, fragments: Fragments, bias: Tensor | None = None, config: Config | None = None, cuts: int | None = None
) -> Tensor:
    """x Wᵀ + bias for x [M, K] bf16 or fp16; returns [M, N] in the dtype of x.

    Scales, zero points and bias must have that dtype, group_size be 32, a multiple of 64, or K. config, cuts: instead
    of what `choose` and `divide` give.
    """
    f, M = fragments, x.shape[0]
    out = torch.empty(M, f.N, dtype=x.dtype, device=x.device)
    if M == 0 or f.N == 0:
        return out
    bind(x.device.index)
    processors = machine(x.device)[1]
    c = config or choose(M, f.kind(x.dtype, bias is not None), processors)
    d = divide(M, f.N, f.K, c, processors, cuts)
    x = tma.rows(x)
    counters = zeros(d.counters, x.device)
    partial = torch.empty(d.numbers, dtype=torch.float32, device=x.device)
    bands, columns = f.words[0].shape[:2]
    tokens = tensor_map(x, (c.TOKENS // c.CLUSTER, COLUMNS), 128)
    scale = tensor_map(f.scale, (c.groups, c.ROWS), 0)
    zero = scale if f.zero is None else tensor_map(f.zero, (c.groups, c.ROWS), 0)
    results = tensor_map(out, (c.piece, 64), 128) if c.TMA_OUT else tokens
    pointers = (f.words[0], f.words[-1], out if bias is None else bias, out, partial, counters)
    numbers = (M, f.N, bands, columns, c.steps(f.K), c.steps(f.group_size), d.whole, d.cuts, d.items)
    kernel(c, x.device.index)(
        d.blocks,
        _THREADS,
        [
            tokens, scale, zero, results,
            *(ctypes.c_void_p(p.data_ptr()) for p in pointers),
            *map(ctypes.c_int, numbers),
        ],
        dependent=True,
    )  # fmt: skip
    return out


@lru_cache(maxsize=1024)
def kernel(config: Config, device: int) -> Kernel:
    """Loaded at its first use in a process, which may not be while a graph is captured; compiled once (0.6 s)."""
    loading(f"tiles of {config.ROWS} x {config.TOKENS}")
    return Kernel(config.machine_code(), "many_tokens", config.shared, device)
