"""Kernels in CUDA C++ without a GPU: the same sources compiled for the CPU, with other headers for the instructions.

`few_tokens`, `many_tokens` and `sparse_int8` include hopper.cuh, half.cuh, mma.cuh and instructions.cuh for whatever
only a GPU does; the files of these names beside this one do it on the CPU, thread by thread (`threads.h`). `emulated`
makes a launcher's own Python code launch them with CPU tensors, so its division of work and its maps are tried as well.
What is not shown: speed; the memory model of a GPU beyond waits (what one block writes, all others see at once); left
operands of a product that are overwritten too early; and whether PTX means what these headers say.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from tempfile import mkdtemp
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

from bitwright.kernels.nvrtc.compile import Macros

_HERE = Path(__file__).parent
_MOST_BLOCKS = 8  # of a cluster, that `threads.cpp` has memory for
# What a block shares, and what stands for it here.
_DYNAMIC = ("extern __shared__ unsigned char memory[];", "unsigned char* const memory = emulated::here->in->memory;")
_NUMBER = ("__shared__ int found;", "int& found = emulated::here->in->number;")
# Products write sums later: where those were, nothing else may be (-fstack-reuse).
_OPTIONS = ("-std=c++17", "-O2", "-w", "-ffp-contract=off", "-fstack-reuse=none", "-fPIC")


class TensorMap(ctypes.Structure):
    """As hopper.cuh here reads it: 128 bytes."""

    _fields_ = (
        ("address", ctypes.c_void_p),
        *((name, ctypes.c_uint64) for name in ("rows", "columns", "size", "box_rows", "box_columns", "swizzle")),
        ("unused", ctypes.c_uint64 * 9),
    )


class Fault(AssertionError):
    """A thread did what it must not, or all wait for each other."""


@contextmanager
def emulated(
    launcher: ModuleType,
    early: Sequence[Tensor],
    processors: int = 8,
    seed: int = 0,
    change: tuple[str, str] | None = None,
    late: Sequence[Tensor] = (),
) -> Iterator[None]:
    """Within, `launcher` runs its kernel on CPU tensors, on a GPU of so many processors.

    early: what no earlier launch writes; TMA may read everything else after a wait for launches alone. late: what holds
    NaN until a thread of the launch has waited. seed: of the order in which blocks, threads and copies take turns.
    change: something in the sources, and what stands there instead.
    """

    def kernel(config: Any, device: int | None) -> Any:
        def launch(blocks: int, threads: int, arguments: list[Any], dependent: bool = False) -> None:
            cluster = getattr(config, "CLUSTER", 1)
            assert config.shared <= 227 << 10 and blocks % cluster == 0 and cluster <= _MOST_BLOCKS
            _run(
                _compiled(config, change), config, blocks, threads, arguments, early if dependent else None, late, seed
            )

        return launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "bind", lambda device: None)
        patch.setattr(launcher, "tensor_map", _tensor_map, raising=False)
        patch.setattr(launcher, "machine", lambda device: ((9, 0), processors), raising=False)
        patch.setattr(launcher, "kernel", kernel)
        yield


def missing() -> str | None:
    """Why nothing can be emulated, or None; found out by compiling something small."""
    if not shutil.which("g++"):
        return "needs g++"
    probe = "#include <ucontext.h>\n_Float16 half = 1;\n"
    command = ["g++", *_OPTIONS, "-x", "c++", "-c", "-o", os.devnull, "-"]
    done = subprocess.run(command, input=probe, capture_output=True, text=True, check=False)
    return f"needs a g++ with _Float16 and ucontext: {done.stderr[:200]}" if done.returncode else None


def _tensor_map(matrix: Tensor, box: tuple[int, int], swizzle: int) -> TensorMap:
    assert matrix.is_contiguous() and matrix.ndim == 2 and matrix.data_ptr() % 16 == 0
    assert matrix.shape[1] * matrix.element_size() % 16 == 0 and max(box) <= 256
    assert swizzle in (0, 64, 128) and matrix.element_size() in (1, 2, 8)
    assert swizzle in (0, box[1] * matrix.element_size()) and box[1] * matrix.element_size() % 16 == 0
    return TensorMap(matrix.data_ptr(), *matrix.shape, matrix.element_size(), *box, swizzle)


def _run(
    library: ctypes.CDLL,
    config: Any,
    blocks: int,
    threads: int,
    arguments: list[Any],
    early: Sequence[Tensor] | None,
    late: Sequence[Tensor],
    seed: int,
) -> None:
    # A launch that begins when those before it have ended may read everything from its beginning.
    ends = [0, (1 << 64) - 1] if early is None else _ends(early)
    said = library.emulated_launch(
        blocks,
        threads,
        config.shared,
        getattr(config, "CLUSTER", 1),
        (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments)),
        *_pairs(ends),
        *_pairs(_ends(late)),
        ctypes.c_uint64(seed),
    )
    if said:
        raise Fault(f"{config}: {said.decode()}")


def _ends(tensors: Sequence[Tensor]) -> list[int]:
    """Where each begins and ends."""
    return [end for t in tensors for end in (t.data_ptr(), t.data_ptr() + t.nbytes)]


def _pairs(ends: list[int]) -> tuple[Any, int]:
    return (ctypes.c_void_p * len(ends))(*ends), len(ends) // 2


@cache
def _compiled(config: Macros, change: tuple[str, str] | None) -> ctypes.CDLL:
    sources, own = _sources(change), _own()
    made = sources / f"kernel{len(list(sources.glob('kernel*.so')))}.so"
    macros = [f'-DSOURCE="{sources / config.SOURCE}"', f"-DKERNEL={config.SOURCE.removesuffix('.cu')}", *config.options]
    _compile(own, *macros, f"-I{own}", "-shared", "-o", str(made), "main.cpp", "threads.o")
    library = ctypes.CDLL(str(made))
    library.emulated_launch.restype = ctypes.c_char_p
    return library


@cache
def _sources(change: tuple[str, str] | None) -> Path:
    """A folder of the kernels' sources, without the headers that stand beside this file."""
    folder, changed = _folder(), change is None
    for source in files("bitwright.kernels.nvrtc").iterdir():
        if source.name.endswith((".cu", ".cuh")) and not (_HERE / source.name).exists():
            text = source.read_text(encoding="utf-8")
            if change and change[0] in text:
                text, changed = text.replace(*change), True
            text = text.replace(*_DYNAMIC).replace(*_NUMBER)
            assert "__shared__" not in text, "more shared memory than the emulation knows of"
            (folder / source.name).write_text(text, encoding="utf-8")
    assert changed, f"no source has {change}"
    return folder


@cache
def _own() -> Path:
    """A folder of what stands beside this file, as far compiled as it can be without a kernel."""
    folder = _folder()
    for own in _HERE.glob("*.[hc]*"):
        shutil.copy(own, folder)
    _compile(folder, "-c", "-o", "threads.o", "threads.cpp")
    _compile(folder, "-x", "c++-header", "cuda.h")
    return folder


def _folder() -> Path:
    folder = Path(mkdtemp(prefix="emulation"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _compile(folder: Path, *arguments: str) -> None:
    done = subprocess.run(["g++", *_OPTIONS, *arguments], capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
