"""Tile sizes as a pure function of the problem: nothing is tried out at run time, and a choice can be printed.

A kernel multiplies a tile of BN outputs × BM tokens and walks over K in steps of BK. The weight is the left operand, so
a tensor core instruction spans 64 outputs and as few tokens as there are; a warp owns 16 outputs, or 32. Few tokens:
the time is that of reading the weight, and `split_k` cuts K among programs until every multiprocessor has work. Many
tokens: the tile grows until a weight, once unpacked, meets 256 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

MAX_SPLIT = 16
_START = 5  # what filling a program's pipeline and adding up its part costs, in steps of BK: an estimate
_SHARED = {(7, 5): 64, (8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (10, 3): 227}
_SHARED_ELSEWHERE = 99  # KiB a program may use


@dataclass(frozen=True)
class Config:
    """BN outputs × BM tokens a tile, BK inputs a step, warps a program, stages in flight, programs that share K."""

    BN: int
    BM: int
    BK: int
    warps: int
    stages: int
    split_k: int = 1


@lru_cache(maxsize=4096)
def config(M: int, N: int, K: int, bits: int, capability: tuple[int, int], processors: int) -> Config:
    """Tiles for x [M, K] times a weight [N, K] of `bits`, on a GPU with so many multiprocessors."""
    BM = _tokens(M, N, capability, processors)
    BN = 64 if N <= 64 else 128
    BK = 64 if BM >= 128 or K <= 64 else 128
    warps = 4 if BN == 64 else 8
    stages = _stages(BN, BM, BK, bits, capability)
    split = _split(-(-N // BN) * -(-M // BM), BM, -(-K // BK), processors)
    return Config(BN, BM, BK, warps, stages, split)


@lru_cache(maxsize=4096)
def expert_config(T: int, E: int, N: int, K: int, bits: int, capability: tuple[int, int], processors: int) -> Config:
    """Tiles for T tokens spread over E experts [N, K]: those of a weight that meets an even share of the tokens."""
    share = -(-T // E)
    BM = min(_tokens(share, N, capability, processors), 128)
    BN = 64 if N <= 64 else 128
    BK = 64 if BM >= 128 or K <= 64 else 128
    tiles = -(-N // BN) * max_tiles(T, E, BM)
    split = _split(tiles, BM, -(-K // BK), processors)
    return Config(BN, BM, BK, 4 if BN == 64 else 8, _stages(BN, BM, BK, bits, capability), split)


def max_tiles(T: int, E: int, BM: int) -> int:
    """Tiles of BM tokens that T tokens of E experts fill at most, none shared by two experts."""
    return min(T, T // BM + E)


def shared_memory(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that one program may use."""
    return _SHARED.get(capability, _SHARED_ELSEWHERE) * 1024


def _tokens(M: int, N: int, capability: tuple[int, int], processors: int) -> int:
    """BM: the smallest power of two that holds all tokens, up to 256 where there are enough tiles of that size."""
    for BM in (16, 32, 64):
        if M <= BM:
            return BM
    tiles = -(-N // 128) * -(-M // 256)
    return 256 if capability[0] >= 9 and tiles >= processors else 128


def _stages(BN: int, BM: int, BK: int, bits: int, capability: tuple[int, int]) -> int:
    """As many steps in flight as fit, 6 at most; half of the memory for small tiles, so that two programs share it."""
    room = shared_memory(capability) - 8 * 1024
    if BM <= 64:
        room //= 2
    return max(2, min(6 if BM <= 64 else 4, room // (BM * BK * 2 + BN * BK * bits // 8)))


def _split(tiles: int, BM: int, steps: int, processors: int) -> int:
    """How many programs share the K of a tile: the number with which the busiest multiprocessor is done first.

    Parts of large tiles cost more traffic than the weight itself, so those are shared only where half of the
    multiprocessors would have nothing.
    """
    limit = MAX_SPLIT if BM <= 64 else 2 if 2 * tiles <= processors else 1

    def cost(split: int) -> int:
        return -(-tiles * split // processors) * (-(-steps // split) + _START)

    return min(range(1, min(limit, max(1, steps // 2)) + 1), key=cost)
