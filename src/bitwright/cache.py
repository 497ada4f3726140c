"""Where what can be made again is kept from one process to the next."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def folder() -> Path:
    """$BITWRIGHT_CACHE, else ~/.cache/bitwright; it may not be there yet."""
    return Path(os.environ.get("BITWRIGHT_CACHE") or "~/.cache/bitwright").expanduser()


def read(path: Path) -> bytes | None:
    """What `keep` put there, or None."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def keep(path: Path, content: bytes) -> None:
    """Put `content` at `path`, whole or not at all. A folder that cannot be written is no error: it is made again."""
    spare = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        spare.write_bytes(content)
        spare.replace(path)
    except OSError:
        with suppress(OSError):
            spare.unlink()
