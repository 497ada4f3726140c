"""What a finished folder says about itself is true: an entry per matrix, tokens per expert, named fallbacks, bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny, save_tokenizer, tiny_config
from pipeline_oracle import TEXT, WIDE, module_name, read, weights

from bitwright.calibrate.data import Text
from bitwright.models.load import open_model
from bitwright.pipeline import Result, quantize
from bitwright.solve import MIN_EXPERT_TOKENS

NUM_SAMPLES, SEQ_LEN = 8, 64


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return str(file)


def run(source: Path, out: Path, text: str, scheme: str = "w4a16-g32", **more: Any) -> Result:
    return quantize(
        source, out, **{"calibration": text, "num_samples": NUM_SAMPLES, "seq_len": SEQ_LEN} | more, scheme=scheme
    )


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2_moe"])
def test_one_entry_per_matrix_in_order(
    tiny_folder: Callable[..., Path], text: str, tmp_path: Path, family: str
) -> None:
    source = tiny_folder(family, torch.bfloat16, **WIDE[family])
    record = run(source, tmp_path / "out", text).record
    structure = open_model(source).structure
    assert list(record["layers"]) == [x.name for x in structure.linears]
    assert record["quantized_layers"] == len(structure.linears)
    assert record["quantized_weights"] == sum(x.numel for x in structure.linears)
    original = weights(source)
    assert record["parameters"] == sum(t.numel() for t in original.values())
    kept = [k["name"] for k in record["kept"]]
    assert len(kept) == len(set(kept)) and all(k["reason"] for k in record["kept"])
    # every matrix of the source is either quantized or kept with a reason
    quantized = {module_name(n) for n in read(tmp_path / "out").matrices}
    assert quantized == set(record["layers"])
    matrices = {module_name(n).removesuffix(".weight") for n, t in original.items() if t.ndim == 2}
    assert matrices - quantized <= {k.removesuffix(".weight") for k in kept}


def test_errors_are_those_of_the_stored_matrices(tiny_folder: Callable[..., Path], text: str, tmp_path: Path) -> None:
    source = tiny_folder("qwen3_moe", torch.bfloat16, **WIDE["qwen3_moe"])
    layers = run(source, tmp_path / "out", text, "w3a16-g32").record["layers"]
    original = weights(source)
    for name, qt in read(tmp_path / "out").matrices.items():
        W = original[f"{name}.weight"].float()
        error = float((qt.dequantize() - W).norm() / W.norm())
        assert layers[name]["relative_error"] == pytest.approx(error, rel=1e-4), name
        assert layers[name]["bits_per_weight"] == qt.bits_per_weight


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w3a16-g32-asym", "w8a16", "w8a8", "w2a16-g64"])
@pytest.mark.parametrize("format", [None, "native"])
def test_bits_per_weight_are_the_bytes_on_disk(
    tiny_folder: Callable[..., Path], tmp_path: Path, scheme: str, format: str | None
) -> None:
    source = tiny_folder("llama", torch.bfloat16, **WIDE["llama"])
    record = quantize(source, tmp_path / "out", scheme=scheme, algorithm="rtn", format=format).record
    stored = 8 * read(tmp_path / "out").stored / record["quantized_weights"]
    assert record["bits_per_weight"] == pytest.approx(stored, abs=1e-6)


def test_bits_per_weight_of_mixed_schemes(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_folder("mixtral", torch.bfloat16, **WIDE["mixtral"])
    options = {"budget": 5.0, "groups": [64, 32], "bits": [3, 4, 8]}
    record = quantize(source, tmp_path / "out", scheme="w4a16", algorithm="finequant", options=options).record
    stored = 8 * read(tmp_path / "out").stored / record["quantized_weights"]
    assert record["bits_per_weight"] == pytest.approx(stored, abs=1e-6)
    assert 4.0 < stored <= 5.0  # and the budget is kept, with little left over


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_tokens_per_expert(tiny_folder: Callable[..., Path], text: str, tmp_path: Path, family: str) -> None:
    """Each token goes to top-k experts, so an MoE layer's counts add up; other linears see every token."""
    source = tiny_folder(family, torch.bfloat16, **WIDE[family])
    layers = run(source, tmp_path / "out", text).record["layers"]
    for block in open_model(source).structure.blocks:
        for x in block.linears:
            assert layers[x.name]["tokens"] == NUM_SAMPLES * SEQ_LEN
        for stack in block.experts:
            for kind in (stack.gate, stack.up, stack.down):
                tokens = [layers[x.name]["tokens"] for x in kind]
                assert sum(tokens) == 2 * NUM_SAMPLES * SEQ_LEN
                assert tokens == [layers[x.name]["tokens"] for x in stack.up]


