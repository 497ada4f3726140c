"""The working folder: what counts as finished, what may continue what, and how the result gets its name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bitwright.calibrate.stream import Streams
from bitwright.errors import OutputError
from bitwright.run_folder import RunFolder

DATA_FREE: dict[str, Any] = {"model": "m", "calibration": None}
CALIBRATED: dict[str, Any] = {"model": "m", "calibration": {"seed": 0}}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "a.weight_packed": torch.randint(-9, 9, (3, 4), generator=g, dtype=torch.int32),
        "b": torch.randn(5, generator=g),
    }


def streams(count: int, value: float = 0.0, reference: bool = True) -> Streams:
    batches = [torch.full((1, 2, 3), value + i, dtype=torch.bfloat16) for i in range(count)]
    return Streams(batches, [b.float() + 0.5 for b in batches] if reference else None)


def finish_blocks(run: RunFolder, count: int, with_streams: bool = True) -> None:
    for i in range(count):
        run.save_part(i, tensors(i), {f"block{i}": {"relative_error": 0.1}})
        if with_streams:
            run.save_streams(i + 1, streams(2, i))


def test_a_new_run_and_its_continuation(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    run = RunFolder(out, CALIBRATED, False)
    assert run.finished == 0 and run.path == tmp_path / "deep" / "out.partial" and not out.exists()
    finish_blocks(run, 2)
    again = RunFolder(out, dict(reversed(CALIBRATED.items())), False)  # the order of keys means nothing
    assert again.finished == 2
    for i in range(2):
        kept, records = again.part(i)
        assert kept.keys() == tensors(i).keys() and all(torch.equal(kept[k], v) for k, v in tensors(i).items())
        assert records == again.part_record(i) == {f"block{i}": {"relative_error": 0.1}}


@pytest.mark.parametrize("reference", [True, False])
def test_streams_come_back_as_they_were(tmp_path: Path, reference: bool) -> None:
    run = RunFolder(tmp_path / "out", CALIBRATED, False)
    kept = streams(12, reference=reference)  # more than ten: the order must not be that of text
    run.save_streams(1, kept)
    found = run.load_streams(torch.device("cpu"))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found.quantized, kept.quantized, strict=True))
    assert (found.reference is None) == (not reference)
    assert all(torch.equal(a, b) for a, b in zip(found.reference or [], kept.reference or [], strict=True))


def test_what_counts_as_finished(tmp_path: Path) -> None:
    """A block's part, its record and the stream behind it; without calibration there is no stream."""

    def finished(request: dict[str, Any], name: str) -> int:
        return RunFolder(tmp_path / name, request, False).finished

    run = RunFolder(tmp_path / "a", CALIBRATED, False)
    run.save_part(0, tensors(0), {})
    assert finished(CALIBRATED, "a") == 0  # killed between part and stream: the block is done again
    run.save_streams(1, streams(1))
    assert finished(CALIBRATED, "a") == 1
    run.save_part(1, tensors(1), {})
    assert finished(CALIBRATED, "a") == 1
    run.save_streams(2, streams(1))
    (run.path / "block-00001.json").unlink()
    assert finished(CALIBRATED, "a") == 1  # the record is missing
    free = RunFolder(tmp_path / "b", DATA_FREE, False)
    finish_blocks(free, 3, with_streams=False)
    assert finished(DATA_FREE, "b") == 3
    (free.path / "block-00001.safetensors").unlink()
    assert finished(DATA_FREE, "b") == 1  # a gap ends the count


def test_dropping_the_streams_keeps_the_count_and_frees_the_space(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "out", CALIBRATED, False)
    finish_blocks(run, 3)
    run.save_streams(3, streams(500))
    held = (run.path / "stream.safetensors").stat().st_size
    run.drop_streams(3)
    assert (run.path / "stream.safetensors").stat().st_size < held / 50
    assert RunFolder(tmp_path / "out", CALIBRATED, False).finished == 3
    free = RunFolder(tmp_path / "free", DATA_FREE, False)
    free.drop_streams(0)
    assert not (free.path / "stream.safetensors").exists()


