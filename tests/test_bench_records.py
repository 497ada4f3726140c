"""Records: what they say of the run, files of them, and how errors become a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitwright.bench import records
from bitwright.errors import BitwrightError, OutputError


def test_files_grow_by_lines(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "r.jsonl"
    records.append(file, [{"a": 1}])
    records.append(file, [{"b": "µs"}, {"c": None}])
    assert records.read(file) == [{"a": 1}, {"b": "µs"}, {"c": None}]
    assert len(file.read_text().splitlines()) == 3


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text('{"a": 1}\n{"a":\n')
    with pytest.raises(BitwrightError, match=r"r\.jsonl:2"):
        records.read(file)


def test_a_file_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="--records"):
        records.append(tmp_path / "file" / "r.jsonl", [{}])


def test_stamp() -> None:
    found = records.stamp("cpu", "bitwright bench kernels")
    assert found["gpu"] is None and found["command"] == "bitwright bench kernels"
    assert found["versions"]["torch"] and found["date"].endswith("+00:00")
    assert found["machine"]["threads"] >= 1 and found["machine"]["processor"]


def test_versions_are_known_when_run_from_the_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(records, "_version", lambda package: None)
    assert records.stamp("cpu")["versions"]["bitwright"]
    monkeypatch.setattr(records, "_ROOT", tmp_path)
    assert records.stamp("cpu")["versions"]["bitwright"] is None


def test_the_commit_is_given_or_found_or_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BITWRIGHT_COMMIT", "abc")
    assert records.stamp("cpu")["commit"] == "abc"
    monkeypatch.delenv("BITWRIGHT_COMMIT")
    monkeypatch.setattr(records, "_ROOT", tmp_path)
    assert records.commit() is None
    (tmp_path / ".git").write_text("no repository")
    assert records.commit() is None


def test_a_program_that_fails_says_nothing() -> None:
    assert records._said("no-such-program-here") is None
    assert records._said("false") is None and records._said("echo", "a") == "a"


def test_the_command_does_not_say_where_it_wrote() -> None:
    given = ["bench", "kernels", "--records", "/some/where.jsonl", "--shape", "8x8", "--records=/x", "--json"]
    assert records.command_line(given) == "bitwright bench kernels --shape 8x8 --json"
    assert records.command_line(["a b"]) == "bitwright 'a b'"


def test_a_failure_is_one_short_line() -> None:
    assert records.failure(ValueError("two\n  lines")) == "ValueError: two lines"
    assert records.failure(KeyError()) == "KeyError: no message"
    assert len(records.failure(RuntimeError("x" * 10_000))) < 250
