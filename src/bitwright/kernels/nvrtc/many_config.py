"""Tiles and the division of work for the Hopper kernel of many tokens, as pure functions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from bitwright.kernels.fragments import COLUMNS, ROWS, WORDS, Kind
from bitwright.kernels.nvrtc.compile import Header, Macros
from bitwright.kernels.nvrtc.instructions import weight_header

SHARED_MEMORY = 227 << 10  # bytes of a block
ALIGNMENT = 1024  # of stages in shared memory
_WARPGROUPS = 2
_MOST_CUTS = 16  # pieces of a tile
_MOST_TOKENS = {128: 256, 256: 160}  # whose sums fit into registers beside the left operands, by rows of a tile
_LEAST_TOKENS, _PIECE = 64, 16
_LEAST_STAGES = 3
_REGISTERS = 200  # of a thread, beside which addresses find room
_CROWDED = 256 * 144  # numbers of a tile, beyond which left operands are made for 16 columns at a time
# What a tile takes, in microseconds, fitted to 600 timings of 4-bit weights on two H100s to within 3 % (dev/LOG.md).
# 64 columns, and each token of them, by rows of a tile and SPAN: the making of operands, then the products themselves.
_STEP = {
    (128, 1): ((0.258, 0.00159),),
    (128, 2): ((0.189, 0.00151), (0.081, 0.00220)),
    (256, 1): ((0.385, 0.00300),),
    (256, 2): ((0.291, 0.00329),),
}
_START = 0.85  # of a tile
_APART = 1.03  # pieces read what no others read at the same time
_PIECES, _PIECE_RATE = 3.8, 16200  # of a tile in pieces; numbers of one that are written or read in a microsecond


@dataclass(frozen=True)
class Config(Macros):
    """Macros of `many_tokens.cu`; there is what they mean. STAGES: None = as many as fit."""

    SOURCE = "many_tokens.cu"

    BITS: int
    FLOAT16: int
    ASYM: int
    GROUP: int
    BIAS: int
    TMA_OUT: int
    ROWS: int
    TOKENS: int
    SPAN: int = 1
    CHUNKS: int = 2
    CLUSTER: int = 2
    BAND: int = 16
    STAGES: int | None = None

    @property
    def piece(self) -> int:
        """Tokens of results that are written at a time."""
        return _PIECE if self.TOKENS % (2 * _PIECE) else 2 * _PIECE

    @property
    def stage_bytes(self) -> int:
        """Of a stage: tokens and words, then scales and zero points, two barriers."""
        words = self.ROWS // ROWS * self.SPAN * sum(WORDS[self.BITS]) * 4
        return self.TOKENS * self.SPAN * COLUMNS * 2 + words + (1 + self.ASYM) * self.groups * self.ROWS * 2 + 16

    @property
    def groups(self) -> int:
        """Scales of a row in a step."""
        return max(1, self.SPAN * COLUMNS // self.GROUP)

    @property
    def stages(self) -> int:
        """In shared memory."""
        return self.STAGES or (SHARED_MEMORY - self._beside) // self.stage_bytes

    @property
    def shared(self) -> int:
        """Bytes of shared memory, what alignment may take included."""
        return self._beside + self.stages * self.stage_bytes

    def steps(self, K: int) -> int:
        """Of a tile with K columns."""
        return -(-K // (self.SPAN * COLUMNS))

    @property
    def _beside(self) -> int:
        results = _WARPGROUPS * 2 * self.piece * 128 if self.TMA_OUT else 0
        return ALIGNMENT + results + 4 * _WARPGROUPS

    @property
    def headers(self) -> tuple[Header, ...]:
        """The products of so many tokens."""
        return (("instructions.cuh", weight_header(self.TOKENS, bool(self.FLOAT16))),)

    def clusters(self, M: int, N: int) -> int:
        """Tiles, each one of every block of a cluster, of M tokens by N outputs."""
        return -(-M // self.TOKENS) * -(-N // (self.ROWS * self.CLUSTER))


@dataclass(frozen=True)
class Division:
    """How `blocks` blocks share the tiles of clusters: the first `whole` one by one, the rest in `cuts` pieces each.

    items: tiles and pieces, which clusters take in turns. counters, numbers: int32 and float32 of workspace.
    """

    blocks: int
    whole: int
    cuts: int
    items: int
    counters: int
    numbers: int


@lru_cache(maxsize=4096)
def divide(M: int, N: int, K: int, config: Config, processors: int, cuts: int | None = None) -> Division:
    """Whole tiles in rounds over all clusters; what is left after full rounds is cut along K where that is faster.

    cuts: pieces of each of these, instead of what `estimate` makes of it.
    """
    clusters, tiles = processors // config.CLUSTER, config.clusters(M, N)
    steps = config.steps(K)
    left = tiles % clusters
    if cuts is None:
        cuts = min(range(1, _MOST_CUTS + 1), key=lambda cuts: estimate(M, N, K, config, processors, cuts))
    cuts = min(cuts, steps)
    if cuts == 1 or left == 0:
        return Division(min(tiles, clusters) * config.CLUSTER, tiles, 1, tiles, 0, 0)
    items = tiles - left + left * cuts
    return Division(
        blocks=min(items, clusters) * config.CLUSTER,
        whole=tiles - left,
        cuts=cuts,
        items=items,
        counters=left * config.CLUSTER * _WARPGROUPS,
        numbers=left * cuts * config.CLUSTER * config.ROWS * config.TOKENS,
    )


def estimate(M: int, N: int, K: int, config: Config, processors: int, cuts: int) -> float:
    """Microseconds that the product takes, with tiles that are left after full rounds in `cuts` pieces."""
    clusters, steps = processors // config.CLUSTER, config.steps(K)
    step = config.SPAN * max(a + b * config.TOKENS for a, b in _STEP[config.ROWS, config.SPAN])
    rounds, left = divmod(config.clusters(M, N), clusters)
    cuts = min(cuts, steps)
    time = rounds * (steps * step + _START)
    if left:
        time += -(-left * cuts // clusters) * (-(-steps // cuts) * step + _START) * (_APART if cuts > 1 else 1.0)
    if left and cuts > 1:
        time += _PIECES + (1 + cuts) * config.ROWS * config.TOKENS / _PIECE_RATE
    return time


@lru_cache(maxsize=4096)
def choose(M: int, kind: Kind, processors: int) -> Config:
    """The configuration that `estimate` finds fastest, for M > 0 and N > 0."""
    N, K = kind.N, kind.K
    config = Config(
        BITS=kind.bits,
        FLOAT16=int(kind.dtype == torch.float16),
        ASYM=int(kind.asymmetric),
        GROUP=_group(kind.group_size, K),
        BIAS=int(kind.bias),
        TMA_OUT=int(N % 8 == 0),
        ROWS=128,
        TOKENS=256,
    )
    return min(tiles(config, N, processors), key=lambda c: best(M, N, K, c, processors))


def best(M: int, N: int, K: int, config: Config, processors: int) -> float:
    """`estimate` for the pieces that `divide` chooses."""
    return estimate(M, N, K, config, processors, divide(M, N, K, config, processors).cuts)


def tiles(config: Config, N: int, processors: int) -> Iterator[Config]:
    """`config` with every tile that suits N outputs; of those that take as long the first is preferred."""
    for rows, most in _MOST_TOKENS.items():
        cluster = 2 if processors > 1 and rows < N else 1
        for tokens in range(most, _LEAST_TOKENS - 1, -_PIECE):
            yield tile(config, rows, tokens, cluster)


def tile(config: Config, rows: int, tokens: int, cluster: int) -> Config:
    """`config` with another tile: in steps of two column blocks where there is room for them."""
    size = rows * tokens
    chunks = 1 if size > _CROWDED else 2
    config = replace(config, ROWS=rows, TOKENS=tokens, CLUSTER=cluster, STAGES=None, CHUNKS=chunks, SPAN=2)
    # Of a thread: sums, and for every 64 rows two left operands, words, scales and zero points of a column block.
    scales = 2 * max(1, COLUMNS // config.GROUP) * (1 + config.ASYM)
    registers = size // 256 + (8 * chunks + config.BITS + scales) * (rows // 128)
    fits = registers <= _REGISTERS and config.stages >= _LEAST_STAGES and config.GROUP in (32, 64, 128)
    return config if fits else replace(config, SPAN=1)


def _group(group_size: int, K: int) -> int:
    """What stands for all groups that steps meet in the same way."""
    if group_size >= K or group_size % 128 == 0:
        return 128
    return group_size if group_size in (32, 64) else 192