def test_half_written_files_are_cleared_away(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "out", CALIBRATED, False)
    finish_blocks(run, 1)
    (run.path / "block-00001.safetensors.tmp").write_bytes(b"half")
    (run.path / "final").mkdir()
    (run.path / "final" / "config.json").write_text("{}")
    again = RunFolder(tmp_path / "out", CALIBRATED, False)
    assert again.finished == 1
    assert not (run.path / "block-00001.safetensors.tmp").exists() and not (run.path / "final").exists()


def test_another_request_is_refused_with_what_differs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    finish_blocks(RunFolder(out, CALIBRATED | {"recipe": ["x" * 100]}, False), 1)
    other = {"model": "m", "calibration": {"seed": 1}, "recipe": ["y" * 100], "new": True}
    with pytest.raises(OutputError) as caught:
        RunFolder(out, other, False)
    message = str(caught.value)
    assert '{"seed": 0}' in message and '{"seed": 1}' in message and "new (null there, true here)" in message
    assert "recipe" in message and "x" * 50 not in message and "model (" not in message and "overwrite" in message
    assert RunFolder(out, other, True).finished == 0  # dropped
    assert RunFolder(out, other, False).finished == 0


def test_overwrite_continues_the_same_request(tmp_path: Path) -> None:
    finish_blocks(RunFolder(tmp_path / "out", CALIBRATED, True), 2)
    assert RunFolder(tmp_path / "out", CALIBRATED, True).finished == 2


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "diary.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"out\.partial.*other files"):
            RunFolder(tmp_path / "out", CALIBRATED, overwrite)
    assert (partial / "diary.txt").read_text() == "mine"


def test_the_result_appears_whole_and_the_working_folder_goes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = RunFolder(out, DATA_FREE, False)
    with run.final(False) as folder:
        (folder / "config.json").write_text("{}")
        assert not out.exists()
    assert [p.name for p in out.iterdir()] == ["config.json"] and not run.path.exists()


def test_an_error_on_the_way_leaves_no_result(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = RunFolder(out, DATA_FREE, False)
    finish_blocks(run, 1, with_streams=False)
    with pytest.raises(ZeroDivisionError), run.final(False) as folder:
        (folder / "config.json").write_text("{}")
        raise ZeroDivisionError
    assert not out.exists() and RunFolder(out, DATA_FREE, False).finished == 1
    with pytest.raises(OutputError, match=r"final.*disk quota.*free space"), run.final(False):
        raise OSError(122, "disk quota exceeded")
    assert not out.exists()


def test_overwriting_never_leaves_half_of_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed just before the last rename: the old folder is gone from its name as a whole; the next run finishes."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("config.json", "model.safetensors"):
        (out / name).write_text("old")
    run = RunFolder(out, DATA_FREE, True)
    real = os.replace

    def dying(a: Any, b: Any) -> None:
        if Path(a).name == "final":
            raise KeyboardInterrupt
        real(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(KeyboardInterrupt), run.final(True) as folder:
            (folder / "config.json").write_text("new")
    assert not out.exists()
    with RunFolder(out, DATA_FREE, True).final(True) as folder:
        (folder / "config.json").write_text("new")
    assert [(p.name, p.read_text()) for p in out.iterdir()] == [("config.json", "new")]
    assert not run.path.exists()


def test_places_that_cannot_become_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="no place"):
        RunFolder(Path("/"), DATA_FREE, True)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        RunFolder(tmp_path / "file", DATA_FREE, True)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="is a file"):
        RunFolder(tmp_path / "dangling", DATA_FREE, True)
    with pytest.raises(OutputError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "out", DATA_FREE, False)
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda p: Path(p) == mounted)
    with pytest.raises(OutputError, match="mount point"):
        RunFolder(mounted, DATA_FREE, True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "file", "mounted"]


def test_a_relative_name_is_taken_from_where_the_run_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("out", "empty", "./below/"):
        run = RunFolder(Path(name), DATA_FREE, False)
        assert run.path.parent == tmp_path
        with run.final(False) as folder:
            (folder / "config.json").write_text("{}")
        assert (tmp_path / name / "config.json").is_file()


def test_the_request_is_kept_readable(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "out", CALIBRATED, False)
    assert json.loads((run.path / "run.json").read_text()) == CALIBRATED
