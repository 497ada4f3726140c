"""Launching the kernel for attention of one new token: how keys are cut, shared memory."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from bitwright.kernels.machine import machine
from bitwright.kernels.nvrtc.compile import Macros
from bitwright.kernels.nvrtc.driver import Kernel, bind, loading
from bitwright.kernels.problem import HOPPER, NVRTC

FEATURES = frozenset({HOPPER, NVRTC})  # of the machine
HEAD_DIMS = (64, 128)
MOST_HEADS = 8  # of queries to one of keys, whose sums find room in registers
_OF_TEAM = 4  # heads of a warp
_SLOTS, _CHUNK = 4, 16  # warps of a team, keys of a stage
_STAGES, _DEEP = 2, 4  # deep: where few blocks have the GPU to themselves
_MOST_SPLITS = 8  # blocks of a cluster that every GPU takes
_KEYS = 320  # of a block, up to which what heads that share them cost is hidden
_ALIGNMENT = 128  # of stages in shared memory
_LOG2_E = 1.4426950408889634  # softmax in powers of two


@dataclass(frozen=True)
class Config(Macros):
    """Macros of `decode_attention.cu`; there is what they mean."""

    SOURCE = "decode_attention.cu"

    D: int
    HEADS: int
    FRESH: int
    ROPE: int
    FLOAT16: int
    SPLITS: int
    TEAMS: int
    STAGES: int

    @property
    def stages(self) -> int:
        """Of a warp, in shared memory."""
        return self.STAGES

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * _SLOTS * self.TEAMS

    @property
    def CLUSTER(self) -> int:
        """Blocks of a cluster."""
        return self.SPLITS

    @property
    def shared(self) -> int:
        """Bytes of shared memory, what alignment may take included."""
        stages = _SLOTS * self.STAGES * (_CHUNK * self.D * 4 + 16)
        return _ALIGNMENT + stages + _SLOTS * self.HEADS * (4 * self.D + 8 * self.SPLITS) + 8


def takes(heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether there is a kernel for these heads."""
    return head_dim in HEAD_DIMS and heads % kv_heads == 0 and heads // kv_heads <= MOST_HEADS


@lru_cache(maxsize=1024)
def choose(
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    capacity: int,
    dtype: torch.dtype,
    processors: int,
    fresh: bool = True,
    rope: bool = True,
) -> Config:
    """By timings on one H100 (dev/LOG.md): the more heads share a key, the fewer blocks.

    Every block has keys at a context of `capacity`.
    """
    pairs, group = batch * kv_heads, heads // kv_heads
    blocks = 2 * processors if group <= 2 else processors if group <= _OF_TEAM else processors // 2
    most = min(_MOST_SPLITS, blocks // pairs, -(-capacity // (_SLOTS * _CHUNK)))
    splits = 1 << max(1, most).bit_length() - 1
    alone = group > 2 and 2 * pairs * splits <= processors
    return Config(
        D=head_dim,
        HEADS=group,
        FRESH=int(fresh),
        ROPE=int(rope),
        FLOAT16=int(dtype == torch.float16),
        SPLITS=splits,
        TEAMS=-(-group // _OF_TEAM),
        STAGES=_DEEP if alone else _STAGES,
    )


def suits(config: Config, capacity: int) -> bool:
    """Whether it is no slower than `kernels.triton.attention` at contexts up to `capacity`, by the same timings."""
    return config.HEADS <= 2 or capacity <= _KEYS * config.SPLITS


def decode(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    config: Config,
) -> Tensor:
    """[B, heads, D] of queries, keys and values [B, (heads + 2 kv_heads) D]; see `kernels.attention.decode`."""
    tables = qkv if cos is None else cos, qkv if sin is None else sin
    return _launch(qkv, *tables, positions, keys, values, keys.shape[3] ** -0.5, config, dependent=True)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float, config: Config | None = None
) -> Tensor:
    """softmax(scale * q kᵀ) v for one query per sequence over the first lengths[b] > 0 keys of its cache, in float32.

    queries [B, heads, D], keys and values [B, kv_heads, S, D], all contiguous and bf16 or fp16; lengths int32 [B] on
    the device. Returns [B, heads, D]. config: instead of what `choose` gives.
    """
    assert all(t.is_contiguous() for t in (queries, keys, values, lengths))
    B, heads, D = queries.shape
    KV, S = keys.shape[1:3]
    if config is None:
        processors = machine(queries.device)[1]
        config = choose(B, heads, KV, D, S, queries.dtype, processors, fresh=False, rope=False)
    # What comes before may be any kernel, and may have written a key just now: nothing is read before it has ended.
    return _launch(queries, queries, queries, lengths, keys, values, scale, config, dependent=False)


def _launch(
    queries: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    config: Config,
    dependent: bool,
) -> Tensor:
    B, KV, S, D = keys.shape
    out = torch.empty(B, config.HEADS * KV, D, dtype=queries.dtype, device=queries.device)
    if B == 0:
        return out
    bind(queries.device.index)
    kernel(config, queries.device.index)(
        B * KV * config.SPLITS,
        config.threads,
        [
            *(ctypes.c_void_p(t.data_ptr()) for t in (queries, cos, sin, positions, keys, values, out)),
            ctypes.c_float(scale * _LOG2_E),
            ctypes.c_int(KV),
            ctypes.c_int(S),
        ],
        dependent=dependent,
    )
    return out


@lru_cache(maxsize=1024)
def kernel(config: Config, device: int) -> Kernel:
    """Loaded at its first use in a process, which may not be while a graph is captured; compiled once (0.5 s)."""
    loading(f"attention of {config.HEADS} heads to one of keys")
    return Kernel(config.machine_code(), "decode_attention", config.shared, device)
