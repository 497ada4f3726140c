"""CUDA's driver through its C interface: kernels from cubins, tensor maps for TMA, launches on torch's stream."""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import BitwrightError

# Swizzles of tensor maps, by the bytes of a row of the box; 0: none.
_SWIZZLES = {0: 0, 64: 2, 128: 3}
_TYPES = {1: 0, 2: 1, 8: 4}  # unsigned integers of tensor maps, by bytes
_PROMOTE_TO_256 = 3  # bytes that L2 fetches at least
_DYNAMIC_SHARED_MEMORY = 8  # attribute of a function
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64
_OUT_OF_MEMORY = 2
_PROGRAMMATIC_SERIALIZATION = 6  # attribute of a launch


class DriverError(BitwrightError, RuntimeError):
    """CUDA's driver refuses; a RuntimeError as well, as torch's own errors of a device are."""


class TensorMap(ctypes.Structure):
    """CUtensorMap, as it is passed by value."""

    _fields_ = (("opaque", ctypes.c_uint64 * (_MAP_BYTES // 8)),)


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


class Kernel:
    """A function of a cubin on one device.

    shared: bytes of dynamic shared memory of a block.
    """

    def __init__(self, cubin: bytes, name: str, shared: int, device: int) -> None:
        self._shared, self._device = shared, device
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            bind(device)
            _call("cuModuleLoadData", ctypes.byref(self._module), cubin)
            _call("cuModuleGetFunction", ctypes.byref(self._function), self._module, name.encode())
            _call("cuFuncSetAttribute", self._function, _DYNAMIC_SHARED_MEMORY, shared)

    def __call__(self, blocks: int, threads: int, arguments: list[Any], dependent: bool = False) -> None:
        """arguments: ctypes values; they are copied before the call returns.

        dependent: programmatic dependent launch; the kernel begins when all blocks of the one before it allow that, and
        must wait itself (griddepcontrol) before it touches what other kernels write or read.
        """
        addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        attribute = _Attribute(_PROGRAMMATIC_SERIALIZATION, 0, 1)
        with torch.cuda.device(self._device):
            bind(self._device)
            stream = torch.cuda.current_stream(self._device).cuda_stream
            config = _LaunchConfig(
                blocks, 1, 1, threads, 1, 1, self._shared, stream, ctypes.pointer(attribute), int(dependent)
            )  # fmt: skip
            _call("cuLaunchKernelEx", ctypes.byref(config), self._function, addresses, None)


def loading(what: str) -> None:
    """Before a kernel for `what` is compiled and loaded: DriverError while a graph is captured."""
    if torch.cuda.is_current_stream_capturing():
        raise DriverError(
            f"the kernel for {what} is not loaded yet, and cannot be while a graph is captured; run the linear once "
            "with as many tokens before"
        )


def tensor_map(matrix: Tensor, box: tuple[int, int], swizzle: int) -> TensorMap:
    """Of a contiguous matrix at a multiple of 16 bytes, with rows of as many; box (rows, columns).

    swizzle: bytes of a row of the box in shared memory, 64 or 128; 0: rows follow each other as they are. The thread
    must have a context (`bind`).
    """
    return _tensor_map(matrix.data_ptr(), matrix.shape[0], matrix.shape[1], matrix.element_size(), box, swizzle)


@lru_cache(maxsize=4096)
def _tensor_map(address: int, rows: int, columns: int, size: int, box: tuple[int, int], swizzle: int) -> TensorMap:
    # A map says where and what, not what is there: one for the same arguments stays right for ever.
    held = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
    aligned = -(-ctypes.addressof(held) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
    _call(
        "cuTensorMapEncodeTiled",
        ctypes.c_void_p(aligned),
        _TYPES[size],
        2,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(columns * size),
        (ctypes.c_uint32 * 2)(box[1], box[0]),
        (ctypes.c_uint32 * 2)(1, 1),
        0,  # not interleaved
        _SWIZZLES[swizzle],
        _PROMOTE_TO_256,
        0,  # zeros beyond the edges
    )
    result = TensorMap()
    ctypes.memmove(ctypes.addressof(result), aligned, _MAP_BYTES)
    return result


def bind(device: int) -> None:
    """Makes torch's context of the device this thread's, where the thread has none yet."""
    context = ctypes.c_void_p()
    _call("cuCtxGetCurrent", ctypes.byref(context))
    if not context.value:
        number = ctypes.c_int()
        _call("cuDeviceGet", ctypes.byref(number), device)
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
        _call("cuCtxSetCurrent", context)


def _call(function: str, *arguments: Any) -> None:
    if result := getattr(_driver(), function)(*arguments):
        said = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(said))
        text = f"CUDA's driver: {function} failed: {(said.value or b'unknown').decode()} ({result})"
        raise torch.OutOfMemoryError(text) if result == _OUT_OF_MEMORY else DriverError(text)


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
