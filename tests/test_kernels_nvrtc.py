"""Machine code of kernels in CUDA C++, kept from one process to the next."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitwright import cache
from bitwright.errors import DependencyError
from bitwright.kernels.nvrtc import compile as nvrtc

OPTIONS = ("-DBITS=4",)


class Compiler:
    """Stands in for NVRTC: counts what it is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.version = (13, 0)
        monkeypatch.setattr(nvrtc, "_load", lambda: ("a library", None))
        monkeypatch.setattr(nvrtc, "_version", lambda library: self.version)
        monkeypatch.setattr(nvrtc, "compiled", self.compiled)

    def compiled(self, name: str, headers: object, options: tuple[str, ...]) -> tuple[bytes, str]:
        self.asked.append(options)
        return b"\x7fELF of " + " ".join(options).encode(), "said"


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiler:
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path / "cache"))
    return Compiler(monkeypatch)


def test_compiled_once(compiler: Compiler, tmp_path: Path) -> None:
    for _ in range(2):
        assert nvrtc.machine_code("few_tokens.cu", (), OPTIONS) == b"\x7fELF of -DBITS=4"
    assert compiler.asked == [OPTIONS]
    (kept,) = (tmp_path / "cache" / "kernels").iterdir()
    assert kept.name.startswith("few_tokens-") and kept.suffix == ".cubin"


def test_whatever_it_depends_on_makes_another(compiler: Compiler) -> None:
    nvrtc.machine_code("few_tokens.cu", (), OPTIONS)
    nvrtc.machine_code("few_tokens.cu", (), ("-DBITS=3",))
    nvrtc.machine_code("few_tokens.cu", (("more.cuh", ""),), OPTIONS)
    nvrtc.machine_code("many_tokens.cu", (), OPTIONS)
    compiler.version = (13, 1)
    nvrtc.machine_code("few_tokens.cu", (), OPTIONS)
    assert len(compiler.asked) == 5
    nvrtc.machine_code("few_tokens.cu", (), OPTIONS)
    assert len(compiler.asked) == 5


def test_a_changed_source_makes_another(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    nvrtc.machine_code("few_tokens.cu", (), OPTIONS)
    inputs = nvrtc._inputs("few_tokens.cu", ())
    monkeypatch.setattr(nvrtc, "_inputs", lambda name, headers: (inputs[0], inputs[1] + "\n", inputs[2]))
    nvrtc.machine_code("few_tokens.cu", (), OPTIONS)
    names = [name for name, _ in inputs[2]]
    changed = [(name, text + "\n" if name == "hopper.cuh" else text) for name, text in inputs[2]]
    assert "hopper.cuh" in names
    monkeypatch.setattr(nvrtc, "_inputs", lambda name, headers: (inputs[0], inputs[1], changed))
    nvrtc.machine_code("few_tokens.cu", (), OPTIONS)
    assert len(compiler.asked) == 3


@pytest.mark.parametrize("length", [0, 20, 40, -1])
def test_what_is_not_whole_is_made_again(compiler: Compiler, tmp_path: Path, length: int) -> None:
    nvrtc.machine_code("few_tokens.cu", (), OPTIONS)
    (kept,) = (tmp_path / "cache" / "kernels").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:length])
    assert nvrtc.machine_code("few_tokens.cu", (), OPTIONS) == b"\x7fELF of -DBITS=4"
    assert len(compiler.asked) == 2 and kept.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_no_error(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path / "file" / "below"))
    for _ in range(2):
        assert nvrtc.machine_code("few_tokens.cu", (), OPTIONS).startswith(b"\x7fELF")
    assert len(compiler.asked) == 2


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: str, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(cache.os, "replace", full)
    cache.keep(tmp_path / "a" / "b", b"content")
    assert list((tmp_path / "a").iterdir()) == [] and cache.read(tmp_path / "a" / "b") is None


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_load", lambda: (None, "not here"))
    with pytest.raises(DependencyError, match="not here"):
        nvrtc.machine_code("few_tokens.cu", (), OPTIONS)
