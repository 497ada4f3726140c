"""Linears that read one tensor quantize it once.

q, k and v, or gate and up, have equal splits and are called with the same tensor, one after the other. Which linears
belong together is not looked up in a model: `share` gives linears with equal splits one common memory, which keeps what
it quantized last and gives it to the next linear that comes with the same tensor in the same state.

*Same tensor.* A module flattens its input, so what arrives here is a new view at every call; what lives on is the
tensor viewed (`Tensor._base`). A result belongs to that object and is dropped when it dies, so what is remembered never
outlives the input. *Same state* is address, shape, strides, dtype and torch's count of changes in place; on a GPU also
the stream and the capture in progress (a result from outside of a graph, or from another graph, is not there when this
one is replayed). Inference tensors have no such count, so under `torch.inference_mode` nothing is remembered.

*The next linear.* torch does not count what a replayed graph or a kernel given a bare pointer writes. Therefore each
linear takes a result once: when it comes again with the same tensor, a new round begins and the input is quantized
anew.

Under torch.compile nothing is remembered: what is traced is one operator call for each linear. Merging equal ones is
left to the compiler; Inductor (torch 2.13, inference) does not do it.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import SchemeError
from bitwright.kernels.split_ops import quantize_activations
from bitwright.kernels.workspace import launch_place
from bitwright.scheme import UNQUANTIZED_BITS
from bitwright.split import InputSplit

Operands = tuple[Tensor | None, Tensor, int, int, float]  # base_idx, outlier_idx, bits, block, clip
_KEPT = 2  # inputs remembered: in a parallel block, attention's last linear comes between those that read the norm


@dataclass(frozen=True)
class Codes:
    """A quantized input of M tokens, padded with zeros (`split_ops.quantize_activations`).

    codes int8 [M, B padded to 128], scale float32 [M], zero int32 [M] (0 at 8 bits), outliers [M, O padded to 16] in
    the dtype of the input.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    outliers: Tensor


def share(split: InputSplit) -> SharedInput:
    """The input of one more linear, quantized together with those of all linears whose split is equal.

    Equal: the same columns in the same order, bits, block, clip and device. One call a linear. Raises SchemeError for
    activations that stay at 16 bits.
    """
    return SharedInput(_memory_of(split))


class SharedInput:
    """How one linear gets its input quantized; made by `share`."""

    def __init__(self, memory: _Memory) -> None:
        self._memory = memory

    @property
    def split(self) -> InputSplit:
        """The split, one object for all linears that share it."""
        return self._memory.split

    @property
    def operands(self) -> Operands:
        """The split as the operators of `split_ops` take it, for those that do more than quantize."""
        return self._memory.operands

    def codes(self, x: Tensor) -> Codes:
        """x [..., K] float32, bf16 or fp16 on the device of the split -> Codes of its M tokens."""
        rows = x.reshape(-1, x.shape[-1])
        if torch.compiler.is_compiling():
            return self._memory.quantized(rows)
        return self._memory.recall(rows, id(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return share, (self.split,)


class Alone:
    """The same for a linear that shares with nobody and remembers nothing, for measurements."""

    def __init__(self, split: InputSplit) -> None:
        self._memory = _Memory(split)

    def codes(self, x: Tensor) -> Codes:
        """x [..., K] -> Codes of its M tokens, quantized at every call."""
        return self._memory.quantized(x.reshape(-1, x.shape[-1]))

    @property
    def operands(self) -> Operands:
        """As in `SharedInput`."""
        return self._memory.operands

    def __reduce__(self) -> tuple[Any, ...]:
        return Alone, (self._memory.split,)


@dataclass(frozen=True)
class _Entry:
    alive: weakref.ref[Tensor]
    state: Hashable
    codes: Codes
    readers: set[int]


class _Entries(dict[int, _Entry]):
    """By the id of the tensor they belong to, oldest first. A class, because a plain dict has no weak references."""


class _Memory:
    """A split, its indices as kernels read them, and what each thread quantized last."""

    def __init__(self, split: InputSplit) -> None:
        B = len(split.base_idx)
        first = torch.equal(split.base_idx, torch.arange(B, device=split.base_idx.device))
        self.split = split
        self._base_idx = None if first else split.base_idx.to(torch.int32)
        self._outlier_idx = split.outlier_idx.to(torch.int32)
        self._of_thread = threading.local()

    @property
    def operands(self) -> Operands:
        s = self.split
        return self._base_idx, self._outlier_idx, s.bits, s.block, s.clip

    def quantized(self, rows: Tensor) -> Codes:
        """Codes of rows [M, K]."""
        return Codes(*quantize_activations(rows, *self.operands))

    def recall(self, rows: Tensor, reader: int) -> Codes:
        """The same, from memory if they are there and this reader did not take them yet."""
        if rows.is_inference() or type(rows) is not Tensor:
            return self.quantized(rows)
        base = rows if rows._base is None else rows._base
        state = rows.data_ptr(), rows.shape, rows.stride(), rows.dtype, rows._version, _place(rows.device)
        try:
            entries: _Entries = self._of_thread.entries
        except AttributeError:
            entries = self._of_thread.entries = _Entries()
        entry = entries.get(id(base))
        if entry is not None and entry.alive() is base and entry.state == state and reader not in entry.readers:
            entry.readers.add(reader)
            return entry.codes
        entries.pop(id(base), None)
        while len(entries) >= _KEPT:
            del entries[next(iter(entries))]
        codes = self.quantized(rows)
        entries[id(base)] = _Entry(weakref.ref(base, _forget(entries, id(base))), state, codes, {reader})
        return codes


def _forget(entries: _Entries, key: int) -> Callable[[object], None]:
    """What a dying tensor calls: it drops its entry, and keeps neither the entries nor itself alive until then."""
    of = weakref.ref(entries)

    def forget(_: object) -> None:
        here = of()
        if here is not None:
            here.pop(key, None)

    return forget


def _place(device: torch.device) -> tuple[int, int, int] | None:
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        return launch_place(device)


_memories: weakref.WeakValueDictionary[Hashable, _Memory] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def _memory_of(split: InputSplit) -> _Memory:
    if split.bits == UNQUANTIZED_BITS:
        raise SchemeError("an input whose activations stay at 16 bits has no codes; its scheme needs a4 or a8")
    columns = split.order.to("cpu", torch.int64).contiguous()
    digest = hashlib.sha256(columns.numpy().tobytes()).digest()
    key = digest, len(split.base_idx), split.bits, split.block, split.clip, split.order.device
    with _lock:
        memory = _memories.get(key)
        if memory is None:
            memory = _memories[key] = _Memory(split)
        return memory
