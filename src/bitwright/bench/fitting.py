"""What fits: bytes of models and caches, how many blocks can be timed at once, and over how many GPUs one is spread."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import psutil
import torch

from bitwright.bench.schemes import linear_scheme
from bitwright.bench.shapes import LinearShape, ModelShape
from bitwright.errors import BitwrightError
from bitwright.kernels.fragments import BAND, COLUMNS, ROWS
from bitwright.kernels.int8_fragments import STEP, padded
from bitwright.kernels.int8_ops import OUTLIER_STEP
from bitwright.kernels.sparse_fragments import block_bytes as sparse_block_bytes
from bitwright.scheme import UNQUANTIZED_BITS, Scheme

RESERVED = 0.06  # share of a GPU's memory left to activations, workspaces and CUDA itself
_BEYOND_CACHE = 150_000_000  # bytes of weights that no cache holds: three times the L2 of an H100
_GPUS = 64


@dataclass(frozen=True)
class Depth:
    """How many of a model's blocks are timed: all `many`, or `few` and `many`, whose difference is blocks alone."""

    few: int | None
    many: int
    layers: int

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of blocks to time."""
        return (self.many,) if self.few is None else (self.few, self.many)

    @property
    def method(self) -> str:
        """How `total` comes about, in words."""
        if self.few is None:
            return "whole model"
        return f"({self.many} blocks - {self.few} blocks) / {self.many - self.few} x {self.layers} + the rest"

    def block(self, seconds: Mapping[int, float]) -> float:
        """Seconds of one block from those of `counts`; of a whole model, its mean share."""
        if self.few is None:
            return seconds[self.many] / self.many
        return (seconds[self.many] - seconds[self.few]) / (self.many - self.few)

    def total(self, seconds: Mapping[int, float]) -> float:
        """Seconds of the model with all its layers."""
        return seconds[self.many] + (self.layers - self.many) * self.block(seconds)


def choose_depth(layers: int, block_bytes: int, asked: int | None, fits: bool) -> Depth:
    """All blocks if they fit and no fewer were asked for; else two depths.

    Either depth reads enough weights that none is found in a cache the next time. asked: the larger depth, or None.
    """
    if asked is not None and asked < 2:
        raise BitwrightError(f"{asked} layers cannot be told from the rest of a model: ask for 2 or more, or for all")
    if asked is None and fits:
        return Depth(None, layers, layers)
    few = max(1, math.ceil(_BEYOND_CACHE / block_bytes))
    many = 3 * few if asked is None else asked
    if many >= layers:
        return Depth(None, layers, layers)
    return Depth(min(few, many - 1), many, layers)


def choose_depths(layers: int, block_bytes: Mapping[str, int], asked: int | None, room: int) -> dict[str, Depth]:
    """The depth of every model by name: two depths of each are certain of their place, and in what is then left of
    `room` bytes the models become whole, in the order given. asked: as in `choose_depth`.
    """
    depths = {name: choose_depth(layers, size, asked, False) for name, size in block_bytes.items()}
    left = room - sum(depths[name].many * size for name, size in block_bytes.items())
    for name, size in block_bytes.items():
        more = (layers - depths[name].many) * size
        if asked is None and more <= left:
            depths[name] = choose_depth(layers, size, None, True)
            left -= more
    return depths


def block_bytes(shape: ModelShape, scheme: Scheme | None, dtype: torch.dtype) -> int:
    """Bytes of the linears of one block at `scheme` (None: `dtype`), as the GPU kernels hold them."""
    return sum(x.count * _linear_bytes(x, linear_scheme(x, shape, scheme), dtype) for x in shape.linears)


def model_bytes(shape: ModelShape, scheme: Scheme | None, dtype: torch.dtype) -> int:
    """Bytes of all weights."""
    return shape.layers * block_bytes(shape, scheme, dtype) + shape.other_weights * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Memory that can be used now, what torch keeps for later included, `RESERVED` left."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + kept
    else:
        free = psutil.virtual_memory().available
    return int(free * (1 - RESERVED))


def total_bytes(device: torch.device) -> int:
    """Memory of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def fits(nbytes: int, device: torch.device) -> bool:
    """Whether the device, were it empty, would hold so many bytes with `RESERVED` left."""
    return nbytes <= total_bytes(device) * (1 - RESERVED)


