"""`bitwright bench`: options, records, JSON on the last line, and an exit code that tells when something is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from bitwright.bench import shapes, timing
from bitwright.bench.correctness import tiny
from bitwright.bench.records import read
from bitwright.cli import app
from bitwright.kernels import dispatch
from bitwright.kernels.dequantize import DequantizedWeight

invoke = CliRunner().invoke
KERNELS = ["bench", "kernels", "--shape", "48x128", "--tokens", "1,3", "--repeats", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No ceilings, and a small model in the place of every published one."""
    known = timing.Ceilings(1e9, 5e8, 1e10, torch.bfloat16)
    monkeypatch.setattr(timing, "measure_ceilings", lambda device, dtype: known)
    published = shapes.models
    monkeypatch.setattr(shapes, "models", lambda name: tiny(published(name)))


def last(stdout: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", ["kernels", "decode", "prefill", "throughput", "memory"])
def test_help_teaches_with_an_example(name: str) -> None:
    result = invoke(app, ["bench", name, "--help"])
    assert result.exit_code == 0
    assert f"bitwright bench {name} " in result.stdout.split("Usage:")[1].split("\n", 1)[1]
    assert "--json" in result.stdout


def test_bench_alone_lists_its_commands() -> None:
    shown = invoke(app, ["bench"]).output
    assert all(name in shown for name in ("kernels", "decode", "prefill", "throughput", "memory"))


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['bitwright', 'bench', 'kernels', '--help']\n"
        "from bitwright.cli import main\n"
        "try: main()\n"
        "except SystemExit as e: print('exit', e.code, *sorted({'torch', 'triton', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "exit 0", done.stderr


def test_kernels(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    result = invoke(app, [*KERNELS, "--scheme", "w4a16-g64", "--scheme", "w8a16", "--records", str(file), "--json"])
    assert result.exit_code == 0, result.stderr
    found = last(result.stdout)
    assert found["command"] == "bench kernels" and found["seconds"] > 0
    assert {(r["scheme"], r["tokens"]) for r in found["records"]} == {
        (scheme, M) for scheme in ("w4a16-g64", "w8a16") for M in (1, 3)
    }
    assert read(file) == found["records"]


def test_kernels_for_people() -> None:
    result = invoke(app, [*KERNELS, "--peer", "dense"])
    assert result.exit_code == 0, result.stderr
    assert "48x128" in result.stdout and "dense" in result.stdout and "tinygemm" not in result.stdout
    alone = invoke(app, [*KERNELS, "--peer", "none", "--json"])
    assert {r["kind"] for r in last(alone.stdout)["records"]} == {"ours"}


def test_experts() -> None:
    result = invoke(app, [*KERNELS, "--scheme", "w4a16-g64", "--experts", "3", "--top-k", "2", "--json"])
    assert result.exit_code == 0, result.stderr
    assert {r["benchmark"] for r in last(result.stdout)["records"]} == {"experts"}


def test_a_wrong_kernel_is_shown_and_fails_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Zero(DequantizedWeight):
        NAME = "zero"

        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) * 0

    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", (Zero,))
    file = tmp_path / "r.jsonl"
    result = invoke(app, [*KERNELS, "--records", str(file), "--json"])
    assert result.exit_code == 1
    assert "zero, wrong" in result.stderr
    assert [r["status"] for r in last(result.stdout)["records"] if r["name"] == "zero"] == ["wrong", "wrong"]
    assert len(read(file)) == len(last(result.stdout)["records"])


def test_memory() -> None:
    result = invoke(app, ["bench", "memory", "--model", "opt-30b", "--fit", "24GB", "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.stderr
    found = last(result.stdout)["records"]
    assert [r["scheme"] for r in found] == ["16-bit", "w4a16-g128"]
    assert {r["memory_bytes"] for r in found} == {24_000_000_000}


@pytest.mark.parametrize("name", ["decode", "prefill", "throughput"])
def test_whole_models(name: str, tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    sizes = {
        "decode": ["--batch", "1,2", "--context", "8"],
        "prefill": ["--prompt", "2x8"],
        "throughput": ["--largest", "2", "--context", "8"],
    }[name]
    arguments = ["bench", name, "--model", "llama-2-7b", "--model", "opt-30b", "--device", "cpu", "--repeats", "1"]
    result = invoke(app, [*arguments, *sizes, "--records", str(file), "--json"])
    assert result.exit_code == 0, result.stderr
    found = last(result.stdout)["records"]
    assert {(r["model"], r["scheme"]) for r in found} == {
        (model, scheme) for model in ("tiny llama-2-7b", "tiny opt-30b") for scheme in ("bfloat16", "w4a16-g128")
    }
    assert all(r["status"] == "ok" and r["command"].startswith("bitwright") for r in found)
    assert read(file) == found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["kernels", "--tokens", "1;2"], "1,16,256"),
        (["kernels", "--shape", "64"], "22016x4096"),
        (["kernels", "--experts", "4", "--peer", "dense"], "--peer goes without"),
        (["memory", "--fit", "much"], "8GB"),
        (["decode", "--batch", "x"], "--batch 'x'"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], said: str) -> None:
    result = invoke(app, ["bench", *arguments])
    assert result.exit_code == 1 and result.stdout == ""
    assert said in result.stderr and result.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------- scripts/gpu_check.sh

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "gpu_check.sh"


def gpu_check(tmp_path: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """The script with a python that writes down what it is asked and fails at decoding with 16 bits; its commands."""
    log, python = tmp_path / "log", tmp_path / "python"
    python.write_text(
        '#!/usr/bin/env bash\n[[ "$1" == - ]] && exec cat > /dev/null\n'
        f'printf "%s\\n" "$*" >> {log}\necho "asked $*"\n[[ "$*" == *"bench decode"*"--batch"* ]] && exit 3\nexit 0\n'
    )
    python.chmod(0o755)
    given = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out"), **environment}
    done = subprocess.run(["bash", str(SCRIPT)], env=given, capture_output=True, text=True, timeout=60)
    return done, [line.split() for line in log.read_text().splitlines()]


def test_gpu_check_goes_on_after_a_failure_and_says_so(tmp_path: Path) -> None:
    done, commands = gpu_check(tmp_path)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "gpu_check: failed: decode (3)"
    assert commands[-1][3] == "memory"
    tested = {c[-1] for c in commands if c[1] == "pytest"}
    assert tested == {f"tests/gpu/{path.name}" for path in (SCRIPT.parent.parent / "tests" / "gpu").glob("test_*.py")}
    written = [c[c.index("--records") + 1] for c in commands if "--records" in c]
    assert written.count(str(tmp_path / "out" / "gpu.jsonl")) == 12


def test_gpu_check_leaves_one_log(tmp_path: Path) -> None:
    done, _ = gpu_check(tmp_path, PARTS="tests memory experts")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["gpu_check.log"]
    text = (tmp_path / "out" / "gpu_check.log").read_text()
    assert "== test_gluon" in text and "== memory" in text and "bench memory" in text
    assert "bench memory" in done.stdout


def test_gpu_check_compiles_beside_the_tests_what_it_times_later(tmp_path: Path) -> None:
    _, commands = gpu_check(tmp_path)
    timed, warmed = ([c for c in commands if "bench" in c and ("--repeats" in c) == w] for w in (False, True))
    small = [c[: c.index("--repeats")] for c in warmed]
    small = [c[:-2] if c[-2] == "--layers" or c.count("--tokens") == 2 else c for c in small]
    assert sorted(small) == sorted(c[: c.index("--records")] for c in timed if c[3] != "memory")
    assert all(("--layers" in c) == (c[3] in ("decode", "prefill")) for c in warmed)
    assert sum(c.count("--tokens") == 2 for c in warmed) == 1


def test_gpu_check_times_when_nothing_else_runs(tmp_path: Path) -> None:
    _, commands = gpu_check(tmp_path)
    last = max(i for i, c in enumerate(commands) if "pytest" in c or "--repeats" in c or c[-1] == "gpu.tiny")
    assert commands[last][-1] == "tests/gpu/test_timing.py"


def test_gpu_check_runs_the_parts_that_are_asked_for(tmp_path: Path) -> None:
    done, commands = gpu_check(tmp_path, PARTS="memory bits")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [c[3] for c in commands] == ["kernels", "memory"]


def test_gpu_check_runs_the_tests_that_are_asked_for(tmp_path: Path) -> None:
    done, commands = gpu_check(tmp_path, PARTS="tests", TESTS="test_int8 test_gluon")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {c[-1] for c in commands if c[1] == "pytest"} == {f"tests/gpu/test_{n}.py" for n in ("int8", "gluon")}
    done, _ = gpu_check(tmp_path, PARTS="tests", TESTS="test_nothing")
    assert done.returncode == 1 and "test_nothing" in done.stdout.splitlines()[-1]


def test_gpu_check_takes_at_most_ten_minutes(tmp_path: Path) -> None:
    done, _ = gpu_check(tmp_path, SANITIZER=str(tmp_path / "python"))
    limits = [int(n) for n in re.findall(r"at most (\d+) s", done.stdout)]
    assert len(limits) == 15 and sum(limits) <= 590


def test_gpu_check_runs_tiny_problems_under_a_checker(tmp_path: Path) -> None:
    done, commands = gpu_check(tmp_path, PARTS="sanitizer", SANITIZER=str(tmp_path / "python"))
    assert done.returncode == 0, done.stdout + done.stderr
    (command,) = commands
    assert command[:2] == ["--error-exitcode", "9"] and command[-2:] == ["-m", "gpu.tiny"]


def test_gpu_check_asks_for_options_that_there_are(tmp_path: Path) -> None:
    _, commands = gpu_check(
        tmp_path, PARTS="kernels bits quik experts memory decode opt throughput prefill blocks peers"
    )
    assert len(commands) == 11
    for command in commands:
        result = invoke(app, [*command[2:], "--help"])  # an unknown option is found before --help is obeyed
        assert result.exit_code == 0, result.output
