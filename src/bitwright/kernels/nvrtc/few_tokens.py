"""Launching the kernel for few tokens: stages, the division of work, tensor maps."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitwright.kernels.fragments import WORDS, Fragments
from bitwright.kernels.nvrtc.compile import compiled
from bitwright.kernels.nvrtc.driver import DriverError, Kernel, bind, tensor_map
from bitwright.kernels.triton.gemm import machine
from bitwright.kernels.workspace import zeros

SHARED_MEMORY = 150 << 10  # bytes of a block: one fits on a processor, and with it what runs between linears
MOST_TOKENS = 16  # up to which it is faster than the Gluon kernel
MOST_SLOTS = 256  # token tiles of all experts that fit into shared memory
_SLOT_BYTES = 12
_ALIGNMENT = 1024  # of stages in shared memory


@dataclass(frozen=True)
class Config:
    """Macros of `few_tokens.cu`; there is what they mean."""

    BITS: int
    FLOAT16: int
    ASYM: int
    BIAS: int
    GROUP: int
    TOKENS: int
    EXPERTS: int = 0
    SETTLED: int = 0
    WARPS: int = 8
    TEAMS: int = 2
    BLOCKS: int = 1
    COLUMNS: int = 8
    STAGES: int | None = None

    @property
    def rows(self) -> int:
        """Outputs of a tile."""
        return 16 * self.BLOCKS * self.WARPS // self.TEAMS

    @property
    def step(self) -> int:
        """Columns of a step."""
        return 64 * self.COLUMNS

    @property
    def groups(self) -> int:
        """Scales of a row in a step."""
        return 1 if self.GROUP == 0 else max(1, self.step // self.GROUP)

    @property
    def stage_bytes(self) -> int:
        """Of a stage in shared memory."""
        scales = self.groups * self.rows * (4 if self.ASYM else 2)
        held = self.step * self.TOKENS * 2 + self.rows * self.step * self.BITS // 8 + scales
        return -(-held // _ALIGNMENT) * _ALIGNMENT

    @property
    def stages(self) -> int:
        """In shared memory."""
        return self.STAGES or (SHARED_MEMORY - _ALIGNMENT - self._rest) // (self.stage_bytes + 16)

    @property
    def shared(self) -> int:
        """Bytes of shared memory, what alignment may take included."""
        return _ALIGNMENT + self.stages * (self.stage_bytes + 16) + self._rest

    @property
    def _rest(self) -> int:
        given = 2 * (self.TEAMS - 1) * self.rows * self.TOKENS * 4
        return given + (MOST_SLOTS * _SLOT_BYTES if self.EXPERTS else 0)

    @property
    def options(self) -> tuple[str, ...]:
        """For the compiler."""
        values = {f.name: getattr(self, f.name) for f in fields(self)} | {"STAGES": self.stages, "MOST_SLOTS": MOST_SLOTS}
        return tuple(f"-D{name}={int(value)}" for name, value in values.items())

    def cubin(self, *options: str) -> tuple[bytes, str]:
        """(machine code, what the compiler says); more options for it."""
        return compiled("few_tokens.cu", (), (*self.options, *options))


@lru_cache(maxsize=4096)
def choose(
    tokens: int,
    K: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    asymmetric: bool,
    bias: bool,
    experts: bool = False,
    settled: bool = False,
) -> Config:
    """For tiles of at least as many tokens (up to `MOST_TOKENS`); of a stack, tiles of `tokens` at most."""
    return Config(
        BITS=bits,
        FLOAT16=int(dtype == torch.float16),
        ASYM=int(asymmetric),
        BIAS=int(bias),
        GROUP=0 if group_size >= K else group_size,
        TOKENS=8 if tokens <= 8 else 16,
        EXPERTS=int(experts),
        SETTLED=int(settled),
        COLUMNS=4 if bits == 8 else 8,
    )


def takes(group_size: int, K: int) -> bool:
    """Whether no step cuts a group."""
    return group_size >= K or group_size in (32, 64) or group_size % 128 == 0


def divide(units: int, processors: int) -> tuple[int, int]:
    """(blocks, steps of a block): equal runs."""
    per = max(1, -(-units // processors))
    return max(1, -(-units // per)), per


def linear(x: Tensor, fragments: Fragments, bias: Tensor | None = None, config: Config | None = None) -> Tensor:
    """x Wᵀ + bias for x [M, K] bf16 or fp16, 0 < M <= `MOST_TOKENS`; returns [M, N] in the dtype of x.

    Scales must have that dtype, and `takes` the groups. config: instead of what `choose` gives.
    """
    f = fragments
    c = config or choose(x.shape[0], f.K, f.bits, f.group_size, x.dtype, f.zero is not None, bias is not None)
    blocks, per = divide(-(-f.N // c.rows) * -(-f.words[0].shape[-3] // c.COLUMNS), machine(x.device)[1])
    return _launch(x, f, bias, c, blocks, per, None)


def experts(
    x: Tensor, offsets: Tensor, fragments: Fragments, settled: bool = False, config: Config | None = None
) -> Tensor:
    """What `gluon.gemm.experts` gives, for at most `MOST_SLOTS` tiles of tokens (`slots`)."""
    f, T = fragments, x.shape[0]
    assert f.experts is not None, "a stack of experts"
    even = -(-T // f.experts)
    c = config or choose(even, f.K, f.bits, f.group_size, x.dtype, f.zero is not None, False, True, settled)
    return _launch(x, f, None, c, machine(x.device)[1], 0, offsets)


def slots(T: int, experts: int, tokens: int) -> int:
    """Tiles of `tokens` tokens that T rows of a stack of experts make at most."""
    return min(T, T // tokens + experts)


def _launch(
    x: Tensor, f: Fragments, bias: Tensor | None, c: Config, blocks: int, per: int, offsets: Tensor | None
) -> Tensor:
    M, K = x.shape
    if K % 8:
        x = pad(x, (0, -K % 8))  # TMA wants rows to begin at multiples of 16 bytes
    elif x.data_ptr() % 16:
        x = x.clone()
    out = torch.empty(M, f.N, dtype=x.dtype, device=x.device)
    bind(x.device.index)
    exchange = zeros(c.rows * c.TOKENS * blocks, x.device)
    tokens = tensor_map(x, (c.TOKENS, 64), 128)
    scale = tensor_map(f.scale.flatten(0, -2), (c.groups, c.rows), 0)
    zero = scale if f.zero is None else tensor_map(f.zero.flatten(0, -2), (c.groups, c.rows), 0)
    pointers = (f.words[0], f.words[-1], out, out if bias is None else bias, exchange, exchange if offsets is None else offsets)
    numbers = (f.experts or 1, M, f.N, K, *f.words[0].shape[-4:-2], f.scale.shape[-2], per)
    kernel(c, x.device.index)(
        blocks,
        32 * c.WARPS + 32,
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
    """Compiled and loaded at its first use in a process, which may not be while a graph is captured."""
    if torch.cuda.is_current_stream_capturing():
        raise DriverError(
            f"the kernel for {config.TOKENS} tokens at {config.BITS} bits is not loaded yet, and cannot be while a "
            "graph is captured; run the linear once with as many tokens before"
        )
    return Kernel(config.cubin()[0], "few_tokens", config.shared, device)


assert all(len(planes) <= 2 for planes in WORDS.values())
