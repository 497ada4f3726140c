"""A run that was stopped, anywhere and by any means, ends like one that was not: the same bytes, no block done twice,
and nothing under the final name before everything is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import build_tiny, save_tokenizer, tiny_config
from pipeline_oracle import TEXT, WIDE

from bitwright import blockwise
from bitwright.errors import OutputError
from bitwright.pipeline import quantize

BLOCKS = 3
SAME = ("model.safetensors", "config.json", "bitwright.json", "README.md")
RUNS: dict[str, dict[str, Any]] = {
    "gptq": {"scheme": "w4a16-g32"},
    "rtn": {"scheme": "w4a16-g32", "algorithm": "rtn"},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return str(file)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of three blocks in bfloat16."""
    folder = tmp_path_factory.mktemp("mixtral")
    build_tiny(tiny_config("mixtral", num_hidden_layers=BLOCKS, **WIDE["mixtral"])).bfloat16().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def arguments(text: str, **more: Any) -> dict[str, Any]:
    return {"calibration": text, "num_samples": 40, "seq_len": 64, **more}


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in SAME}


def blocks_solved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The list that fills with the name of every linear that is solved from now on."""
    solved: list[str] = []
    group, alone = blockwise.solve_group, blockwise.solve_data_free
    monkeypatch.setattr(
        blockwise,
        "solve_group",
        lambda entries, *a: solved.extend(e.linear.name for e in entries) or group(entries, *a),
    )
    monkeypatch.setattr(
        blockwise, "solve_data_free", lambda entry, *a: solved.append(entry.linear.name) or alone(entry, *a)
    )
    return solved


def stop_at(event: int, then: BaseException) -> Callable[..., None]:
    """A progress callback that raises at its call number `event`."""
    calls = iter(range(1_000_000))

    def progress(*_: Any) -> None:
        if next(calls) == event:
            raise then

    return progress


@pytest.mark.parametrize("kind", RUNS)
def test_interrupted_at_every_report(
    source: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    events: list[tuple[str, int]] = []
    whole = tmp_path / "whole"
    call = arguments(text, **RUNS[kind])
    result = quantize(source, whole, progress=lambda stage, done, *_: events.append((stage, done)), **call)
    expected = contents(whole)
    stage = "calibrate" if kind == "gptq" else "quantize"
    solving, writing = [(stage, i) for i in range(BLOCKS + 1)], [("write", i) for i in range(BLOCKS + 1)]
    assert events == solving + writing
    for i, (stage, done) in enumerate(events[:-1]):
        out = tmp_path / f"out{i}"
        with pytest.raises(KeyboardInterrupt):
            quantize(source, out, progress=stop_at(i, KeyboardInterrupt()), **call)
        assert not out.exists() and out.with_name(out.name + ".partial").is_dir(), (stage, done)
        finished = BLOCKS if stage == "write" else done
        with monkeypatch.context() as patch:
            solved = blocks_solved(patch)
            quantize(source, out, **call)
        wanted = [n for n in result.record["layers"] if int(n.split(".")[2]) >= finished]
        assert sorted(solved) == sorted(wanted), (stage, done)
        assert contents(out) == expected, (stage, done)
        assert not out.with_name(out.name + ".partial").exists()


def test_interrupted_inside_a_block_and_more_than_once(
    source: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block being worked on is lost, the ones before are not, however often it happens."""
    call = arguments(text, **RUNS["gptq"])
    quantize(source, tmp_path / "whole", **call)
    out, solved = tmp_path / "out", []
    real = blockwise.solve_group
    budget = 9

    def solve(entries: Any, *rest: Any) -> Any:
        nonlocal budget
        budget -= 1
        if budget < 0:
            raise KeyboardInterrupt
        solved.extend(e.linear.name for e in entries)
        return real(entries, *rest)

    monkeypatch.setattr(blockwise, "solve_group", solve)
    interruptions = 0
    while not out.exists():
        budget = 9 if interruptions % 2 else 3
        budget += 4 * interruptions
        try:
            quantize(source, out, **call)
        except KeyboardInterrupt:
            interruptions += 1
            assert not out.exists()
    assert interruptions >= 3
    assert contents(out) == contents(tmp_path / "whole")
    # a block is begun only when the one before is done, and then never again
    order = [int(name.split(".")[2]) for name in solved]
    assert order == sorted(order)


