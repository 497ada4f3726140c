"""Write one novel of the R package janeaustenr as plain text: python scripts/austen.py FOLDER persuasion out.txt

FOLDER is the package's `data` folder (Debian: r-cran-janeaustenr unpacks to usr/lib/R/site-library/janeaustenr/data).
R keeps the lines of each novel as a serialized character vector in a lazy-load pair: Rdata.rdb holds zlib chunks
(4 bytes length, then data); the novel is the chunk whose first lines name it. The lines of a paragraph, wrapped at 70
columns in the package, are joined by spaces, and paragraphs are separated by a blank line.
"""

from __future__ import annotations

import re
import struct
import sys
import zlib
from pathlib import Path

_STRSXP = 16
_CHARSXP = 9


def chunks(data: bytes) -> list[bytes]:
    """All decompressed chunks of a lazy-load file: 4-byte big-endian size of the plain data, then a zlib stream."""
    out, at = [], 0
    while at < len(data):
        stream = zlib.decompressobj()
        out.append(stream.decompress(data[at + 4 :]) + stream.flush())
        at = len(data) - len(stream.unused_data)
    return out


def strings(chunk: bytes) -> list[str]:
    """The character vector in R's XDR serialization, empty if the chunk holds something else."""
    at = 14 if chunk[:2] == b"X\n" else 0  # format, then three version words
    if chunk[2:6] == struct.pack(">i", 3):  # version 3 adds the native encoding
        (size,) = struct.unpack_from(">i", chunk, at)
        at += 4 + size
    flags, length = struct.unpack_from(">ii", chunk, at)
    if flags & 255 != _STRSXP:
        return []
    at += 8
    lines = []
    for _ in range(length):
        flags, size = struct.unpack_from(">ii", chunk, at)
        if flags & 255 != _CHARSXP:
            raise SystemExit(f"element of type {flags & 255} where a string was expected")
        at += 8
        lines.append(chunk[at : at + max(0, size)].decode())
        at += max(0, size)
    return lines


def main() -> None:
    folder, novel, out = Path(sys.argv[1]), sys.argv[2].lower(), Path(sys.argv[3])
    for chunk in chunks((folder / "Rdata.rdb").read_bytes()):
        lines = strings(chunk)
        if any(novel in line.lower() for line in lines[:5]):
            paragraphs = [" ".join(p.split("\n")) for p in re.split(r"\n\s*\n", "\n".join(lines))]
            out.write_text("\n\n".join(paragraphs), encoding="utf-8")
            print(f"{out}: {len(paragraphs)} paragraphs")
            return
    raise SystemExit(f"no novel whose first lines name {novel!r} in {folder}")


if __name__ == "__main__":
    main()