@pytest.fixture(scope="module")
def lopsided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A top-1 Mixtral that never chooses experts 2 and 3: their logits are between v.x and -v.x."""
    folder = tmp_path_factory.mktemp("lopsided")
    model = build_tiny(tiny_config("mixtral", num_experts_per_tok=1, **WIDE["mixtral"]))
    with torch.no_grad():
        for layer in model.model.layers:
            gate = layer.mlp.gate.weight
            gate[1], gate[2], gate[3] = -gate[0], 0.5 * gate[0], 0.0
    model.bfloat16().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_experts_without_tokens_get_a_named_fallback(lopsided: Path, text: str, tmp_path: Path) -> None:
    result = run(lopsided, tmp_path / "out", text)
    rounded = run(lopsided, tmp_path / "rtn", text, algorithm="rtn")
    layers = result.record["layers"]
    idle = [n for n in layers if ".experts.2." in n or ".experts.3." in n]
    assert len(idle) == 2 * 2 * 3
    assert all(layers[n]["tokens"] == 0 for n in idle)
    few = [n for n in layers if layers[n]["tokens"] < MIN_EXPERT_TOKENS]
    assert set(idle) <= set(few) and len(few) < len(layers) / 2
    assert [n for n in layers if "fallback" in layers[n]] == few
    for name in few:
        assert f"sent {layers[name]['tokens']} tokens" in layers[name]["fallback"]
        assert f"fewer than {MIN_EXPERT_TOKENS}" in layers[name]["fallback"]
    assert result.record["fallbacks"] == len(few)
    assert f"{len(few)} matrices took a fallback" in (result.out / "README.md").read_text()
    # the fallback is what it says: the codes of round-to-nearest; the others were really calibrated
    ours, theirs = read(result.out).matrices, read(rounded.out).matrices
    for name, qt in ours.items():
        assert torch.equal(qt.codes, theirs[name].codes) == (module_name(name) in few), name


def test_what_varies_stands_apart(tiny_folder: Callable[..., Path], text: str, tmp_path: Path) -> None:
    """Two runs differ in bitwright-run.json (and the card that quotes nothing of it) only."""
    source = tiny_folder("llama", torch.bfloat16, **WIDE["llama"])
    first, second = (run(source, tmp_path / name, text) for name in ("a", "b"))
    names = sorted(p.name for p in first.out.iterdir())
    assert names == sorted(p.name for p in second.out.iterdir())
    assert {"config.json", "model.safetensors", "bitwright.json", "bitwright-run.json", "README.md"} <= set(names)
    assert {p.name for p in source.glob("tokenizer*")} <= set(names)
    different = [n for n in names if (first.out / n).read_bytes() != (second.out / n).read_bytes()]
    assert different == ["bitwright-run.json"]
    run_record = json.loads((first.out / "bitwright-run.json").read_text())
    assert run_record == first.run and run_record["seconds"] > 0 and run_record["peak_rss_bytes"] > 1 << 20
    third = run(source, tmp_path / "c", text, seed=1)
    assert (
        third.record["request"]["calibration"]["tokens_sha256"]
        != first.record["request"]["calibration"]["tokens_sha256"]
    )
    assert (third.out / "model.safetensors").read_bytes() != (first.out / "model.safetensors").read_bytes()


def test_nothing_in_a_folder_tells_where_it_was_made(
    tiny_folder: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    source = tiny_folder("llama", torch.bfloat16, **WIDE["llama"])
    out = run(source, tmp_path / "out", text).out
    for file in out.glob("*.json"):
        assert str(tmp_path) not in file.read_text() and str(source.parent) not in file.read_text(), file.name


def test_a_local_model_is_called_by_its_folder(
    tiny_folder: Callable[..., Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(tiny_folder("llama", torch.bfloat16, **WIDE["llama"]), tmp_path / "my-model")
    monkeypatch.chdir(model)
    request = run(Path("."), tmp_path / "out", text).record["request"]
    assert (request["model"], request["revision"]) == ("my-model", None)
    assert request["calibration"]["source"] == "text.txt"


def test_a_hub_model_is_called_by_its_name_and_commit(
    tiny_folder: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--some-org--Model-1.5" / "snapshots" / commit
    shutil.copytree(tiny_folder("llama", torch.bfloat16, **WIDE["llama"]), snapshot)
    result = run(snapshot, tmp_path / "out", text)
    request = result.record["request"]
    assert (request["model"], request["revision"]) == ("some-org/Model-1.5", commit)
    assert "# some-org/Model-1.5, quantized" in (result.out / "README.md").read_text()


@pytest.mark.parametrize(
    ("spec", "called"),
    [
        ("hf:allenai/c4:en", "hf:allenai/c4:en"),
        ("sotu:1934-1999", "sotu:1934-1999"),
        ("/home/me/speeches.txt", "speeches.txt"),
        ("../texts/", "texts"),
        ("data.jsonl", "data.jsonl"),
    ],
)
def test_a_text_is_called_by_its_spec_without_folders(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, called: str
) -> None:
    monkeypatch.setattr("bitwright.calibrate.data.read_text", lambda spec: Text(spec, TEXT, 1))
    record = run(tiny_folder("llama", torch.bfloat16, **WIDE["llama"]), tmp_path / "out", spec).record
    assert record["request"]["calibration"]["source"] == called
