"""Bad input ends in one error of our tree, naming the thing and the way out, and leaves nothing that looks finished."""

from __future__ import annotations

import errno
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny, save_tokenizer, tiny_config
from pipeline_oracle import TEXT, WIDE, read, weights
from safetensors.torch import save_file

from bitwright.errors import (
    BitwrightError,
    CalibrationError,
    CheckpointError,
    FormatError,
    NumericsError,
    OutputError,
    RecipeError,
    SchemeError,
    StructureError,
)
from bitwright.pipeline import quantize

SMALL: dict[str, Any] = {"num_samples": 4, "seq_len": 64}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "gptq": {"scheme": "w4a16-g32"},
    "rtn": {"scheme": "w4a16-g32", "algorithm": "rtn"},
    "ladder": {"scheme": "w4a16", "algorithm": "finequant"},
    "budget": {"scheme": "w4a16", "algorithm": "finequant", "options": {"budget": 6.0}},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return str(file)


@pytest.fixture()
def model(tiny_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny Llama of its own, to be damaged."""
    return shutil.copytree(tiny_folder("llama", torch.bfloat16, **WIDE["llama"]), tmp_path / "model")


@pytest.fixture()
def sharded(tiny_folder: Callable[..., Path], tmp_path: Path) -> Path:
    folder = tiny_folder("llama", torch.bfloat16, max_shard_size="40KB", **WIDE["llama"])
    return shutil.copytree(folder, tmp_path / "sharded")


def refused(kind: type[BitwrightError], *words: str, model: Path | str, out: Path, **call: Any) -> str:
    """quantize raises exactly `kind` with all `words` in one line, and OUT is not there; returns the message."""
    before = None if not out.exists() else sorted(p.name for p in out.iterdir()) if out.is_dir() else out.read_bytes()
    with pytest.raises(BitwrightError) as caught:
        quantize(model, out, **SMALL | call)
    message = str(caught.value)
    assert type(caught.value) is kind, repr(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    after = None if not out.exists() else sorted(p.name for p in out.iterdir()) if out.is_dir() else out.read_bytes()
    assert before == after
    assert not list(out.parent.glob(f"{out.name}.partial/final/config.json"))
    return message


def change(folder: Path, **tensors: torch.Tensor) -> None:
    """Replace tensors of a single-file folder."""
    file = folder / "model.safetensors"
    save_file(weights(folder) | tensors, file, metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------------------ damaged source


def test_a_missing_shard(sharded: Path, text: str, tmp_path: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(
        CheckpointError,
        shard.name,
        "missing",
        model=sharded,
        out=tmp_path / "out",
        calibration=text,
        **ALGORITHMS["gptq"],
    )


def test_a_truncated_shard(sharded: Path, text: str, tmp_path: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(
        CheckpointError,
        shard.name,
        "truncated",
        model=sharded,
        out=tmp_path / "out",
        calibration=text,
        **ALGORITHMS["gptq"],
    )


def test_a_tensor_that_the_index_has_and_no_shard(sharded: Path, text: str, tmp_path: Path) -> None:
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    first = sorted(index["weight_map"].values())[0]
    file.write_text(json.dumps(index | {"weight_map": index["weight_map"] | {"model.ghost.weight": first}}))
    refused(
        CheckpointError,
        "model.ghost.weight",
        first,
        model=sharded,
        out=tmp_path / "out",
        calibration=text,
        **ALGORITHMS["gptq"],
    )


def test_a_parameter_that_is_nowhere(model: Path, text: str, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = weights(model)
    del tensors[name]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    refused(CheckpointError, name, model=model, out=tmp_path / "out", calibration=text, **ALGORITHMS["gptq"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_weight_that_is_not_finite(model: Path, text: str, tmp_path: Path, algorithm: str, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    W = weights(model)[name].clone()
    W[3, 5] = value
    change(model, **{name: W})
    message = refused(NumericsError, name, model=model, out=tmp_path / "out", calibration=text, **ALGORITHMS[algorithm])
    assert "1 NaN values of" in message or "1 Inf values of" in message or "1 of 8192 values are NaN or Inf" in message


@pytest.mark.parametrize("algorithm", ["gptq", "rtn"])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight", "model.norm.weight"]
)
def test_a_kept_tensor_that_is_not_finite(model: Path, text: str, tmp_path: Path, algorithm: str, name: str) -> None:
    t = weights(model)[name].clone()
    t.view(-1)[3] = float("nan")
    change(model, **{name: t})
    refused(NumericsError, name, model=model, out=tmp_path / "out", calibration=text, **ALGORITHMS[algorithm])
    assert not (tmp_path / "out.partial").exists()  # found before the long part


@pytest.mark.parametrize("name", ["model.layers.1.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_values_beyond_the_output_dtype(tmp_path: Path, text: str, name: str) -> None:
    """1e6 is nothing to bfloat16 and infinite in float16."""
    folder = tmp_path / "model"
    big = build_tiny(tiny_config("llama", **WIDE["llama"]))
    with torch.no_grad():
        big.get_parameter(name).view(-1)[7] = 1e6
    big.save_pretrained(folder)
    save_tokenizer(folder)
    call = {"scheme": "w8a16", "algorithm": "rtn", "dtype": "float16"}
    if "norm" in name:
        refused(NumericsError, name, "float16", "bfloat16", model=folder, out=tmp_path / "out", **call)
    quantize(folder, tmp_path / "bf16", **call | {"dtype": "auto"})


def test_tensors_that_the_model_does_not_use_may_hold_anything(model: Path, tmp_path: Path) -> None:
    """Old checkpoints carry causal masks of -inf."""
    name = "model.layers.0.self_attn.masked_bias"
    change(model, **{name: torch.tensor([float("-inf"), 1.0], dtype=torch.bfloat16)})
    result = quantize(model, tmp_path / "out", **ALGORITHMS["rtn"])
    assert torch.equal(weights(result.out)[name], weights(model)[name])


def test_activations_that_overflow_name_the_layer(model: Path, text: str, tmp_path: Path) -> None:
    name = "model.layers.1.post_attention_layernorm.weight"
    change(model, **{name: torch.full((64,), 3e38, dtype=torch.bfloat16)})
    refused(
        NumericsError,
        "model.layers.1.mlp.gate_proj",
        "activations",
        model=model,
        out=tmp_path / "out",
        calibration=text,
        **ALGORITHMS["gptq"],
    )


def test_pickled_weights(model: Path, text: str, tmp_path: Path) -> None:
    torch.save(weights(model), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    refused(
        CheckpointError,
        "pytorch_model.bin",
        "pickled",
        "safetensors",
        model=model,
        out=tmp_path / "out",
        **ALGORITHMS["rtn"],
    )


def test_a_source_that_is_quantized_already(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "once", **ALGORITHMS["rtn"])
    refused(
        CheckpointError,
        "once",
        "already quantized",
        model=tmp_path / "once",
        out=tmp_path / "twice",
        **ALGORITHMS["rtn"],
    )


def test_no_model_there(tmp_path: Path, model: Path) -> None:
    refused(CheckpointError, "nowhere", model=tmp_path / "nowhere", out=tmp_path / "out", **ALGORITHMS["rtn"])
    (model / "config.json").unlink()
    refused(CheckpointError, "config.json", model=model, out=tmp_path / "out", **ALGORITHMS["rtn"])
    (model / "config.json").write_text("{")
    refused(CheckpointError, "config.json", "JSON", model=model, out=tmp_path / "out", **ALGORITHMS["rtn"])


def test_a_model_without_linears(tmp_path: Path) -> None:
    """GPT-2 is built of Conv1D."""
    import transformers as tf

    config = tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=320, n_positions=64)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    refused(StructureError, "Conv1D", model=tmp_path / "gpt2", out=tmp_path / "out", **ALGORITHMS["rtn"])


# --------------------------------------------------------------------------------------------------- text and tokenizer


def test_text_that_is_missing_empty_or_too_short(model: Path, tmp_path: Path) -> None:
    call: dict[str, Any] = {"model": model, "out": tmp_path / "out", **ALGORITHMS["gptq"]}
    refused(CalibrationError, "gptq", "calibration", "rtn", **call)
    refused(CalibrationError, "nowhere.txt", calibration=str(tmp_path / "nowhere.txt"), **call)
    (tmp_path / "empty.txt").write_text("\n \n")
    refused(CalibrationError, "empty.txt", "no words", calibration=str(tmp_path / "empty.txt"), **call)
    (tmp_path / "short.txt").write_text("too short " * 10)
    message = refused(
        CalibrationError, "short.txt", "100 tokens", "256", calibration=str(tmp_path / "short.txt"), **call
    )
    assert "at most 1 samples" in message
    (tmp_path / "text.csv").write_text(TEXT)
    refused(CalibrationError, "text.csv", ".csv", calibration=str(tmp_path / "text.csv"), **call)


def test_sequences_longer_than_the_model_has_positions(
    tiny_folder: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    """OPT learns one vector per position: the 129th has none."""
    folder = tiny_folder("opt", torch.bfloat16, **WIDE["opt"])
    refused(
        CalibrationError,
        "seq_len 200",
        "128",
        model=folder,
        out=tmp_path / "out",
        calibration=text,
        scheme="w4a16-g32",
        seq_len=200,
    )


def test_no_tokenizer_or_a_wrong_one(model: Path, text: str, tmp_path: Path) -> None:
    call: dict[str, Any] = {"model": model, "out": tmp_path / "out", "calibration": text, **ALGORITHMS["gptq"]}
    file = model / "tokenizer.json"
    held = json.loads(file.read_text())
    vocab = {t: i * 1000 for t, i in held["model"]["vocab"].items()}
    file.write_text(json.dumps(held | {"model": held["model"] | {"vocab": vocab}, "added_tokens": []}))
    refused(CheckpointError, "tokenizer", "320", **call)
    for old in model.glob("*token*"):
        old.unlink()
    refused(CheckpointError, "tokenizer", str(model), **call)


# ------------------------------------------------------------------------------------------------------- what is asked


@pytest.mark.parametrize(
    ("kind", "words", "call"),
    [
        (SchemeError, ("bits 5", "(2, 3, 4, 8)"), {"scheme": "w5a16"}),
        (SchemeError, ("4 bit", "w4a16-g128"), {"scheme": "4 bit"}),
        (SchemeError, ("damping", "damp_percent"), {"scheme": "w4a16", "options": {"damping": 0.1}}),
        (SchemeError, ("act_order", "sideways", "group"), {"scheme": "w4a16", "options": {"act_order": "sideways"}}),
        (SchemeError, ("damp_percent", "'much'"), {"scheme": "w4a16", "options": {"damp_percent": "much"}}),
        (SchemeError, ("search", "mse"), {"scheme": "w4a16", "algorithm": "rtn", "options": {"search": "best"}}),
        (SchemeError, ("grid", "search"), {"scheme": "w4a16", "algorithm": "rtn", "options": {"grid": 1}}),
        (SchemeError, ("budgets", "budget"), {"scheme": "w4a16", "algorithm": "finequant", "options": {"budgets": 4}}),
        (SchemeError, ("budget", "raise"), {"scheme": "w4a16", "algorithm": "finequant", "options": {"budget": 3}}),
        (SchemeError, ("budget", "'4'"), {"scheme": "w4a16", "algorithm": "finequant", "options": {"budget": "4"}}),
        (SchemeError, ("sink_weight", "-1"), {"scheme": "w4a16", "options": {"sink_weight": -1}}),
        (SchemeError, ("rounds", "0.5"), {"scheme": "w4a16", "options": {"rounds": 0.5}}),
        (SchemeError, ("block_size",), {"scheme": "w4a16", "options": {"block_size": 0}}),
        (SchemeError, ("groups", "list"), {"scheme": "w4a16", "algorithm": "finequant", "options": {"groups": 64}}),
        (SchemeError, ("w8a8", "gptq"), {"scheme": "w8a8", "algorithm": "finequant"}),
        (SchemeError, ("w8a8", "gptq"), {"scheme": "w8a8", "algorithm": "finequant", "options": {"budget": 8}}),
        (RecipeError, ("awq", "gptq"), {"scheme": "w4a16", "algorithm": "awq"}),
        (SchemeError, ("float99", "bfloat16"), {"scheme": "w4a16", "dtype": "float99"}),
        (FormatError, ("gguf", "native"), {"scheme": "w4a16", "format": "gguf"}),
        (BitwrightError, ("nonsense", "cpu"), {"scheme": "w4a16", "device": "nonsense"}),
        (BitwrightError, ("cuda:99", "cpu"), {"scheme": "w4a16", "device": "cuda:99"}),
        (CalibrationError, ("lots", "8GB"), {"scheme": "w4a16", "max_memory": "lots"}),
        (CalibrationError, ("lots", "8GB"), {"scheme": "w4a16", "algorithm": "rtn", "max_memory": "lots"}),
        (CalibrationError, ("seq_len 1",), {"scheme": "w4a16", "seq_len": 1}),
        (CalibrationError, ("0 windows",), {"scheme": "w4a16", "num_samples": 0}),
        (RecipeError, ("scheme", "recipe"), {}),
    ],
)
def test_options_that_mean_nothing(
    model: Path, text: str, tmp_path: Path, kind: type[BitwrightError], words: tuple[str, ...], call: dict[str, Any]
) -> None:
    refused(kind, *words, model=model, out=tmp_path / "out", calibration=text, **call)
    assert not (tmp_path / "out.partial").exists()  # refused before anything began


def test_recipes_that_cannot_be_followed(model: Path, text: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    call: dict[str, Any] = {"model": model, "out": tmp_path / "out", "calibration": text, "recipe": file}
    refused(RecipeError, "recipe.toml", **call)
    file.write_text('[[rule]]\nmatch = "."\nscheme = "w4a16-g32"\n[[rule]]\nmatch = "up_projj"\nkeep = true\n')
    refused(RecipeError, "up_projj", "matches none", "up_proj", **call)
    file.write_text('[[rule]]\nmatch = "."\nkeep = true\n')
    refused(RecipeError, "nothing to quantize", **call)
    file.write_text('[[rule]\nmatch = "."\n')
    refused(RecipeError, "recipe.toml", "TOML", **call)
    file.write_text('[[rule]]\nmatch = "."\nscheme = "w4a16-g32"\n')
    refused(RecipeError, "not both", scheme="w4a16-g32", **call)


def test_a_group_that_does_not_divide_the_width(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_folder("llama", torch.bfloat16)
    call: dict[str, Any] = {"scheme": "w4a16-g32", "algorithm": "rtn"}
    asked = call | {"format": "compressed-tensors"}
    refused(FormatError, "down_proj", "32", "48", "native", model=folder, out=tmp_path / "out", **asked)
    result = quantize(folder, tmp_path / "out", **call)
    assert result.record["format"] == "native"
    assert any("down_proj" in note and "48" in note for note in result.record["portability"])


# ----------------------------------------------------------------------------------------------------------- the output


def test_an_output_folder_in_use(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("keep me")
    refused(OutputError, str(out), "not empty", "overwrite", model=model, out=out, **ALGORITHMS["rtn"])
    refused(OutputError, str(out), "config.json", model=model, out=out, overwrite=True, **ALGORITHMS["rtn"])
    file = tmp_path / "file"
    file.write_text("a file")
    for overwrite in (False, True):
        refused(OutputError, str(file), "is a file", model=model, out=file, overwrite=overwrite, **ALGORITHMS["rtn"])
    refused(OutputError, "file", model=model, out=file / "below", **ALGORITHMS["rtn"])
    assert not list(tmp_path.glob("*.partial"))
    quantize(model, tmp_path / "again", **ALGORITHMS["rtn"])
    refused(OutputError, "again", "not empty", model=model, out=tmp_path / "again", **ALGORITHMS["rtn"])
    result = quantize(model, tmp_path / "again", overwrite=True, scheme="w8a16", algorithm="rtn")
    assert result.record["scheme"] == "w8a16" and set(read(result.out).schemes.values()) != set()
    empty = tmp_path / "empty"
    empty.mkdir()
    assert quantize(model, empty, **ALGORITHMS["rtn"]).out == empty


@pytest.mark.parametrize("place", ["model", "model/..", "."])
def test_the_source_is_never_overwritten(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(model)
    (tmp_path / "config.json").write_text("{}")
    out = Path(place) if place == "." else tmp_path / place
    before = weights(model)
    refused(OutputError, "source", model=model, out=out, overwrite=True, **ALGORITHMS["rtn"])
    assert weights(model).keys() == before.keys()


def finishes_now(model: Path, out: Path, **call: Any) -> None:
    """With space again, the same call continues and ends as if nothing had been."""
    whole = out.with_name("whole")
    quantize(model, out, **SMALL | call)
    quantize(model, whole, **SMALL | call)
    for name in ("model.safetensors", "config.json", "bitwright.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["part", "record", "weights", "companions", "config"])
def test_a_full_disk_anywhere(
    model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    from bitwright import evidence, run_folder
    from bitwright.models import shards

    call = {"calibration": text, **ALGORITHMS["gptq"]}
    targets: dict[str, tuple[Any, str]] = {
        "part": (run_folder, "save_file"),
        "record": (run_folder, "_write"),
        "weights": (shards, "_copy_range"),
        "companions": (Path, "write_bytes"),
        "config": (evidence, "_dump"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*targets[where], full)
        refused(OutputError, "No space left", "free space", model=model, out=tmp_path / "out", **call)
    finishes_now(model, tmp_path / "out", **call)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that exists and gives a read error")
def test_a_file_to_come_along_that_cannot_be_read(model: Path, text: str, tmp_path: Path) -> None:
    """The source is to blame, not the output; and it is known before the long part."""
    (model / "LICENSE").symlink_to("/proc/self/mem")
    call = {"calibration": text, **ALGORITHMS["gptq"]}
    message = refused(CheckpointError, "LICENSE", "cannot be read", model=model, out=tmp_path / "out", **call)
    assert "written" not in message and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("limit", [3_000, 20_000, 60_000])
def test_a_file_system_that_really_refuses(model: Path, text: str, tmp_path: Path, limit: int) -> None:
    """Files may not grow beyond `limit` bytes: the system's own error, in safetensors' writer and in ours."""
    call = {"calibration": text, **ALGORITHMS["gptq"]}
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        refused(OutputError, "cannot", "free space", model=model, out=tmp_path / "out", **call)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    finishes_now(model, tmp_path / "out", **call)
