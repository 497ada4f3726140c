"""Tile sizes of the int8 product, a pure function of the problem like those of `config`.

A tile is BN outputs × BM tokens and walks over the base columns in steps of BK, which divides their padded number, and
over the outliers in steps of `outlier_step`. Few tokens: reading the weight is what takes time, and `split_k` cuts the
steps of both kinds among programs until every multiprocessor has work. Many tokens: a tile of 256 tokens keeps the
tensor cores busiest, one of 128 wastes less where few tiles fill the last round of programs. (Hopper GPUs come here for
few tokens or few tiles only, where `gluon.int8` runs.)
"""

from __future__ import annotations

from functools import lru_cache

from bitwright.kernels.int8_fragments import STEP, padded
from bitwright.kernels.triton.config import MAX_SPLIT, Config, shared_memory

BK = STEP
_START = 5  # what filling a program's pipeline and adding up its part costs, in steps of BK: an estimate
_WIDE = 256
_NARROW_COST = 1.125  # time of a product on tiles of 128 tokens over that on tiles of 256: an estimate
_MOST_PARTS = 4  # of a tile of 128 tokens, whose part is as much traffic as 16 steps of its operands


@lru_cache(maxsize=4096)
def choose(M: int, N: int, B: int, O: int, bits: int, capability: tuple[int, int], processors: int) -> Config:
    """Tiles for M tokens of B codes and O outliers times a weight [N, B + O], its codes of 4 or 8 bits, on a GPU with
    so many multiprocessors."""
    BM = _tokens(M, N, capability, processors)
    BN = 64 if N <= 64 else 128
    tiles = -(-N // BN) * -(-M // BM)
    OK = outlier_step(O, BM)
    split = _split(tiles, BM, padded(B) // BK + (-(-O // OK) if OK else 0), processors)
    return Config(BN, BM, BK, 4 if BN == 64 else 8, _stages(BN, BM, bits, capability), split)


@lru_cache(maxsize=4096)
def choose_end(M: int, N: int, O: int) -> Config:
    """Tiles for the end alone, of sums [N, M] that another product made; BK: outliers a step.

    Few tokens: the outlier columns of the weight are most of what is read, so many of them are on their way at once.
    Many: a larger tile reads both operands of the outliers' product less often.
    """
    BM = 16 if M <= 16 else 32 if M <= 32 else 64 if M <= 64 else 128
    if BM == 128:
        return Config(128, BM, 64 if O > 32 else max(16, outlier_step(O, BM)), 8, 3)
    widest = 128 if BM <= 32 else 64
    return Config(64, BM, next(step for step in (16, 32, 64, 128) if step >= min(O, widest)), 4, 3)


def outlier_step(O: int, BM: int) -> int:
    """Outlier columns that one step of the second product takes, 0 if there are none.

    At 16 bits, 32 of them are as much to read as 128 base columns at 4 bits: few tokens make steps of one size.
    """
    return 0 if O == 0 else 16 if O <= 16 else 32 if O <= 32 or BM <= 64 else 64


def _tokens(M: int, N: int, capability: tuple[int, int], processors: int) -> int:
    """BM: the smallest power of two that holds up to 64 tokens, else the one whose rounds of programs end first."""
    for BM in (16, 32, 64):
        if M <= BM:
            return BM
    if capability[0] != 9:  # others add up in registers of the multiplying warps alone
        return 128

    def rounds(BM: int) -> int:
        return -(-(-(-N // 128) * -(-M // BM)) // processors)

    return _WIDE if 2 * rounds(_WIDE) <= _NARROW_COST * rounds(128) else 128


def _stages(BN: int, BM: int, bits: int, capability: tuple[int, int]) -> int:
    """As many steps in flight as fit, up to 6, 4 or 3; half of the memory for small tiles: two programs share it."""
    room = shared_memory(capability) - 8 * 1024
    if BM <= 64:
        room //= 2
    most = 6 if BM <= 64 else 4 if BM < _WIDE else 3
    return max(2, min(most, room // (BM * BK + BN * BK * bits // 8)))


def _split(tiles: int, BM: int, steps: int, processors: int) -> int:
    """How many programs share the steps of a tile: the number with which the busiest multiprocessor is done first."""
    limit = MAX_SPLIT if BM <= 64 else _MOST_PARTS if BM < _WIDE and tiles < processors else 1

    def cost(split: int) -> int:
        return -(-tiles * split // processors) * (-(-steps // split) + _START)

    return min(range(1, min(limit, max(1, steps // 2)) + 1), key=cost)
