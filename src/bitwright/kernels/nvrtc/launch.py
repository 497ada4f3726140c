"""Launching the Hopper kernel for 2:4 weights and quantized activations: tiles, tensor maps."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from bitwright.kernels import tma
from bitwright.kernels.int8_fragments import STEP
from bitwright.kernels.machine import machine
from bitwright.kernels.nvrtc.compile import Header, Macros
from bitwright.kernels.nvrtc.driver import Kernel, bind, loading, tensor_map
from bitwright.kernels.nvrtc.instructions import sparse_header
from bitwright.kernels.sparse_fragments import block_bytes

SHARED_MEMORY = 227 << 10  # bytes of a block
_THREADS = 384
_OUTLIER_STEP = 32
_PIECE = 32  # tokens of results that are written at a time
_RESULTS = 4 * _PIECE * 128  # bytes of shared memory for results: two pieces of each warpgroup
_ALIGNMENT = 1024  # of stages in shared memory
# Tiles, outputs by tokens, and the time of one over that of 256 x 128, by measurements on one H100 (dev/LOG.md). Fewer
# outputs spread the weight over more processors where tokens are few.
_TILES = {(256, 192): 1.3, (256, 160): 1.13, (256, 128): 1.0, (256, 64): 0.65, (128, 64): 0.45}
_SAME, _FLOAT32 = 1, 2  # BIAS


@dataclass(frozen=True)
class Config(Macros):
    """Macros of `sparse_int8.cu`; there is what they mean. STAGES: None = as many as fit."""

    SOURCE = "sparse_int8.cu"

    BITS: int
    ROWS: int
    TOKENS: int
    OUTLIERS: int
    FLOAT16: int
    BIAS: int
    TMA_OUT: int
    CLUSTER: int = 2
    BAND: int = 16
    STAGES: int | None = None

    @property
    def stage_bytes(self) -> int:
        """Of a step of base columns."""
        return self.ROWS // 16 * block_bytes(self.BITS) + self.TOKENS * STEP

    @property
    def stages(self) -> int:
        """In shared memory."""
        results = _RESULTS if self.TMA_OUT else 0
        return self.STAGES or (SHARED_MEMORY - _ALIGNMENT - results) // (self.stage_bytes + 16)

    @property
    def shared(self) -> int:
        """Bytes of shared memory, what alignment may take included."""
        return _ALIGNMENT + self.stages * (self.stage_bytes + 16) + (_RESULTS if self.TMA_OUT else 0)

    def clusters(self, M: int, N: int) -> int:
        """Tiles, each one of every block of a cluster, of M tokens by N outputs."""
        return -(-M // self.TOKENS) * -(-N // (self.ROWS * self.CLUSTER))

    @property
    def headers(self) -> tuple[Header, ...]:
        """The products of so many tokens."""
        return (("instructions.cuh", sparse_header(self.TOKENS, bool(self.FLOAT16))),)


@lru_cache(maxsize=4096)
def choose(M: int, N: int, O: int, bits: int, bias: torch.dtype | None, dtype: torch.dtype, processors: int) -> Config:
    """Tiles for M tokens times N outputs with O outliers."""
    config = Config(
        BITS=bits,
        ROWS=256,
        TOKENS=128,
        OUTLIERS=int(O > 0),
        FLOAT16=int(dtype == torch.float16),
        BIAS=0 if bias is None else _SAME if bias == dtype else _FLOAT32,
        TMA_OUT=int(N % 8 == 0),
    )
    candidates = [
        replace(config, ROWS=rows, TOKENS=tokens, CLUSTER=2 if rows < N and processors > 1 else 1)
        for rows, tokens in _TILES
    ]

    def time(c: Config) -> float:
        return -(-c.clusters(M, N) // (processors // c.CLUSTER)) * _TILES[c.ROWS, c.TOKENS]

    return min(candidates, key=time)


def linear(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    outliers: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    row_sums: Tensor,
    weight_outliers: Tensor,
    bias: Tensor | None,
    bits: int,
    N: int,
    B: int,
    dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """[M, N] in `dtype`; operands as `sparse_ops` describes and checks them. config: instead of what `choose` gives."""
    M, O = outliers.shape
    out = torch.empty(M, N, dtype=dtype, device=codes.device)
    if M == 0 or N == 0:
        return out
    bind(codes.device.index)
    processors = machine(codes.device)[1]
    c = config or choose(M, N, O, bits, None if bias is None else bias.dtype, dtype, processors)
    if bias is not None and c.BIAS == _FLOAT32:
        bias = bias.to(torch.float32)
    codes, weight, outliers, weight_outliers = map(tma.aligned, (codes, weight, outliers, weight_outliers))
    tokens = tensor_map(codes, (c.TOKENS // c.CLUSTER, STEP), 128)
    matrix = tensor_map(weight.view(torch.int64).flatten(1), (c.ROWS // 16, block_bytes(bits) // 8), 0)
    weight_columns = columns = results = tokens
    if c.OUTLIERS:
        columns = tensor_map(outliers, (c.TOKENS // c.CLUSTER, _OUTLIER_STEP), 2 * _OUTLIER_STEP)
        weight_columns = tensor_map(weight_outliers, (c.ROWS, _OUTLIER_STEP), 2 * _OUTLIER_STEP)
    if c.TMA_OUT:
        results = tensor_map(out, (_PIECE, 64), 128)
    pointers = (out, scale, zero, weight_scale, row_sums, out if bias is None else bias)
    numbers = (M, N, codes.shape[1] // STEP, -(-O // _OUTLIER_STEP))
    clusters = min(c.clusters(M, N), processors // c.CLUSTER)
    kernel(c, codes.device.index)(
        clusters * c.CLUSTER,
        _THREADS,
        [
            matrix, tokens, weight_columns, columns, results,
            *(ctypes.c_void_p(p.data_ptr()) for p in pointers),
            *map(ctypes.c_int, numbers),
        ],
    )  # fmt: skip
    return out


@lru_cache(maxsize=1024)
def kernel(config: Config, device: int) -> Kernel:
    """Loaded at its first use in a process, which may not be while a graph is captured; compiled once (0.3 to 1 s)."""
    loading(f"tiles of {config.ROWS} x {config.TOKENS}")
    return Kernel(config.machine_code(), "sparse_int8", config.shared, device)
