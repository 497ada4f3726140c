"""The working folder of a run, OUT.partial: finished blocks, the state of the streams, and what the run was asked for.

A block is finished when its part is on disk *and* the stream behind it is; both are written under a temporary name and
renamed, part first, so a kill at any moment loses at most the block being worked on. OUT itself appears by one rename
when everything is in place: a folder of that name is always complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitwright.calibrate.stream import Streams
from bitwright.errors import OutputError

_REQUEST = "run.json"
_STREAM = "stream.safetensors"
_SPENT = "spent.json"
_FINAL = "final"
_REPLACED = "replaced"


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise OutputError(f"{path}: cannot be written ({e.strerror or e}); free space or choose another --out") from e
    except Exception as e:  # safetensors reports a full disk as its own error type
        if type(e).__name__ != "SafetensorError":
            raise
        raise OutputError(f"{path}: cannot be written ({e}); free space or choose another --out") from e


class RunFolder:
    """OUT.partial for one run. `finished` is the number of blocks that need not be done again."""

    def __init__(self, out: Path, request: dict[str, Any], overwrite: bool) -> None:
        self.out = Path(os.path.abspath(out))
        if not self.out.name:
            raise OutputError(f"{out}: is no place for a new folder; choose another --out")
        self.path = self.out.with_name(self.out.name + ".partial")
        _check_free(self.out, overwrite)
        with _disk_errors(self.path):
            self._claim(request, overwrite)
        self.finished = self._finished()

    def _claim(self, request: dict[str, Any], overwrite: bool) -> None:
        """Begin a new run, or find that the one in the folder is the same."""
        held, text = self.path / _REQUEST, json.dumps(request, indent=1, sort_keys=True)
        if held.exists() and held.read_text() != text:
            if not overwrite:
                changed = _difference(json.loads(held.read_text()), request)
                raise OutputError(
                    f"{self.path}: holds an unfinished run that differs in {changed}; finish that run with its own "
                    "options, choose another --out, or pass overwrite (--overwrite) to drop it"
                )
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        for stale in self.path.glob("*.tmp"):
            stale.unlink()
        if held.exists():
            shutil.rmtree(self.path / _FINAL, ignore_errors=True)
        elif any(self.path.iterdir()):
            raise OutputError(
                f"{self.path}: is the working folder of --out {self.out.name}, but holds other files; "
                "move them away or choose another --out"
            )
        else:
            _write(held, text)

    def _finished(self) -> int:
        parts = 0
        while self._part(parts).exists() and self._part(parts).with_suffix(".json").exists():
            parts += 1
        stream = self.path / _STREAM
        if not stream.exists():
            return 0 if self._needs_stream() else parts
        with safe_open(stream, "pt") as f:
            return min(parts, int(f.metadata()["next_block"]))

    def _needs_stream(self) -> bool:
        return bool(json.loads((self.path / _REQUEST).read_text()).get("calibration"))

    def _part(self, index: int) -> Path:
        return self.path / f"block-{index:05d}.safetensors"

    def save_part(self, index: int, tensors: dict[str, Tensor], records: dict[str, Any]) -> None:
        """Keep the packed tensors and records of one block."""
        part = self._part(index)
        with _disk_errors(part):
            _save(part, {k: v.cpu().contiguous() for k, v in tensors.items()})
            _write(part.with_suffix(".json"), json.dumps(records))

    def part(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `save_part` kept."""
        part = self._part(index)
        with safe_open(part, "pt") as f:
            tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118, not a mapping
        return tensors, self.part_record(index)

    def part_record(self, index: int) -> dict[str, Any]:
        """The records alone of what `save_part` kept."""
        records: dict[str, Any] = json.loads(self._part(index).with_suffix(".json").read_text())
        return records

    def spent(self) -> dict[str, Any]:
        """What earlier processes of this run took, as `save_spent` kept it; empty for a first one."""
        path = self.path / _SPENT
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found

    def save_spent(self, spent: dict[str, Any]) -> None:
        """Keep what this run took so far, earlier processes included."""
        with _disk_errors(self.path):
            _write(self.path / _SPENT, json.dumps(spent))

    def save_streams(self, next_block: int, streams: Streams) -> None:
        """Keep the activations that enter `next_block`; the ones before are dropped."""
        tensors = {f"quantized.{i:06d}": h.cpu().contiguous() for i, h in enumerate(streams.quantized)}
        for i, h in enumerate(streams.reference or []):
            tensors[f"reference.{i:06d}"] = h.cpu().contiguous()
        with _disk_errors(self.path / _STREAM):
            _save(self.path / _STREAM, tensors, {"next_block": str(next_block)})

    def load_streams(self, device: torch.device) -> Streams:
        """The activations that enter block number `finished`."""
        with safe_open(self.path / _STREAM, "pt", device=str(device)) as f:
            keys = sorted(f.keys())
            quantized = [f.get_tensor(k) for k in keys if k.startswith("quantized.")]
            reference = [f.get_tensor(k) for k in keys if k.startswith("reference.")]
        return Streams(quantized, reference or None)

    def drop_streams(self, blocks: int) -> None:
        """Free the disk space of the activations once all `blocks` are done: finishing needs the parts alone. What
        stays says that they are done, so that a kill from here on costs nothing but the writing."""
        stream = self.path / _STREAM
        if stream.exists():
            with _disk_errors(stream):
                _save(stream, {}, {"next_block": str(blocks)})

    @contextmanager
    def final(self, overwrite: bool) -> Iterator[Path]:
        """A folder to assemble the result in; it becomes OUT when the context closes without an error."""
        folder = self.path / _FINAL
        with _disk_errors(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            yield folder
            if self.out.is_dir() and (overwrite or not any(self.out.iterdir())):
                # Aside first: a kill while it is being deleted must not leave half of it under its name.
                shutil.rmtree(self.path / _REPLACED, ignore_errors=True)
                os.replace(self.out, self.path / _REPLACED)
            os.replace(folder, self.out)
            shutil.rmtree(self.path)


def _check_free(out: Path, overwrite: bool) -> None:
    """OutputError unless `out` can become the new folder by one rename."""
    if os.path.ismount(out):
        raise OutputError(f"{out}: is a mount point, which no finished folder can replace; choose a folder inside it")
    if out.is_dir():
        if not any(out.iterdir()):
            return
        if not overwrite:
            raise OutputError(
                f"{out}: already exists and is not empty; choose another --out, or pass overwrite (--overwrite)"
            )
        if not (out / "config.json").is_file():
            raise OutputError(
                f"{out}: holds files but no config.json, so it is no model to overwrite; remove it, or choose another "
                "--out"
            )
    elif out.exists() or out.is_symlink():
        raise OutputError(f"{out}: is a file; remove it, or choose another --out")


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    keys = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
    return ", ".join(f"{k} ({_short(old.get(k))} there, {_short(new.get(k))} here)" for k in keys)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:28]}… #{hashlib.sha256(text.encode()).hexdigest()[:8]}"
