"""The command line: what goes to stdout and stderr, exit codes, JSON, and that --help loads nothing heavy."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from bitwright.cli import app, options, output
from bitwright.cli.inspect import suggested_scheme
from bitwright.errors import RecipeError

run = CliRunner().invoke
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 12


@pytest.fixture(scope="module")
def folder(tiny_folder) -> Path:
    return tiny_folder("llama")


@pytest.fixture()
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def last_json(stdout: str) -> dict:
    return json.loads(stdout.splitlines()[-1])


@pytest.mark.parametrize("command", ["inspect", "quantize", "evaluate", "generate"])
def test_help_teaches_with_an_example(command: str) -> None:
    result = run(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"bitwright {command} " in result.stdout.split("Usage:")[1].split("\n", 1)[1]
    assert "--json" in result.stdout


def test_help_is_quick_and_loads_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['bitwright', 'quantize', '--help']\n"
        "from bitwright.cli import main\n"
        "try: main()\n"
        "except SystemExit as e: print('exit', e.code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "exit 0 False False", done.stderr


def test_module_entry_and_version() -> None:
    done = subprocess.run([sys.executable, "-m", "bitwright.cli", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("bitwright 0.")


def test_our_errors_are_one_line_and_exit_1(tmp_path: Path) -> None:
    result = run(app, ["evaluate", str(tmp_path / "none"), "--text", "x.txt"])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert "none" in result.stderr and "Traceback" not in result.stderr


def test_debug_lets_the_error_through(tmp_path: Path) -> None:
    result = run(app, ["inspect", str(tmp_path / "none"), "--debug"])
    assert type(result.exception).__name__ == "CheckpointError"


def test_bugs_are_not_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import bitwright.models.source

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(bitwright.models.source, "resolve", broken)
    assert isinstance(run(app, ["inspect", str(tmp_path)]).exception, ZeroDivisionError)


def test_usage_mistakes_exit_2() -> None:
    assert run(app, ["generate", "model"]).exit_code == 2
    assert run(app, ["evaluate", "model", "--seq-len", "many"]).exit_code == 2


def test_evaluate_json(folder: Path, text: Path) -> None:
    command = ["evaluate", str(folder), "--text", str(text), "--reference", str(folder), "--seq-len", "64"]
    result = run(app, [*command, "--num-windows", "3", "--json"])
    assert result.exit_code == 0, result.stderr
    values = last_json(result.stdout)
    assert len(result.stdout.splitlines()) == 1
    assert values["command"] == "evaluate"
    assert (values["num_windows"], values["scored_tokens"], values["device"]) == (3, 189, "cpu")
    assert values["quality"]["perplexity"]["mean"] > 1
    assert values["quality"]["perplexity"]["standard_error"] > 0
    assert values["divergence"]["kl"]["mean"] == 0 and values["divergence"]["top1_agreement"]["mean"] == 1
    assert values["peak_memory_bytes"] > 50e6 and values["seconds"] > 0
    assert "evaluate 3/3" in result.stderr
    people = run(app, [*command, "--num-windows", "3"])
    assert people.exit_code == 0, people.stderr
    assert "perplexity" in people.stdout and "±" in people.stdout and "3 of 13, 64 tokens each" in people.stdout


def test_generate(folder: Path) -> None:
    command = ["generate", str(folder), "--prompt", "It was", "--max-new-tokens", "5"]
    values = last_json(run(app, [*command, "--json"]).stdout)
    assert values["prompt"] == "It was" and 1 <= len(values["tokens"]) <= 5
    people = run(app, command)
    assert people.stdout == f"It was{values['text']}\n"
    assert "tokens; first after" in people.stderr


def test_inspect_plain(folder: Path) -> None:
    values = last_json(run(app, ["inspect", str(folder), "--json"]).stdout)
    assert values["quantized"] is False
    assert (values["num_blocks"], values["num_linears"]) == (2, 14)
    assert values["weights_bytes"] == (folder / "model.safetensors").stat().st_size
    people = run(app, ["inspect", str(folder)]).stdout
    lines = [" ".join(line.split()) for line in people.splitlines()]
    assert "model.layers.*.self_attn.q_proj 2 [32, 32] no Linear 2048" in lines
    assert "model class LlamaForCausalLM" in lines and "blocks 2 LlamaDecoderLayer in model.layers" in lines


def test_inspect_draws_experts_together(tiny_folder) -> None:
    people = run(app, ["inspect", str(tiny_folder("mixtral"))]).stdout
    lines = [" ".join(line.split()) for line in people.splitlines()]
    assert any(re.match(r"experts \d+ of the linears, in \d+ stacks of \d+$", line) for line in lines)
    assert sum(".experts.*." in line for line in lines) == 3
    assert any("router: its outputs choose the experts" in line for line in lines)


@pytest.mark.parametrize(
    ("widths", "scheme"), [((576, 1536), "w4a16-g64"), ((256, 512), "w4a16-g128"), ((48,), "w4a16")]
)
def test_suggested_scheme(widths: tuple[int, ...], scheme: str) -> None:
    assert str(suggested_scheme(widths)) == scheme


def test_the_size_that_inspect_foretells_is_the_size_that_comes(folder: Path, tmp_path: Path) -> None:
    told = re.search(r"size at (\S+) +about (\S+) kB", run(app, ["inspect", str(folder)]).stdout)
    assert told is not None
    command = ["quantize", str(folder), "--out", str(tmp_path / "out"), "--scheme", told[1], "--algorithm", "rtn"]
    assert run(app, command).exit_code == 0
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as f:
        tensors = {key: f.get_tensor(key) for key in f.keys() if not key.endswith("_shape")}  # noqa: SIM118
    assert sum(t.nbytes for t in tensors.values()) / 1000 == pytest.approx(float(told[2]), rel=0.02)


def test_inspect_quantized_shows_the_record(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}')
    values = last_json(run(app, ["inspect", str(tmp_path), "--json"]).stdout)
    assert values["quantization_config"] == {"quant_method": "gptq"}
    assert "readable by bitwright  no: quant_method 'gptq'" in run(app, ["inspect", str(tmp_path)]).stdout
    layers = {
        f"model.layers.{i}.mlp.experts.{e}.w1": {
            **{"scheme": "w4a16-g64", "algorithm": "gptq", "bits_per_weight": 4.25},
            **{"relative_error": 0.0123456 * (1 + i), "tokens": 10 * e},
            **({} if e else {"fallback": "rtn: calibration sent 0 tokens here"}),
        }
        for i in range(2)
        for e in range(4)
    }
    record = {
        **{"scheme": "w4a16-g64", "algorithm": "gptq", "bits_per_weight": 4.5, "quantized_weights": 1024},
        **{"parameters": 4096, "quantized_layers": 8, "portability": ["bitwright: loads it", "vLLM: cannot: too old"]},
        "options": {"gptq": {"rounds": None, "order": "activation"}},
        "request": {"model": "m", "versions": {"bitwright": "0.1"}, "dtype": "float16", "format": "native"},
        "layers": layers,
        "kept": [
            {"name": "lm_head", "reason": "no rule names lm_head"},
            {"name": "lm_head.weight", "reason": "the output head"},
        ],
    }
    record["request"]["calibration"] = {"num_samples": 8, "seq_len": 64, "source": "a.txt", "seed": 3}
    (tmp_path / "bitwright.json").write_text(json.dumps(record))
    values = last_json(run(app, ["inspect", str(tmp_path), "--json"]).stdout)
    assert values["quantized"] is True and values["layers"] == layers
    people = run(app, ["inspect", str(tmp_path)]).stdout
    lines = [" ".join(line.split()) for line in people.splitlines()]
    assert "model.layers.*.mlp.experts.*.w1 8 w4a16-g64 gptq 4.25 0.01852 0.02469 0 to 30" in lines
    assert [line.split()[0] for line in lines if "sent 0 tokens" in line] == [n for n in layers if ".experts.0." in n]
    assert "lm_head 1 no rule names lm_head; the output head" in lines
    assert "vLLM cannot: too old" in lines and "options gptq: rounds=auto, order=activation" in lines
    assert "calibration 8 × 64 tokens of a.txt, seed 3" in lines
    del record["request"]
    (tmp_path / "bitwright.json").write_text(json.dumps(record))
    assert "is not a record of this version" in run(app, ["inspect", str(tmp_path)]).stderr
    assert last_json(run(app, ["inspect", str(tmp_path), "--json"]).stdout)["layers"] == layers
    (tmp_path / "bitwright.json").write_text("{")
    assert "is not valid JSON" in run(app, ["inspect", str(tmp_path)]).stderr


@pytest.fixture()
def recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list:
    """Replaces the pipeline by one that notes its arguments and writes a small folder."""
    import bitwright

    calls: list = []

    def quantize(model: str, out: Path, **settings: object) -> SimpleNamespace:
        calls.append((model, out, settings))
        progress = settings["progress"]
        for i in range(3):
            progress("quantize", i, 2, f"block {i}")
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"x" * 1234)
        record = {"scheme": "w4a16-g64", "bits_per_weight": 4.25, "layers": {"a": {"error": 0.1}}}
        return SimpleNamespace(out=out, record=record, run={"seconds": 1.5})

    module = SimpleNamespace(quantize=quantize)
    monkeypatch.setitem(sys.modules, "bitwright.pipeline", module)
    monkeypatch.setattr(bitwright, "pipeline", module, raising=False)
    return calls


def test_quantize_hands_everything_on(recorded: list, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["quantize", "model", "--out", str(out), "--scheme", "w4a16-g64", "--calibration", "sotu:1934-1999"]
    command += ["--option", "damp_percent=0.05", "--option", "act_order=false", "--option", "order=gar"]
    command += ["--num-samples", "8", "--seq-len", "64", "--seed", "3", "--format", "native", "--max-memory", "2GB"]
    result = run(app, [*command, "--overwrite", "--json"])
    assert result.exit_code == 0, result.stderr
    (model, where, settings), *more = recorded
    assert not more
    assert (model, where) == ("model", out)
    assert settings.pop("progress") is not None
    assert settings == {
        "scheme": "w4a16-g64",
        "algorithm": "gptq",
        "recipe": None,
        "calibration": "sotu:1934-1999",
        "num_samples": 8,
        "seq_len": 64,
        "seed": 3,
        "options": {"damp_percent": 0.05, "act_order": False, "order": "gar"},
        "format": "native",
        "device": "auto",
        "dtype": "auto",
        "max_memory": "2GB",
        "overwrite": True,
        "trust_remote_code": False,
    }
    values = last_json(result.stdout)
    assert (values["out"], values["weights_bytes"], values["bits_per_weight"]) == (str(out), 1234, 4.25)
    assert values["run"] == {"seconds": 1.5}
    assert "layers" not in values
    assert result.stderr.splitlines() == ["quantize 0/2 block 0", "quantize 2/2 block 2"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "either --scheme"),
        (["--scheme", "w8a8", "--recipe", "r.toml"], "and not both"),
        (["--recipe", "r.toml", "--algorithm", "rtn"], "go into the rules of r.toml"),
        (["--scheme", "w8a8", "--option", "damp"], "'damp' is not key=value"),
    ],
)
def test_quantize_refuses(recorded: list, tmp_path: Path, more: list[str], message: str) -> None:
    result = run(app, ["quantize", "model", "--out", str(tmp_path / "out"), *more])
    assert result.exit_code == 1
    assert message in result.stderr
    assert recorded == []


@pytest.mark.parametrize(("scheme", "more"), [("w4a16-g16", ["--algorithm", "gptq"]), ("w8a8", ["--algorithm", "rtn"])])
def test_the_whole_story(folder: Path, text: Path, tmp_path: Path, scheme: str, more: list[str]) -> None:
    """quantize, inspect, evaluate against the source, generate: through the real pipeline on a tiny model."""
    out = tmp_path / "quantized"
    if "gptq" in more:
        more = [*more, "--calibration", str(text), "--num-samples", "4", "--seq-len", "64"]
    result = run(app, ["quantize", str(folder), "--out", str(out), "--scheme", scheme, *more, "--json"])
    assert result.exit_code == 0, result.stderr
    made = last_json(result.stdout)
    assert made["weights_bytes"] == (out / "model.safetensors").stat().st_size
    # 16 bits of scale per 16 inputs; per row of 32 (48 in down_proj) inputs.
    low, high = {"w4a16-g16": (5.0, 5.0), "w8a8": (8 + 16 / 48, 8 + 16 / 32)}[scheme]
    assert low <= made["bits_per_weight"] <= high
    inspected = last_json(run(app, ["inspect", str(out), "--json"]).stdout)
    assert inspected["quantized"] is True
    assert inspected["bits_per_weight"] == made["bits_per_weight"]
    command = ["evaluate", str(out), "--text", str(text), "--reference", str(folder), "--seq-len", "64", "--json"]
    values = last_json(run(app, command).stdout)
    assert 0 < values["divergence"]["kl"]["mean"] < 0.1
    assert values["divergence"]["top1_agreement"]["mean"] > 0.5
    told = last_json(run(app, ["generate", str(out), "--prompt", "It", "--max-new-tokens", "3", "--json"]).stdout)
    assert len(told["tokens"]) >= 1
    assert (values["dtype"], told["dtype"]) == ("float32", "bfloat16")  # evaluation is exact, generation is fast
    again = run(app, ["quantize", str(folder), "--out", str(out), "--scheme", scheme, *more])
    assert again.exit_code == 1 and str(out) in again.stderr


def test_pairs() -> None:
    pairs = ["a=1", "b=0.5", "c=true", "d=null", "e=x=y", "f=", "g=[1, 2]"]
    expected = {"a": 1, "b": 0.5, "c": True, "d": None, "e": "x=y", "f": "", "g": [1, 2]}
    assert options.parse_pairs(pairs) == expected
    with pytest.raises(RecipeError, match="given twice"):
        options.parse_pairs(["a=1", "a=2"])


def test_progress_lines_say_how_long() -> None:
    now = 0.0
    lines: list[str] = []
    update = output.progress_lines(lines.append, lambda: now)
    for done in range(0, 101):
        now = done * 2.0
        update("quantize", done, 100, f"block {done}")
    assert lines[0] == "quantize 0/100 block 0"
    assert lines[1] == "quantize 3/100 block 3 (3m14s left)"  # the first after 5 seconds
    assert lines[-1] == "quantize 100/100 block 100"
    assert len(lines) == 35


def test_a_resumed_stage_counts_only_new_work() -> None:
    now = 0.0
    lines: list[str] = []
    update = output.progress_lines(lines.append, lambda: now)
    update("quantize", 20, 30, "")
    now = 10.0
    update("quantize", 25, 30, "")
    assert lines == ["quantize 20/30", "quantize 25/30 (10s left)"]


def test_numbers_for_people() -> None:
    assert [output.size(n) for n in (0, 999, 1000, 98_400_000, 4.19e9, 2e12)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "98.4 MB",
        "4.2 GB",
        "2.0 TB",
    ]
    assert [output.duration(s) for s in (0.4, 59, 61, 3599, 7500)] == ["0s", "59s", "1m01s", "59m59s", "2h05m"]


def test_peak_memory_is_this_process_alone() -> None:
    """A small child of a large parent reports its own size."""
    ballast = bytearray(300_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])
    code = "from bitwright.cli.output import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.peak_memory() > 300e6
    assert 5e6 < int(done.stdout) < 200e6
    del ballast


@pytest.fixture()
def custom_code(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama under a model type of its own, whose classes lie in its folder."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    custom = shutil.copytree(folder, tmp_path / "custom")
    (custom / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((custom / "config.json").read_text()) | {"model_type": "own_llama"}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (custom / "config.json").write_text(json.dumps(config))
    return custom


def test_custom_code_runs_only_when_trusted(custom_code: Path, text: Path) -> None:
    for command in (
        ["evaluate", str(custom_code), "--text", str(text), "--seq-len", "64", "--num-windows", "1"],
        ["generate", str(custom_code), "--prompt", "It was", "--max-new-tokens", "2"],
    ):
        refused = run(app, [*command, "--json"], input="n\n")
        assert refused.exit_code == 1 and len(refused.stderr.splitlines()) >= 1, command
        assert run(app, [*command, "--trust-remote-code", "--json"]).exit_code == 0, command
