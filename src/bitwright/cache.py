"""Where what can be made again is kept from one process to the next."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

_DIGEST = sha256().digest_size


def folder() -> Path:
    """$BITWRIGHT_CACHE, else ~/.cache/bitwright; it may not be there yet."""
    return Path(os.environ.get("BITWRIGHT_CACHE") or "~/.cache/bitwright").expanduser()


def read(path: Path) -> bytes | None:
    """What `keep` put there; None if there is nothing, or not all of it."""
    try:
        held = path.read_bytes()
    except OSError:
        return None
    content = held[_DIGEST:]
    return content if sha256(content).digest() == held[:_DIGEST] else None


def keep(path: Path, content: bytes) -> None:
    """Put `content` at `path`, behind its SHA-256. A folder that cannot be written is no error: it is made again."""
    spare: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: other threads and processes may be making the same.
        number, spare = tempfile.mkstemp(prefix=path.name, dir=path.parent)
        with open(number, "wb") as file:
            file.write(sha256(content).digest() + content)
        os.replace(spare, path)
    except OSError:
        if spare is not None:
            with suppress(OSError):
                os.unlink(spare)
