"""CUDA C++ to machine code for Hopper by NVRTC, called through its C interface.

The library is searched for where wheels put it, beside torch, and then by name as the dynamic linker does it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import lru_cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, cast

import torch

from bitwright import cache
from bitwright.errors import DependencyError

ARCHITECTURE = "sm_90a"
_OLDEST = (12, 4)  # releases before it were never tried
_MAJORS = (13, 12)  # of CUDA, the preferred first
_MISSING = (
    "NVRTC, CUDA's runtime compiler, was not found: install nvidia-cuda-nvrtc (for CUDA 12 nvidia-cuda-nvrtc-cu12); "
    "torch's CUDA wheels bring it"
)


Header = tuple[str, str]  # name and text


class CompileError(DependencyError, RuntimeError):
    """A program that NVRTC refuses; the message holds what it says."""


class Macros(ABC):
    """A frozen dataclass whose fields are the macros of the source file SOURCE."""

    SOURCE: ClassVar[str]

    @property
    @abstractmethod
    def stages(self) -> int:
        """In shared memory: what STAGES becomes."""

    @property
    def headers(self) -> tuple[Header, ...]:
        """What the file includes besides the .cuh files beside it."""
        return ()

    @property
    def options(self) -> tuple[str, ...]:
        """For the compiler."""
        values = {f.name: getattr(self, f.name) for f in fields(cast(Any, self))} | {"STAGES": self.stages}
        return tuple(f"-D{name}={int(value)}" for name, value in values.items())

    def cubin(self, *options: str) -> tuple[bytes, str]:
        """(machine code, what the compiler says); more options for it."""
        return compiled(self.SOURCE, self.headers, (*self.options, *options))

    def machine_code(self) -> bytes:
        """The same, kept from one process to the next."""
        return machine_code(self.SOURCE, self.headers, self.options)


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why nothing can be compiled, or None; found out by compiling something small."""
    nvrtc, reason = _load()
    if nvrtc is None:
        return reason
    try:
        _compile(nvrtc, "empty.cu", 'extern "C" __global__ void empty() {}', (), ())
    except CompileError as e:
        return str(e)
    return None


@lru_cache(maxsize=256)
def compiled(name: str, headers: tuple[Header, ...], options: tuple[str, ...]) -> tuple[bytes, str]:
    """(cubin, what the compiler says) of the source file `name` of this folder.

    headers: (name, text) of what it may include besides the .cuh files beside it. DependencyError without NVRTC,
    CompileError if it does not compile.
    """
    nvrtc, source, included = _inputs(name, headers)
    return _compile(nvrtc, name, source, included, options)


def machine_code(name: str, headers: tuple[Header, ...], options: tuple[str, ...]) -> bytes:
    """The cubin that `compiled` gives, kept in `cache` from one process to the next."""
    nvrtc, source, included = _inputs(name, headers)
    made_of = (_version(nvrtc), ARCHITECTURE, name, source, sorted(included), options)
    digest = sha256(repr(made_of).encode()).hexdigest()[:32]
    path = cache.folder() / "kernels" / f"{Path(name).stem}-{digest}.cubin"
    held = cache.read(path)
    if held is None:
        held = compiled(name, headers, options)[0]
        cache.keep(path, held)
    return held


def _inputs(name: str, headers: Sequence[Header]) -> tuple[ctypes.CDLL, str, list[tuple[str, str]]]:
    """(NVRTC, the text of the source file, name and text of all that it may include)."""
    nvrtc, reason = _load()
    if nvrtc is None:
        raise DependencyError(reason or _MISSING)
    folder = files(__package__)
    beside = [(f.name, f.read_text(encoding="utf-8")) for f in folder.iterdir() if f.name.endswith(".cuh")]
    return nvrtc, (folder / name).read_text(encoding="utf-8"), [*beside, *headers]


def _compile(
    nvrtc: ctypes.CDLL, name: str, source: str, included: Sequence[tuple[str, str]], options: Sequence[str]
) -> tuple[bytes, str]:
    program = ctypes.c_void_p()
    _check(
        nvrtc,
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program),
            source.encode(),
            name.encode(),
            len(included),
            _strings([text for _, text in included]),
            _strings([title for title, _ in included]),
        ),
    )
    try:
        asked = [f"--gpu-architecture={ARCHITECTURE}", "--std=c++17", *options]
        failed = nvrtc.nvrtcCompileProgram(program, len(asked), _strings(asked))
        said = _bytes(nvrtc, "ProgramLog", program).rstrip(b"\0").decode(errors="replace").strip()
        if failed:
            raise CompileError(f"NVRTC does not compile {name} with {' '.join(asked)}: {said}")
        return _bytes(nvrtc, "CUBIN", program), said
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _strings(texts: list[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(texts))(*(t.encode() for t in texts))


def _bytes(nvrtc: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    held = ctypes.create_string_buffer(size.value)
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, held))
    return held.raw


def _check(nvrtc: ctypes.CDLL, result: int) -> None:
    if result:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CompileError(f"NVRTC: {nvrtc.nvrtcGetErrorString(result).decode()}")


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """(the library, None) or (None, why not)."""
    reason = _MISSING
    for path in _candidates():
        try:
            # It opens its second half by name when it compiles, which finds what is loaded already.
            for second in Path(path).parent.glob("libnvrtc-builtins.so.*") if "/" in path else ():
                ctypes.CDLL(str(second), mode=ctypes.RTLD_GLOBAL)
            nvrtc = ctypes.CDLL(path)
        except OSError:
            continue
        version = _version(nvrtc)
        if version is None:
            continue
        if version >= _OLDEST:
            return nvrtc, None
        reason = f"needs NVRTC {_OLDEST[0]}.{_OLDEST[1]} or later, {path} is {version[0]}.{version[1]}"
    return None, reason


def _version(nvrtc: ctypes.CDLL) -> tuple[int, int] | None:
    major, minor = ctypes.c_int(), ctypes.c_int()
    failed = nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return None if failed else (major.value, minor.value)


def _candidates() -> Iterator[str]:
    # Torch's own CUDA first: what a later one compiles, a driver that suits torch may refuse.
    own = int((torch.version.cuda or f"{_MAJORS[0]}.0").split(".")[0])
    majors = sorted(_MAJORS, key=lambda major: major != own)
    for major in majors:
        for folder in sys.path:
            # nvidia/cu13/lib in wheels for CUDA 13, nvidia/cuda_nvrtc/lib in those before
            yield from map(str, Path(folder or ".").glob(f"nvidia/*/lib/libnvrtc.so.{major}"))
    yield from (f"libnvrtc.so.{major}" for major in majors)
    if home := os.environ.get("CUDA_HOME"):
        yield from (f"{home}/lib64/libnvrtc.so.{major}" for major in majors)