@pytest.mark.parametrize("kind", ["gptq", "recipe"])
def test_several_passes_give_the_bytes_of_one(
    source: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (tmp_path / "recipe.toml").write_text(
        '[[rule]]\nmatch = "q_proj"\nkeep = true\n[[rule]]\nmatch = "v_proj"\nscheme = "w8a16"\nalgorithm = "rtn"\n'
        '[[rule]]\nmatch = "."\nscheme = "w3a16-g32-asym"\n'
    )
    plans: list[bool] = []
    real = blockwise.run_block
    monkeypatch.setattr(
        blockwise, "run_block", lambda *a, one_pass, **k: plans.append(one_pass) or real(*a, one_pass=one_pass, **k)
    )
    call = arguments(text, **(RUNS["gptq"] if kind == "gptq" else {"recipe": tmp_path / "recipe.toml"}))
    quantize(source, tmp_path / "one", **call)
    assert plans == [True] * BLOCKS
    quantize(source, tmp_path / "several", max_memory="1MB", **call)
    assert plans == [True] * BLOCKS + [False] * BLOCKS
    assert contents(tmp_path / "one") == contents(tmp_path / "several")


def test_another_memory_plan_continues_a_run(source: Path, text: str, tmp_path: Path) -> None:
    call = arguments(text, **RUNS["gptq"])
    quantize(source, tmp_path / "whole", **call)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", progress=stop_at(1, KeyboardInterrupt()), **call)
    quantize(source, tmp_path / "out", max_memory="1MB", **call)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "scheme": ({"scheme": "w3a16-g32"}, "recipe"),
    "option": ({"options": {"damp_percent": 0.1}}, "recipe"),
    "seed": ({"seed": 7}, "calibration"),
    "dtype": ({"dtype": "float16"}, "dtype"),
    "format": ({"format": "native"}, "format"),
    "algorithm": ({"algorithm": "rtn"}, "recipe"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_options_do_not_continue_a_run(source: Path, text: str, tmp_path: Path, change: str) -> None:
    changed, word = CHANGES[change]
    call = arguments(text, **RUNS["gptq"])
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with pytest.raises(KeyboardInterrupt):
        quantize(source, out, progress=stop_at(2, KeyboardInterrupt()), **call)
    before = {p.name: p.read_bytes() for p in partial.iterdir()}
    with pytest.raises(OutputError, match=word) as caught:
        quantize(source, out, **call | changed)
    assert str(partial) in str(caught.value) and "overwrite" in str(caught.value)
    assert {p.name: p.read_bytes() for p in partial.iterdir()} == before  # still there to be finished
    quantize(source, out, overwrite=True, **call | changed)
    quantize(source, tmp_path / "fresh", **call | changed)
    assert contents(out) == contents(tmp_path / "fresh")
    assert not partial.exists()


def test_a_changed_source_does_not_continue_a_run(source: Path, text: str, tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(source, model)
    call = arguments(text, **RUNS["gptq"])
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "out", progress=stop_at(2, KeyboardInterrupt()), **call)
    build_tiny(tiny_config("mixtral", num_hidden_layers=BLOCKS, **WIDE["mixtral"]), seed=1).bfloat16().save_pretrained(
        model
    )
    with pytest.raises(OutputError, match="weights"):
        quantize(model, tmp_path / "out", **call)


# ------------------------------------------------------------------------------------------------------------- SIGKILL

# Runs once to the end, so that everything is imported, and forks for every further run, so that many kills cost little.
# argv: a JSON file with the job.
DRIVER = """
import json, os, random, shutil, signal, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from bitwright.pipeline import quantize

job = json.loads(Path(sys.argv[1]).read_text())
call = job["call"]
real = os.replace


def child(out, patch):
    pid = os.fork()
    if pid == 0:
        try:
            patch()
            quantize(job["source"], out, **call)
            os._exit(0)
        except BaseException as e:
            print(out, repr(e), file=sys.stderr, flush=True)
            os._exit(1)
    return pid


def status(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def dying(n, after):
    # SIGKILL before or after the n-th rename: the renames are the moments at which what is on disk changes meaning
    def patch():
        count = [0]
        def replace(a, b):
            count[0] += 1
            if count[0] == n and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            real(a, b)
            if count[0] == n:
                os.kill(os.getpid(), signal.SIGKILL)
        os.replace = replace
    return patch


results = []
root = Path(job["root"])
quantize(job["source"], root / "whole", **call)
begin = time.perf_counter()
assert status(child(root / "again", lambda: None)) == 0
whole = time.perf_counter() - begin
if job["kind"] == "renames":
    n, reached = 1, True
    while reached:
        for after in (False, True):
            out = root / f"kill-{n}-{after}"
            code = status(child(out, dying(n, after)))
            reached = code == -signal.SIGKILL
            results.append([str(out), [code], out.exists()])
            if reached and not out.exists():
                results[-1][1].append(status(child(out, lambda: None)))
        n += 1
else:
    generator = random.Random(0)
    for run in range(5):
        out, codes, early = root / f"random-{run}", [], False
        wait = whole * generator.uniform(0.1, 0.8)
        # killed past the last rename, a run has ended too
        while not codes or (codes[-1] == -signal.SIGKILL and not out.exists()):
            pid = child(out, lambda: None)
            time.sleep(wait)
            os.kill(pid, signal.SIGKILL)
            codes.append(status(pid))
            if len(codes) == 1 and out.exists():  # ended before the kill: once more, killed sooner
                shutil.rmtree(out)
                codes, wait = [], wait / 2
                continue
            wait *= 1.3  # later attempts get longer, so that each run ends
            early = early or (codes[-1] != 0 and out.exists() and not (out / "config.json").exists())
        results.append([str(out), codes, early])
print(json.dumps(results))
"""


def drive(kind: str, source: Path, text: str, tmp_path: Path) -> list[Any]:
    call = arguments(text, **RUNS["gptq"]) | {"num_samples": 8}
    job = {"kind": kind, "source": str(source), "root": str(tmp_path), "call": call}
    (tmp_path / "job.json").write_text(json.dumps(job))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path / "job.json")],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    print(done.stderr)  # pytest shows it with a failure
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_around_every_rename(tiny_folder: Callable[..., Path], text: str, tmp_path: Path) -> None:
    """Of a small model, because every rename is two runs and a half."""
    results = drive("renames", tiny_folder("llama"), text, tmp_path)
    expected = contents(tmp_path / "whole")
    assert len(results) > 2 * (1 + 3 * 2 + 1)  # the request, three files a block, the result
    for out, codes, existed in results:
        # what has the final name is complete, whenever the process died; else the next call finishes it
        assert existed or codes == [-9, 0], (out, codes)
        assert contents(Path(out)) == expected, out


def test_killed_at_random_moments(source: Path, text: str, tmp_path: Path) -> None:
    results = drive("random", source, text, tmp_path)
    expected = contents(tmp_path / "whole")
    for out, codes, early in results:
        assert codes[0] == -9 and codes[-1] in (-9, 0) and not early, (out, codes)
        assert contents(Path(out)) == expected, out
        assert codes[-1] == -9 or not Path(f"{out}.partial").exists()  # killed past the last rename, it may stay
