"""Zeroed memory for programs that work on one tile together; every launch leaves it zero again.

Two launches that may run at the same time must not share it. Launches on one stream follow each other, so each stream
has its own. A captured graph replays on any stream, beside anything, so each capture has its own as well, for every
stream it uses; it comes from the graph's private memory and is zeroed by the graph itself, once a replay.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

_LEAST = 1 << 18  # int32 numbers: 1 MiB
_held: dict[tuple[int, int, int], Tensor] = {}


def zeros(count: int, device: torch.device) -> Tensor:
    """At least `count` int32 zeros on `device` for one launch on its current stream, which must leave them zero."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    place = index, _, capture = launch_place(device)
    held = _held.get(place)
    if held is None or held.numel() < count:
        if capture:
            # Nothing is left to capture for an older one: its graph keeps that memory, and nobody asks for it again.
            for key in [key for key in _held if key[2] not in (0, capture)]:
                del _held[key]
        held = torch.zeros(max(count, _LEAST), dtype=torch.int32, device=f"cuda:{index}")
        _held[place] = held
    return held


def launch_place(device: torch.device) -> tuple[int, int, int]:
    """Where a launch on the CUDA `device` goes now: device index, stream, and the capture in progress on it (or 0).

    Launches of one place follow each other; those of two need not, and a captured one may run again alone.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    stream = torch.cuda.current_stream(index).cuda_stream
    return index, stream, _capture_id(stream) if torch.cuda.is_current_stream_capturing() else 0


def _capture_id(stream: int) -> int:
    """The number CUDA gives to the capture in progress on a stream, unique in the process."""
    status, number = ctypes.c_int(), ctypes.c_ulonglong()
    nothing = ctypes.c_void_p()
    error = _driver().cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), nothing, nothing, nothing
    )
    if error:
        raise RuntimeError(f"cuStreamGetCaptureInfo_v2 failed with error {error}")
    return number.value


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
