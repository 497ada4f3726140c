"""Tiles, stages and the division of work for the Hopper kernel, as pure functions."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from hashlib import sha256
from typing import Any

import torch

from bitwright.kernels.gluon.asm import dequantize_asm

_SHARED_MEMORY = 225 << 10  # bytes a program may use on Hopper, less what the compiler adds


@dataclass(frozen=True)
class Config:
    """Compile-time values of `kernel.fragment_gemm`.

    Problem: BITS of a code; KIND "bf16" or "fp16"; ASYM with zero points; BIAS with a bias; GROUP columns per scale;
    EXPERTS of a stack, padded to a power of two (0 = one weight), STACK as they are.
    Tile: BM tokens, `BN` outputs, BK columns a step with GROUPS scales, NS stages, GM token tiles a band.
    Warpgroups: NWG, of which KWG take the same rows and share the steps; REST * 64 rows each; REGISTERS of one that is
    not the first, MAXNREG of a thread on average.
    Ways: FLAGGED adds pieces of tiles through 8-byte words that carry a flag, PEERS of them at a time, for few tokens;
    TMA_OUT writes results through shared memory; OVERLAP lets the next launch begin early.
    """

    BITS: int
    KIND: str
    ASYM: bool
    BIAS: bool
    GROUP: int
    GROUPS: int
    BM: int
    BK: int
    NWG: int
    REST: int
    NS: int
    GM: int
    REGISTERS: int
    MAXNREG: int
    KWG: int = 1
    FLAGGED: bool = False
    PEERS: int = 4
    TMA_OUT: bool = False
    EXPERTS: int = 0
    STACK: int = 0
    OVERLAP: bool = False

    def __repr__(self) -> str:
        # Triton makes part of a symbol name of it: letters, digits and underscores only.
        # The hash keeps a compiled kernel from outliving a change of its PTX in Triton's cache.
        digest = sha256(self.asm.encode()).hexdigest()[:8]
        return "_".join([f"{f.name}{getattr(self, f.name)}" for f in fields(self)] + [digest])

    @property
    def asm(self) -> str:
        """PTX of the dequantization."""
        return dequantize_asm(self.BITS, self.KIND, self.ASYM)[0]

    @property
    def constraints(self) -> str:
        """Its operand constraints."""
        return dequantize_asm(self.BITS, self.KIND, self.ASYM)[1]

    @property
    def BN(self) -> int:
        """Outputs a tile."""
        return 64 * self.REST * self.NWG // self.KWG

    @property
    def stages_that_fit(self) -> int:
        """Stages that shared memory holds beside the buffers for sums and results."""
        words = self.BN * self.BK * self.BITS // 8
        stage = words + self.BM * self.BK * 2 + self.BN * self.GROUPS * (4 if self.ASYM else 2) + 16
        given = self.NWG // self.KWG * (self.KWG - 1) * 64 * self.REST * self.BM * 4
        written = self.NWG * 64 * self.REST * min(self.BM, PIECE) * 2
        return (_SHARED_MEMORY - given - written) // stage


@dataclass(frozen=True)
class Division:
    """How `programs` programs share the tiles: the first `whole` one by one, the rest in runs of `per` steps.

    flags, partial_size: int32 and float32 numbers (8-byte words with FLAGGED) of workspace.
    """

    programs: int
    whole: int
    per: int
    flags: int
    partial_size: int


@lru_cache(maxsize=4096)
def divide(M: int, N: int, K: int, config: Config, processors: int) -> Division:
    """Equal shares of the work for every processor, one program each.

    Full rounds of tiles go out whole. What remains after them, together with the last full round, is cut into equal
    runs of steps, which costs a partial result written and read for each cut. Never more programs than processors: a
    program that waits for another one's partial result must not keep it from running.
    """
    tiles = -(-M // config.BM) * -(-N // config.BN)
    nk = -(-K // config.BK)
    rounds, rest = divmod(tiles, processors)
    if rest == 0 or rest > _FULL * processors:
        return Division(min(processors, tiles), tiles, 1, 0, 0)
    whole = max(rounds - 1, 0) * processors
    units = (tiles - whole) * nk
    programs = min(processors, units)
    return Division(programs, whole, -(-units // programs), *_workspace(config, programs))


def divide_experts(config: Config, processors: int) -> Division:
    """The division of a grouped product: its runs are found on the device, where the number of tiles is known."""
    return Division(processors, 0, 1, *_workspace(config, processors))


def _workspace(config: Config, programs: int) -> tuple[int, int]:
    return programs * config.NWG // config.KWG, programs * config.BN * config.BM


@lru_cache(maxsize=4096)
def choose(
    M: int,
    N: int,
    K: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    asymmetric: bool,
    bias: bool,
    processors: int,
) -> Config:
    """The configuration for a problem, from measurements on one H100 (dev/LOG.md)."""
    tiles = _decode(N * K) if M <= 32 else _middle(M) if M <= 128 else None
    if tiles is None:
        one_wave = -(-M // 128) * -(-N // 128)
        if one_wave <= processors and one_wave > _FULL * processors:
            tiles = _NARROW
        else:
            tiles = _WIDE if M > 1024 or -(-M // 256) * 2 == -(-M // 128) else _TALL
    config = _finish(tiles, M, N, K, bits, group_size, dtype, asymmetric, bias)
    # Programs that wait for each other must have the processors for themselves (`sums.collect`).
    return replace(config, OVERLAP=divide(M, N, K, config, processors).partial_size == 0)


@lru_cache(maxsize=4096)
def choose_experts(
    T: int, E: int, N: int, K: int, bits: int, group_size: int, dtype: torch.dtype, asymmetric: bool
) -> Config:
    """The configuration of a grouped product of T rows over E experts, for an even load."""
    M = -(-T // E)
    tiles = _STREAM if M <= 32 else _middle(M) if M <= 128 else _TALL
    config = _finish(tiles, M, N, K, bits, group_size, dtype, asymmetric, False)
    return replace(config, EXPERTS=max(32, 1 << (E - 1).bit_length()), STACK=E)


# NWG warpgroups, KWG of them on the same rows, REST * 64 rows each; BM None = the least that holds the tokens.
_SMALL = {
    "NWG": 2,
    "KWG": 2,
    "REST": 1,
    "BM": None,
    "BK": 128,
    "NS": 8,
    "REGISTERS": 96,
    "MAXNREG": 80,
    "FLAGGED": True,
}
_STREAM = {**_SMALL, "NWG": 4, "NS": 12, "REGISTERS": 104, "MAXNREG": 96}
_NARROW = {"NWG": 2, "KWG": 1, "REST": 1, "BM": 128, "BK": 128, "NS": 4, "REGISTERS": 160, "MAXNREG": 168}
_WIDE = {**_NARROW, "BM": 256, "BK": 64, "NS": 5, "REGISTERS": 232}
_TALL = {**_NARROW, "REST": 2, "REGISTERS": 232}
_SMALL_WEIGHT = 24 << 20  # weights up to which half of a processor per launch, and so two launches at a time, is best
_FULL = 0.93  # share of the processors that a round of whole tiles must keep busy
PIECE = 32  # tokens that go to memory through shared memory at a time


def _decode(weights: int) -> dict[str, Any]:
    return _SMALL if weights <= _SMALL_WEIGHT else _STREAM


def _middle(M: int) -> dict[str, Any]:
    return {**_NARROW, "BM": None, "NS": 5} if M <= 64 else _NARROW


def _finish(
    tiles: dict[str, Any],
    M: int,
    N: int,
    K: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    asymmetric: bool,
    bias: bool,
) -> Config:
    BM = tiles["BM"] or next(b for b in (8, 16, 32, 64, 128) if b >= M or b == 128)
    BK, NS = tiles["BK"], tiles["NS"]
    cut = group_size < K and group_size % 128 and 128 % group_size
    crowded = tiles["REST"] == 2 and group_size < 128  # more scales of a step than registers are left for
    if bits == 8 or cut or crowded:
        BK, NS = 64, NS * BK // 64  # a box of TMA holds 256 words in a row, and a step must not cut a group
    groups = 1 if group_size >= K else max(1, BK // group_size)
    config = Config(
        BITS=bits,
        KIND="bf16" if dtype == torch.bfloat16 else "fp16",
        ASYM=asymmetric,
        BIAS=bias,
        GROUP=group_size,
        GROUPS=groups,
        BM=BM,
        BK=BK,
        NWG=tiles["NWG"],
        KWG=tiles["KWG"],
        REST=tiles["REST"],
        NS=NS,
        GM=16,
        REGISTERS=tiles["REGISTERS"],
        MAXNREG=tiles["MAXNREG"],
        FLAGGED=tiles.get("FLAGGED", False),
        TMA_OUT=BM >= 128 and N % 8 == 0,
    )
    return replace(config, NS=min(NS, config.stages_that_fit))
