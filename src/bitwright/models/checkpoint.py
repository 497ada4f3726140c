"""Safetensors checkpoints: a reader that looks before it leaps and a writer that never leaves half a file behind.

`Checkpoint` parses every shard header on opening and checks it against the file's real size and against the index, so
a truncated download fails in the first second and not after hours. Tensors are then read one at a time into memory
of their own: no memory map stays open, so the resident size of a run is what it holds and nothing else.

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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from bitwright.errors import CheckpointError, OutputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the limit of the safetensors format
_COPY_CHUNK = 16 << 20
_WORK_PREFIX = ".bitwright-shards-"


@dataclass(frozen=True)
class _Entry:
    """Where one tensor lies: absolute byte offset in `file`."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    nbytes: int


class Checkpoint:
    """Tensors of a folder's safetensors shards, by name, read only when asked for.

    Opening checks everything that can be checked without reading weights; CheckpointError names the file, the tensor
    and what was expected: a shard that the index names but the folder lacks, a file shorter (or longer) than its
    header promises, a tensor that the index places in a shard that has none, one name in two shards, pickled weights.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        files, index = _shards(self.folder)
        self._entries: dict[str, _Entry] = {}
        for file in files:
            for name, entry in read_header(file).items():
                if name in self._entries:
                    raise CheckpointError(
                        f"{self.folder}: tensor {name!r} is in both {self._entries[name].file.name} and {file.name}; "
                        "remove the copy that does not belong, or save the model again"
                    )
                self._entries[name] = entry
        for name, shard in index.items():
            if name not in self._entries or self._entries[name].file.name != shard:
                raise CheckpointError(
                    f"{self.folder}: {INDEX} places tensor {name!r} in {shard}, which does not hold it; "
                    "download that shard and the index again"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""
        return tuple(sorted(self._entries))

    @property
    def files(self) -> tuple[Path, ...]:
        """The shard files, sorted."""
        return tuple(sorted({entry.file for entry in self._entries.values()}))

    @property
    def bytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(entry.nbytes for entry in self._entries.values())

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; CheckpointError if there is none of that name."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor."""
        return self._entry(name).dtype

    def nbytes(self, name: str) -> int:
        """Stored bytes of a tensor."""
        return self._entry(name).nbytes

    def file(self, name: str) -> Path:
        """The shard that holds a tensor."""
        return self._entry(name).file

    def get(self, name: str) -> Tensor:
        """Read one tensor into its own CPU memory, in its stored dtype."""
        entry = self._entry(name)
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        if entry.nbytes:
            view = memoryview(raw.numpy())
            try:
                with open(entry.file, "rb", buffering=0) as f:
                    f.seek(entry.offset)
                    done = 0
                    while done < entry.nbytes and (n := f.readinto(view[done:])):
                        done += n
            except OSError as e:
                raise CheckpointError(f"{entry.file}: cannot read tensor {name!r}: {e}") from e
            if done < entry.nbytes:
                raise CheckpointError(
                    f"{entry.file} changed while it was in use: tensor {name!r} needs {entry.nbytes} bytes at offset "
                    f"{entry.offset}, {done} are left; restore the file and run again"
                )
        return raw.view(entry.dtype).reshape(entry.shape)

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(f"{self.folder}: there is no tensor {name!r} among its {len(self)} tensors") from None


def read_header(file: Path) -> dict[str, _Entry]:
    """Name, shape, dtype and place of every tensor of one safetensors file, checked against the file's size."""

    def bad(what: str) -> CheckpointError:
        return CheckpointError(f"{file}: {what}; download or save this file again")

    try:
        size = file.stat().st_size
        with open(file, "rb") as f:
            head = f.read(8)
            if len(head) < 8:
                raise bad(f"truncated: {size} bytes are too few for a safetensors file")
            (length,) = struct.unpack("<Q", head)
            if length > _MAX_HEADER:
                raise bad(f"not a safetensors file: its header would be {length} bytes long (limit {_MAX_HEADER})")
            if 8 + length > size:
                raise bad(f"truncated: the header alone takes {8 + length} bytes, the file has {size}")
            try:
                header = json.loads(f.read(length))
                fields = {name: value for name, value in header.items() if name != "__metadata__"}
                places = {n: (v["dtype"], tuple(v["shape"]), *v["data_offsets"]) for n, v in fields.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                raise bad(f"its header is not a safetensors header ({e})") from e
    except OSError as e:
        raise CheckpointError(f"{file}: cannot be read: {e}") from e

    entries: dict[str, _Entry] = {}
    position = 0
    for name, (code, shape, begin, end) in sorted(places.items(), key=lambda item: item[1][2:]):
        if code not in _DTYPES:
            raise CheckpointError(f"{file}: tensor {name!r} has dtype {code}, which is not one of {sorted(_DTYPES)}")
        dtype = _DTYPES[code]
        if begin != position or end - begin != prod(shape) * dtype.itemsize:
            raise bad(f"tensor {name!r} {code} {list(shape)} cannot lie at bytes {begin} to {end}")
        entries[name] = _Entry(file, shape, dtype, 8 + length + begin, end - begin)
        position = end
    promised = 8 + length + position
    if promised != size:
        word = "truncated" if promised > size else "longer than its header says"
        raise bad(f"{word}: the header promises {promised} bytes, the file has {size}")
    return entries


def _shards(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Shard files of a folder and the index's weight_map (empty for a single file)."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if (folder / INDEX).is_file():
        try:
            index = json.loads((folder / INDEX).read_text())["weight_map"]
            shards = sorted(set(index.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise CheckpointError(f"{folder / INDEX}: not a shard index ({e}); download or save it again") from e
        for shard in shards:
            if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise CheckpointError(
                    f"{folder / INDEX}: {shard!r} is not the name of a safetensors file of this folder; "
                    "save the model again with safetensors"
                )
            if not (folder / shard).is_file():
                raise CheckpointError(
                    f"{folder}: shard {shard} is missing, {INDEX} names {len(shards)} shards; download it again"
                )
        return [folder / shard for shard in shards], index
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], {}
    if (folder / "adapter_model.safetensors").is_file():
        raise CheckpointError(f"{folder}: holds an adapter, not a model; merge it into its base model and save that")
    if loose := sorted(p.name for p in folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder}: {len(loose)} safetensors files ({loose[0]}, ...) but neither {SINGLE} nor {INDEX}; "
            "download the index too"
        )
    if pickled := sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED):
        raise pickled_error(folder / pickled[0])
    raise CheckpointError(f"{folder}: no weights here: expected {SINGLE} or {INDEX}")


def pickled_error(file: Path) -> CheckpointError:
    """The refusal of a pickled weight file: unpickling runs code that the file brings along."""
    return CheckpointError(
        f"{file}: pickled weights are refused, reading them can run any code; convert them once, where you trust them, "
        "with transformers' from_pretrained and save_pretrained, and give the folder of safetensors"
    )


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
        order = sorted(self._pending.items(), key=lambda item: (-_DTYPES[item[1].code].itemsize, item[0]))
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


def read_config(folder: Path) -> Mapping[str, Any]:
    """config.json of a model folder; CheckpointError when it is missing or is not a JSON object."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: config.json is missing; give a Hugging Face model folder") from None
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{file}: not readable as JSON ({e}); download or save it again") from e
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(config).__name__}")
    return config