def rank_shape(shape: ModelShape, gpus: int) -> ModelShape | None:
    """What one of `gpus` holds under tensor parallelism: heads, the inner width and the vocabulary divided.

    None where heads or the inner width do not divide. Fewer kv heads than GPUs are repeated.
    """
    kv_divide = shape.kv_heads % gpus == 0 or gpus % shape.kv_heads == 0
    if shape.heads % gpus or shape.intermediate % gpus or not kv_divide:
        return None
    return replace(
        shape,
        heads=shape.heads // gpus,
        kv_heads=max(1, shape.kv_heads // gpus),
        intermediate=shape.intermediate // gpus,
        vocab=-(-shape.vocab // gpus),
    )


def largest_batch(shape: ModelShape, scheme: Scheme | None, dtype: torch.dtype, context: int, memory: int) -> int:
    """Sequences of `context` tokens whose caches fit into `memory` bytes beside the weights; below 1: not even they."""
    room = int(memory * (1 - RESERVED)) - model_bytes(shape, scheme, dtype)
    return room // (shape.kv_cache_values(1, context) * dtype.itemsize)


def fewest_gpus(
    shape: ModelShape, scheme: Scheme | None, dtype: torch.dtype, context: int, memory: int
) -> tuple[int, ModelShape]:
    """The smallest number of GPUs that divides the model and holds it beside the cache of one sequence, and a rank's
    share. BitwrightError if there is none up to 64."""
    for gpus in range(1, _GPUS + 1):
        rank = rank_shape(shape, gpus)
        if rank is not None and largest_batch(rank, scheme, dtype, context, memory) >= 1:
            return gpus, rank
    raise BitwrightError(
        f"{shape.name} with {context} tokens of cache does not fit {_GPUS} GPUs of {memory / 1e9:.1f} GB; give more "
        "memory or less context"
    )


def _linear_bytes(linear: LinearShape, scheme: Scheme | None, dtype: torch.dtype) -> int:
    N, K = linear.N, linear.K
    if scheme is None:
        return N * K * dtype.itemsize
    if scheme.activation_bits < UNQUANTIZED_BITS:
        return _int8_bytes(N, K, scheme, dtype)
    if not scheme.plain:
        return _unpacked_bytes(N, K, scheme, dtype)
    w, rows = scheme.weight, -(-N // BAND) * BAND
    per_group = dtype.itemsize * (1 if w.symmetric else 2)
    return rows * (-(-K // COLUMNS) * COLUMNS * w.bits // 8 + w.num_groups(K) * per_group)


def _int8_bytes(N: int, K: int, scheme: Scheme, dtype: torch.dtype) -> int:
    """As `kernels.split_cuda.SplitMma` holds it, 2:4 weights as `SparseMma`: codes, scale and row sum of every output,
    outliers, and where each column of the input belongs. Other GPUs than Hopper take a bit or two more for 2:4."""
    outliers = 0 if scheme.outliers is None else scheme.outliers.columns(K)
    columns, blocks = padded(K - outliers), -(-N // ROWS)
    if scheme.sparse:
        codes = blocks * (columns // STEP) * sparse_block_bytes(scheme.weight.bits)
    else:
        codes = columns * (blocks * ROWS // 2 if scheme.weight.bits == 4 else N)
    wide = -(-outliers // OUTLIER_STEP) * OUTLIER_STEP * dtype.itemsize
    return codes + N * (8 + wide) + 8 * K


def _unpacked_bytes(N: int, K: int, scheme: Scheme, dtype: torch.dtype) -> int:
    """As `kernels.split.SplitDequantized` holds it: codes side by side (3 bits: 32 at a time), or 16-bit values."""
    outliers = 0 if scheme.outliers is None else scheme.outliers.columns(K)
    B, w = K - outliers, scheme.weight
    row = 12 * -(-B // 32) if w.bits == 3 else -(-B * w.bits // 8)
    scales = 0 if w.bits == UNQUANTIZED_BITS else dtype.itemsize * w.num_groups(B)
    return N * (row + scales + outliers * dtype.itemsize) + 8 * K
