"""Writing safetensors checkpoints: never half a file under its final name.

`ShardWriter` streams each tensor to a temporary file as it comes, so memory holds one tensor at most, and lays a
shard out (large elements first, then by name: readers need every tensor aligned to its element) once it is full.
Final names appear only in `close`, the index last. Cost: a shard's bytes are written twice.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from bitwright.errors import OutputError
from bitwright.models.checkpoint import DTYPES, INDEX, SINGLE

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_COPY_CHUNK = 16 << 20
_WORK_PREFIX = ".bitwright-shards-"


@dataclass(frozen=True)
class _Pending:
    """A tensor already streamed to the shard's scratch file."""

    code: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class ShardWriter:
    """Write tensors to safetensors shards of at most `max_shard_bytes` of data (a larger tensor gets its own shard).

    Use as a context manager or call `close`. Until `close` the folder holds temporary files only; leaving through an
    exception, or `abort`, removes them. One shard is named model.safetensors; several get model-0000x-of-0000y names
    and an index. The same tensors in the same order give the same bytes. OutputError: the folder already holds a
    model, a name comes twice, the disk is full.
    """

    def __init__(self, folder: str | os.PathLike[str], max_shard_bytes: int = 5 << 30) -> None:
        if max_shard_bytes <= 0:
            raise OutputError(f"shards of {max_shard_bytes} bytes cannot hold anything; give a positive limit")
        self.folder = Path(folder)
        self.max_shard_bytes = max_shard_bytes
        self._shards: list[tuple[Path, dict[str, _Pending]]] = []
        self._pending: dict[str, _Pending] = {}
        self._seen: set[str] = set()
        self._scratch: BinaryIO | None = None
        self._bytes = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if old := sorted(p.name for p in self.folder.glob("model*.safetensors*")):
                raise OutputError(f"{self.folder}: already holds {old[0]}; choose an empty folder or remove it")
            for stale in self.folder.glob(f"{_WORK_PREFIX}*"):  # left by a run that was killed
                shutil.rmtree(stale)
            self._work = Path(tempfile.mkdtemp(prefix=_WORK_PREFIX, dir=self.folder))
        except OSError as e:
            raise self._failure(e) from e

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor (any device, any strides); it may be freed when the call returns."""
        if name in self._seen:
            raise OutputError(f"{self.folder}: tensor {name!r} was added twice; each name can be written once")
        if tensor.dtype not in _CODES:
            raise OutputError(f"{self.folder}: tensor {name!r} is {tensor.dtype}, which safetensors cannot hold")
        # Flattened before the view as bytes: a scalar has no last dimension to view through.
        data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        nbytes = data.numel()
        if self._pending and self._bytes + nbytes > self.max_shard_bytes:
            self._finish_shard()
        try:
            if self._scratch is None:
                self._scratch = open(self._work / "scratch", "w+b")  # noqa: SIM115, lives across calls
            self._scratch.write(memoryview(data.numpy()))
        except OSError as e:
            raise self._failure(e) from e
        self._pending[name] = _Pending(_CODES[tensor.dtype], tuple(tensor.shape), self._bytes, nbytes)
        self._bytes += nbytes
        self._seen.add(name)

    def close(self) -> list[Path]:
        """Finish the last shard, give all files their final names, the index last; returns the files written."""
        if self._pending or not self._shards:
            self._finish_shard()
        try:
            count = len(self._shards)
            if count == 1:
                final = [self.folder / SINGLE]
            else:
                final = [self.folder / f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
                weight_map = {n: f.name for f, (_, held) in zip(final, self._shards, strict=True) for n in held}
                total = sum(p.nbytes for _, held in self._shards for p in held.values())
                index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
                _write_synced(self._work / INDEX, (json.dumps(index, indent=2) + "\n").encode())
            for file, (temporary, _) in zip(final, self._shards, strict=True):
                os.replace(temporary, file)
            if count > 1:
                os.replace(self._work / INDEX, self.folder / INDEX)
                final.append(self.folder / INDEX)
        except OSError as e:
            raise self._failure(e) from e
        shutil.rmtree(self._work, ignore_errors=True)
        return final

    def abort(self) -> None:
        """Drop everything written so far; the folder keeps nothing of it."""
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None
        shutil.rmtree(self._work, ignore_errors=True)

    def _finish_shard(self) -> None:
        """Lay the scratch file out as one safetensors file under a temporary name."""
        order = sorted(self._pending.items(), key=lambda item: (-DTYPES[item[1].code].itemsize, item[0]))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, p in order:
            header[name] = {"dtype": p.code, "shape": list(p.shape), "data_offsets": [position, position + p.nbytes]}
            position += p.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # tensors start aligned to 8 bytes
        target = self._work / f"shard-{len(self._shards) + 1:05d}"
        try:
            with open(target, "wb") as out:
                out.write(struct.pack("<Q", len(text)) + text)
                for _, p in order:
                    _copy_range(self._scratch, p.offset, p.nbytes, out)
                out.flush()
                os.fsync(out.fileno())
            if self._scratch is not None:
                self._scratch.seek(0)
                self._scratch.truncate()
        except OSError as e:
            raise self._failure(e) from e
        self._shards.append((target, dict(self._pending)))
        self._pending = {}
        self._bytes = 0

    def _failure(self, error: OSError) -> OutputError:
        """OutputError for a failed write; what was written so far is removed, to give the space back."""
        if hasattr(self, "_work"):
            self.abort()
        return OutputError(
            f"{self.folder}: cannot write weights: {error.strerror or error}; "
            "free space or permissions there, or choose another folder, and run again"
        )


def _copy_range(source: BinaryIO | None, offset: int, nbytes: int, out: BinaryIO) -> None:
    """Append `nbytes` of `source` from `offset` to `out`."""
    if source is None or nbytes == 0:
        return
    source.seek(offset)
    while nbytes:
        chunk = source.read(min(_COPY_CHUNK, nbytes))
        out.write(chunk)
        nbytes -= len(chunk)


def _write_synced(file: Path, data: bytes) -> None:
    with open(file, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
