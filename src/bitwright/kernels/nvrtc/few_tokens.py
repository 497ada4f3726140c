"""Launching the kernel for few tokens: tiles, the division of work, tensor maps."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from bitwright.kernels import tma
from bitwright.kernels.fragments import COLUMNS, ROWS, WORDS, Fragments, Kind
from bitwright.kernels.machine import machine
from bitwright.kernels.nvrtc.compile import Macros
from bitwright.kernels.nvrtc.driver import Kernel, bind, loading, tensor_map
from bitwright.kernels.workspace import zeros

MOST_TOKENS = 16  # of a tile, and of a linear that it takes
MOST_SLOTS = 256  # token tiles of all experts that find room in shared memory
# Bytes of shared memory of a block. One fits on a processor, so that the blocks of the next launch spread evenly, each
# where one has ended; beside it fits what runs between linears. More were slower, by measurements on one H100.
SHARED_MEMORY = 150 << 10
_ALONE = 114 << 10  # bytes, of which a processor has not room for twice as many
_ALIGNMENT = 1024  # of stages in shared memory
_SLOT_BYTES = 12
# From so many outputs on there are tiles enough for 128 rows each, which share the reading of tokens. Fewer are cut
# into more tiles instead of more pieces along K, whose sums would have to be added up.
_MANY_OUTPUTS = 1 << 15
_WARPS = 8
# Column blocks of a step by teams and bits: about 16 KiB of words.
_COLUMNS = {1: {2: 8, 3: 4, 4: 4, 8: 2}, 2: {2: 16, 3: 16, 4: 8, 8: 4}}


@dataclass(frozen=True)
class Config(Macros):
    """Macros of `few_tokens.cu`; there is what they mean. STAGES: None = as many as fit."""

    SOURCE = "few_tokens.cu"

    BITS: int
    FLOAT16: int
    ASYM: int
    BIAS: int
    GROUP: int
    TOKENS: int
    TEAMS: int
    COLUMNS: int
    EXPERTS: int = 0
    SETTLED: int = 0
    WARPS: int = _WARPS
    STAGES: int | None = None

    @property
    def rows(self) -> int:
        """Outputs of a tile."""
        return ROWS * self.WARPS // self.TEAMS

    @property
    def step(self) -> int:
        """Columns of a step."""
        return COLUMNS * self.COLUMNS

    @property
    def groups(self) -> int:
        """Scales of a row in a step."""
        return 1 if self.GROUP == 0 else max(1, self.step // self.GROUP)

    @property
    def stage_bytes(self) -> int:
        """Of a stage in shared memory: tokens, words, scales and zero points."""
        words = self.rows // ROWS * self.COLUMNS * sum(WORDS[self.BITS]) * 4
        held = self.step * self.TOKENS * 2 + words + self.groups * self.rows * (4 if self.ASYM else 2)
        return -(-held // _ALIGNMENT) * _ALIGNMENT

    @property
    def stages(self) -> int:
        """In shared memory."""
        return self.STAGES or (SHARED_MEMORY - self._beside) // (self.stage_bytes + 16)

    @property
    def shared(self) -> int:
        """Bytes of shared memory, what alignment may take included; two blocks do not fit on a processor."""
        return max(_ALONE, self._beside + self.stages * (self.stage_bytes + 16))

    @property
    def _beside(self) -> int:
        given = 2 * (self.TEAMS - 1) * self.rows * self.TOKENS * 4
        return _ALIGNMENT + given + (MOST_SLOTS * _SLOT_BYTES if self.EXPERTS else 0)

    @property
    def options(self) -> tuple[str, ...]:
        """For the compiler."""
        return (*super().options, f"-DMOST_SLOTS={MOST_SLOTS}")


@lru_cache(maxsize=4096)
def choose(tokens: int, kind: Kind, experts: bool = False, settled: bool = False) -> Config:
    """For `tokens` tokens that meet a weight, or each one of a stack; where there are more, tiles of `MOST_TOKENS`."""
    assert takes(kind.group_size, kind.K), f"groups of {kind.group_size}"
    teams = 1 if kind.N >= _MANY_OUTPUTS else 2
    group = 0 if kind.group_size >= kind.K else kind.group_size
    columns = _COLUMNS[teams][kind.bits]
    while group and group % (columns * COLUMNS) and columns * COLUMNS % group:
        columns //= 2  # a step must not cut a group
    return Config(
        BITS=kind.bits,
        FLOAT16=int(kind.dtype == torch.float16),
        ASYM=int(kind.asymmetric),
        BIAS=int(kind.bias),
        GROUP=group,
        TOKENS=8 if tokens <= 8 else MOST_TOKENS,
        TEAMS=teams,
        COLUMNS=columns,
        EXPERTS=int(experts),
        SETTLED=int(settled),
    )


def takes(group_size: int, K: int) -> bool:
    """Whether there are steps that cut no group."""
    return group_size >= K or group_size in (32, 64) or group_size % 128 == 0


def slots(T: int, experts: int) -> int:
    """Token tiles that T rows of a stack of experts make at most."""
    return min(T, T // 8 + experts)


def divide(units: int, processors: int) -> tuple[int, int]:
    """(blocks, steps of a block) for `units` steps of all tiles: equal runs, the last one may be shorter."""
    per = max(1, -(-units // processors))
    return max(1, -(-units // per)), per


def linear(x: Tensor, fragments: Fragments, bias: Tensor | None = None, config: Config | None = None) -> Tensor:
    """x Wᵀ + bias for x [M, K] bf16 or fp16, 0 < M <= `MOST_TOKENS`; returns [M, N] in the dtype of x.

    Scales, zero points and bias must have that dtype, and `takes` the groups. config: instead of what `choose` gives.
    """
    f = fragments
    c = config or choose(x.shape[0], f.kind(x.dtype, bias is not None))
    units = -(-f.N // c.rows) * -(-f.words[0].shape[-3] // c.COLUMNS)
    return _launch(x, f, bias, c, *divide(units, machine(x.device)[1]), None)


def experts(
    x: Tensor, offsets: Tensor, fragments: Fragments, settled: bool = False, config: Config | None = None
) -> Tensor:
    """What `gluon.gemm.experts` gives, for at most `MOST_SLOTS` of `slots`."""
    f = fragments
    assert f.experts is not None, "a stack of experts"
    assert slots(x.shape[0], f.experts) <= MOST_SLOTS, "tiles that find no room"
    c = config or choose(-(-x.shape[0] // f.experts), f.kind(x.dtype), experts=True, settled=settled)
    # How many steps there are is known on the device.
    return _launch(x, f, None, c, machine(x.device)[1], 0, offsets)


def _launch(
    x: Tensor, f: Fragments, bias: Tensor | None, c: Config, blocks: int, per: int, offsets: Tensor | None
) -> Tensor:
    M, x = x.shape[0], tma.rows(x)
    out = torch.empty(M, f.N, dtype=x.dtype, device=x.device)
    bind(x.device.index)
    exchange = zeros(c.rows * c.TOKENS * blocks, x.device)
    tokens = tensor_map(x, (c.TOKENS, COLUMNS), 128)
    scale = tensor_map(f.scale.flatten(0, -2), (c.groups, c.rows), 0)
    zero = scale if f.zero is None else tensor_map(f.zero.flatten(0, -2), (c.groups, c.rows), 0)
    pointers = (
        f.words[0], f.words[-1], out, out if bias is None else bias, exchange, exchange if offsets is None else offsets,
    )  # fmt: skip
    bands, columns = f.words[0].shape[-4:-2]
    numbers = (f.experts or 1, M, f.N, bands, columns, f.scale.shape[-2], per)
    kernel(c, x.device.index)(
        blocks,
        32 * (c.WARPS + 1),
        [
            tokens, scale, zero,
            *(ctypes.c_void_p(p.data_ptr()) for p in pointers),
            *map(ctypes.c_int, numbers),
        ],
        dependent=True,
    )  # fmt: skip
    return out


@lru_cache(maxsize=1024)
def kernel(config: Config, device: int) -> Kernel:
    """Loaded at its first use in a process, which may not be while a graph is captured; compiled once (0.2 s)."""
    loading(f"{config.TOKENS} tokens")
    return Kernel(config.machine_code(), "few_tokens", config.shared, device)
