"""Records: one JSON line per measurement, with all that is needed to make it again.

A record is flat: what was measured (``benchmark``, shape, scheme, ...), the figures (``seconds``, ``bytes``, ...; units
are in the names, times in seconds) and the stamp (date, machine, versions, command). A measurement that could not be
made is a record too: ``status`` is "ok", "wrong" (the result was, so it was never timed), "absent" or "failed", and
``reason`` says why.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bitwright.errors import BitwrightError, OutputError

Record = dict[str, Any]

_ROOT = Path(__file__).resolve().parents[3]  # of the repository, where this is run from its source

OK, WRONG, ABSENT, FAILED = "ok", "wrong", "absent", "failed"


def stamp(device: torch.device | str, command: str | None = None) -> Record:
    """date, machine, gpu, versions, commit and command: what every record of a run shares."""
    device = torch.device(device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"processor": processor(), "threads": torch.get_num_threads(), "system": platform.system()},
        "gpu": gpu,
        "versions": {
            "bitwright": _version("bitwright") or _source_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda if gpu else None,
            "driver": _driver() if gpu else None,
        },
        "commit": commit(),
        "command": command,
    }


def commit() -> str | None:
    """$BITWRIGHT_COMMIT, or the commit that the source is a checkout of, "+" behind it if files differ; None if neither
    is known."""
    given = os.environ.get("BITWRIGHT_COMMIT", "").strip()
    if given or not (_ROOT / ".git").exists():
        return given or None
    head = _said("git", "-C", str(_ROOT), "rev-parse", "HEAD")
    changed = _said("git", "-C", str(_ROOT), "status", "--porcelain", "--untracked-files=no", "--", "src")
    return f"{head}+" if head and changed else head


def command_line(arguments: Sequence[str], dropped: Sequence[str] = ("--records",)) -> str:
    """The command as it could be typed again, without options (and their values) that only say where to write."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in dropped:
            skip = True
        elif argument.partition("=")[0] not in dropped:
            kept.append(argument)
    return shlex.join(["bitwright", *kept])


def append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add records to the end of a file, one line each; folders are made. OutputError if it cannot be written."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as f:
            f.writelines(lines)
    except OSError as e:
        raise OutputError(f"{path}: records cannot be written: {e.strerror}; choose another --records file") from e


def read(path: Path) -> list[Record]:
    """All records of a file; BitwrightError names a line that is none."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as e:
            raise BitwrightError(f"{path}:{number}: no JSON record ({e.msg}); remove the line") from e
    return records


def failure(error: BaseException) -> str:
    """One line about what an implementation raised, short enough for a table."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:200]}"


def processor() -> str:
    """Name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _source_version() -> str | None:
    """The version in the pyproject.toml of the source."""
    try:
        project = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return str(project["version"]) if project["name"] == "bitwright" else None
    except (OSError, ValueError, KeyError):
        return None


def _driver() -> str | None:
    """Version of NVIDIA's driver."""
    found = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0].strip() if found else None


def _said(*command: str) -> str | None:
    """What a program prints; None if there is no such program, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
