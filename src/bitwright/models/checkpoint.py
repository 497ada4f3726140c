"""Safetensors checkpoints: a reader that looks before it leaps.

`Checkpoint` parses every shard header on opening and checks it against the file's real size and against the index, so
a truncated download fails in the first second and not after hours. Tensors are then read one at a time into memory
of their own: no memory map stays open, so the resident size of a run is what it holds and nothing else.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")

DTYPES = {
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
_MAX_HEADER = 100_000_000  # the limit of the safetensors format


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
        if code not in DTYPES:
            raise CheckpointError(f"{file}: tensor {name!r} has dtype {code}, which is not one of {sorted(DTYPES)}")
        dtype = DTYPES[code]
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
