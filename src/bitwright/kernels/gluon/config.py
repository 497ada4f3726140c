"""Tiles, stages and the division of work for the Gluon kernel, as pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from hashlib import sha256
from math import isqrt
from typing import Any

import torch

from bitwright.kernels.fragments import Kind
from bitwright.kernels.gluon.asm import dequantize_asm

SHARED_MEMORY = 225 << 10  # bytes a program may use on Hopper, less what the compiler adds


@dataclass(frozen=True)
class Config:
    """Compile-time values of `kernel.fragment_gemm`.

    Problem: BITS of a code; KIND "bf16" or "fp16"; ASYM with zero points; BIAS with a bias; GROUP columns per scale;
    EXPERTS of a stack, padded to a power of two (0 = one weight), STACK as they are; SETTLED as in `kernel`.
    Tile: BM tokens, `BN` outputs, BK columns a step with GROUPS scales, NS stages (a multiple of KWG), GM token tiles a
    band.
    Warpgroups: NWG, of which KWG take the same rows and share the steps; REST * 64 rows each; REGISTERS of one that is
    not the first, MAXNREG of a thread on average.
    Ways: LATE multiplies scales onto the sums of a step, not onto weights; PEERS pieces of a tile are read at a time
    when they are added up; TMA_OUT writes results through shared memory; PER programs run on a processor.
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
    LATE: bool = False
    PEERS: int = 1
    PER: int = 1
    TMA_OUT: bool = False
    EXPERTS: int = 0
    STACK: int = 0
    SETTLED: bool = False

    def __repr__(self) -> str:
        # Triton makes part of a symbol name of it: letters, digits and underscores only.
        # The hash keeps a compiled kernel from outliving a change of its PTX in Triton's cache.
        digest = sha256(self.asm.encode()).hexdigest()[:8]
        return "_".join([f"{f.name}{getattr(self, f.name)}" for f in fields(self)] + [digest])

    @property
    def asm(self) -> str:
        """PTX of the dequantization."""
        return dequantize_asm(self.BITS, self.KIND, self.ASYM, self.LATE)[0]

    @property
    def constraints(self) -> str:
        """Its operand constraints."""
        return dequantize_asm(self.BITS, self.KIND, self.ASYM, self.LATE)[1]

    @property
    def BN(self) -> int:
        """Outputs a tile."""
        return 64 * self.REST * self.NWG // self.KWG

    @property
    def FEW(self) -> bool:
        """Whether the sums of a tile are so few numbers that words are carried from step to step (see `steps`)."""
        return self.BM <= _FEW

    @property
    def stages_that_fit(self) -> int:
        """Stages that shared memory holds beside the buffers for sums and results."""
        words = self.BN * self.BK * self.BITS // 8
        stage = words + self.BM * self.BK * 2 + self.BN * self.GROUPS * (4 if self.ASYM else 2) + 16
        given = self.NWG // self.KWG * (self.KWG - 1) * 64 * self.REST * self.BM * 4
        written = self.NWG * 64 * self.REST * min(self.BM, PIECE) * 2
        return (SHARED_MEMORY // self.PER - given - written) // stage


@dataclass(frozen=True)
class Division:
    """How `programs` programs share the tiles: the first `whole` one by one, the rest in runs of `per` steps.

    flags, partial_size: int32 and float32 numbers of workspace.
    """

    programs: int
    whole: int
    per: int
    flags: int
    partial_size: int


@lru_cache(maxsize=4096)
def divide(M: int, N: int, K: int, config: Config, processors: int) -> Division:
    """Equal shares of the work for every program.

    Of many tokens tiles go out whole, in rounds; what is left after the full rounds is cut into equal pieces along K
    if there are programs for them, since a piece costs its sums written and read. Of few tokens, whose sums are small,
    tiles go out whole where their rounds keep the programs busy. Otherwise what remains after full rounds, together
    with the last of these, is cut into equal runs of steps; a run may end one tile and begin another.
    """
    tiles = -(-M // config.BM) * -(-N // config.BN)
    nk = -(-K // config.BK)
    programs = processors * config.PER
    if not config.FEW:
        rounds, rest = divmod(tiles, programs)
        per = -(-nk // _cuts(rest, nk * config.BK, programs, config.BM * config.BN))
        if rest == 0 or per == nk:
            return Division(min(programs, tiles), tiles, 1, 0, 0)
        used = programs if rounds else -(-rest * nk // per)
        return Division(used, rounds * programs, per, *_workspace(config, used, rest))
    if _busy(tiles, programs):
        return Division(min(programs, tiles), tiles, 1, 0, 0)
    whole = max(tiles // programs - 1, 0) * programs
    units = (tiles - whole) * nk
    programs = min(programs, units)
    return Division(programs, whole, -(-units // programs), *_workspace(config, programs, tiles - whole))


def _cuts(rest: int, K: int, programs: int, numbers: int) -> int:
    """Pieces of each of the `rest` last tiles of so many numbers: more are shorter, but the last has more to add up."""
    return max(1, min(programs // max(rest, 1), isqrt(K * _PIECE_NUMBERS // numbers)))


def _rounds(M: int, N: int, K: int, tiles: Mapping[str, Any], processors: int) -> float:
    """Time of a product of many tokens in columns of a tile of `_WIDE`, by measurements on one H100 (dev/LOG.md)."""
    BM, BN = tiles["BM"], 64 * tiles["REST"] * tiles["NWG"]
    rounds, rest = divmod(-(-M // BM) * -(-N // BN), processors)
    cuts = _cuts(rest, K, processors, BM * BN)
    last = 0.0 if rest == 0 else K / cuts + (cuts > 1) * cuts * BM * BN / _PIECE_NUMBERS
    return (rounds * K + last) * (1.0 if BM * BN > 1 << 14 else _NARROW_COST)


def estimate(M: int, N: int, K: int, processors: int) -> float:
    """Microseconds of a product of more than 128 tokens with 4-bit weights, fitted to timings on one H100."""
    return _COLUMN_TIME * min(_rounds(M, N, K, t, processors) for t in _MANY) + _LAUNCH


def _busy(tiles: int, programs: int) -> bool:
    """Whether rounds of whole tiles leave hardly any program idle."""
    return tiles > _FULL * -(-tiles // programs) * programs


def divide_experts(T: int, N: int, config: Config, processors: int) -> Division:
    """The division of a grouped product of T rows: its runs are found on the device, which knows the tiles."""
    programs = processors * config.PER
    most = min(T, T // config.BM + config.STACK) * -(-N // config.BN)
    return Division(programs, 0, 1, *_workspace(config, programs, most))


def _workspace(config: Config, programs: int, streamed: int) -> tuple[int, int]:
    return streamed * config.NWG // config.KWG, 2 * programs * config.BN * config.BM


@lru_cache(maxsize=4096)
def choose(M: int, kind: Kind, processors: int) -> Config:
    """The configuration for a problem, from measurements on one H100 (dev/LOG.md)."""
    if M <= 128:
        tiles = _few(M, kind.N * kind.K)
    else:
        tiles = min(_MANY, key=lambda t: _rounds(M, kind.N, kind.K, t, processors))
    return _finish(tiles, M, kind)


@lru_cache(maxsize=4096)
def choose_experts(T: int, E: int, kind: Kind, settled: bool = False) -> Config:
    """The configuration of a grouped product of T rows over E experts, for an even load."""
    M = -(-T // E)
    tiles = _few(M, E * kind.N * kind.K) if M <= 128 else _TALL
    config = _finish(tiles, M, kind)
    return replace(config, EXPERTS=max(32, 1 << (E - 1).bit_length()), STACK=E, SETTLED=settled)


# NWG warpgroups, KWG of them on the same rows, REST * 64 rows each, PER programs a processor; BM None = the least that
# holds the tokens. _STREAM leaves registers free on each processor, for a small kernel before or after it.
_STREAM = {"NWG": 2, "KWG": 2, "REST": 1, "BM": None, "BK": 128, "NS": 8, "REGISTERS": 96, "MAXNREG": 72, "PER": 2}
_SHORT = {**_STREAM, "NS": 6}  # where a program has hardly more steps
_SOME = {**_STREAM, "NS": 10, "REGISTERS": 160, "MAXNREG": 128, "PER": 1}
_MORE = {**_STREAM, "NWG": 4, "REGISTERS": 112, "MAXNREG": 96, "PER": 1}
_NARROW = {"NWG": 2, "KWG": 1, "REST": 1, "BM": 128, "BK": 128, "NS": 4, "REGISTERS": 160, "MAXNREG": 168, "PER": 1}
_WIDE = {**_NARROW, "BM": 256, "BK": 64, "NS": 5, "REGISTERS": 232}
_TALL = {**_NARROW, "REST": 2, "REGISTERS": 232}
_MANY = (_WIDE, _TALL, _NARROW)
_FEW = 64  # tokens whose sums are no more numbers than the weights they come from
_FEW_GROUPS = 16  # the same where a step has several groups, each with sums of its own
_PIECE_NUMBERS = 64  # sums of a piece written and read in the time that a column of the tile takes to be multiplied
_NARROW_COST = 0.59  # of a tile of half the size
_COLUMN_TIME = 0.0103  # microseconds of a column of a tile of `_WIDE`
_LAUNCH = 2.0  # microseconds of any product
_SMALL_WEIGHT = 32 << 20  # numbers in a weight
_SOME_WEIGHT = 80 << 20
_FULL = 0.96  # share of the time that programs must be busy with whole tiles
PIECE = 32  # tokens that go to memory through shared memory at a time


def _few(M: int, weights: int) -> dict[str, Any]:
    """Tiles for up to 128 tokens of a weight (or all experts) of so many numbers."""
    if M <= 32:
        return _STREAM if weights > _SMALL_WEIGHT else _SHORT
    return _NARROW if M > _FEW else _SOME if weights <= _SOME_WEIGHT else _MORE


def _finish(tiles: dict[str, Any], M: int, kind: Kind) -> Config:
    group_size, K = kind.group_size, kind.K
    BM = tiles["BM"] or next(b for b in (8, 16, 32, 64, 128) if b >= M or b == 128)
    BK, NS = tiles["BK"], tiles["NS"]
    cut = group_size < K and group_size % 128 and 128 % group_size
    crowded = tiles["REST"] == 2 and group_size < 128  # more scales of a step than registers are left for
    if kind.bits == 8 or cut or crowded:
        BK, NS = 64, NS * BK // 64  # a step must not cut a group; of 8 bits, 64 columns are as many bytes as 128 of 4
    groups = 1 if group_size >= K else max(1, BK // group_size)
    config = Config(
        BITS=kind.bits,
        KIND="bf16" if kind.dtype == torch.bfloat16 else "fp16",
        ASYM=kind.asymmetric,
        BIAS=kind.bias,
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
        PER=tiles["PER"],
        LATE=BM <= (_FEW if groups == 1 else _FEW_GROUPS) and groups * 64 <= BK,
        PEERS=4 if BM <= 16 else 2 if BM <= 32 else 1,
        TMA_OUT=BM >= 128 and kind.N % 8 == 0,
    )
    stages = min(NS, config.stages_that_fit)
    return replace(config, NS=stages - stages % config.KWG)  # a stage is always the same warpgroup's
