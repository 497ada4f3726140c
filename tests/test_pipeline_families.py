"""`quantize` from a source folder to a finished one, for every family of models and every algorithm: the folder, read
independently, is the source model with quantized matrices in it, and every loader that should read it computes that
model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES
from pipeline_oracle import TEXT, WIDE, logits, module_name, read, twin, weights

from bitwright.nn.load import load
from bitwright.pipeline import Result, quantize

SMALL: dict[str, Any] = {"num_samples": 6, "seq_len": 64}
MODELS = [*FAMILIES, "llama-untied"]
CASES: dict[str, dict[str, Any]] = {
    "gptq-g32": {"scheme": "w4a16-g32"},
    "gptq-g64": {"scheme": "w4a16-g64"},
    "gptq-asym": {"scheme": "w3a16-g32-asym"},
    "gptq-w8a8": {"scheme": "w8a8"},
    "rtn": {"scheme": "w4a16-g32", "algorithm": "rtn"},
    "ladder": {"scheme": "w4a16", "algorithm": "finequant"},
    "budget": {"scheme": "w4a16", "algorithm": "finequant", "options": {"budget": 5.0, "groups": [64, 32]}},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return str(file)


@pytest.fixture(scope="module")
def wide(tiny_folder: Callable[..., Path]) -> Callable[..., Path]:
    def make(model: str, dtype: torch.dtype = torch.bfloat16) -> Path:
        family = model.removesuffix("-untied")
        tied = {"tie_word_embeddings": False} if family != model else {}
        return tiny_folder(family, dtype, **WIDE[family], **tied)

    return make


def check(source: Path, result: Result, tmp_path: Path) -> Any:
    """The folder is the source with quantized matrices in it; whoever can load it gets the same logits. Returns the
    twin's logits."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    out, record = result.out, result.record
    found, original = read(out), weights(source)
    dtype = getattr(torch, found.config["dtype"])
    assert json.loads((out / "bitwright.json").read_text()) == record
    assert not out.with_name(out.name + ".partial").exists()
    # every tensor of the source is there once: quantized, or kept and equal (to what test_smoothing is about)
    quantized = {f"{p}.weight" for p in found.matrices}
    assert quantized | set(found.kept) == set(original) and not quantized & set(found.kept)
    smoothed = bool(record["smoothing"] and record["smoothing"]["inputs"])
    assert {W.dtype for W in found.kept.values()} == {dtype}
    for name, tensor in found.kept.items():
        ratio = (tensor / original[name].to(dtype)).log2()
        assert torch.equal(ratio, ratio.round()) if smoothed else torch.equal(tensor, original[name].to(dtype)), name
    for prefix, qt in found.matrices.items():
        assert qt.shape == tuple(original[f"{prefix}.weight"].shape)
        W = original[f"{prefix}.weight"].float()
        if smoothed:
            continue
        # gptq moves weights on purpose, and clears the columns whose input is always zero
        bound = 0.5 if record["layers"][module_name(prefix)]["algorithm"] == "gptq" else 2.0 ** (2 - qt.scheme.bits)
        assert (qt.dequantize() - W).norm() < bound * W.norm(), prefix
    model = twin(source, found, tmp_path / "twin")
    expected = logits(model)
    torch.testing.assert_close(logits(load(out, dtype, packed=False)), expected, rtol=0, atol=0)
    note = next((n for n in record["portability"] if n.startswith("transformers")), None)
    if note is not None and "cannot load" not in note:
        option: dict[str, Any] = {}
        if "only with" in note or "activations" in note:  # int8 activations: the weights alone are compared
            option["quantization_config"] = CompressedTensorsConfig(dequantize=True)
        plain = AutoModelForCausalLM.from_pretrained(out, **option)
        torch.testing.assert_close(logits(plain), expected, rtol=0, atol=0)
    return expected


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_the_folder_is_the_dequantized_model(
    wide: Callable[..., Path], text: str, tmp_path: Path, model: str, case: str
) -> None:
    source = wide(model)
    data_free = "algorithm" in CASES[case]
    result = quantize(source, tmp_path / "out", calibration=None if data_free else text, **CASES[case], **SMALL)
    check(source, result, tmp_path)
    assert result.record["quantized_layers"] == len(result.record["layers"]) == len(read(result.out).matrices)


RECIPES = {
    "dense": r"""
        [[rule]]
        match = 'layers\.0\..*(down_proj|fc2|dense_4h_to_h)$|h\.0\.mlp\.dense_4h_to_h$'
        keep = true
        [[rule]]
        match = '(down_proj|fc2|dense_4h_to_h)$'
        scheme = "w8a16-g64"
        algorithm = "rtn"
        [[rule]]
        match = '(k_proj|query_key_value)$'
        scheme = "w4a16"
        algorithm = "finequant"
        [rule.options]
        groups = [64, 32]
        [[rule]]
        match = "."
        scheme = "w4a16-g32"
        [rule.options]
        damp_percent = 0.05
        target_strength = 0.0
    """,
    "experts": r"""
        [[rule]]
        match = 'layers\.1\.self_attn\.v_proj$'
        keep = true
        [[rule]]
        match = 'experts\.\d+\.'
        scheme = "w4a16-g32"
        [[rule]]
        match = "."
        scheme = "w8a16"
        algorithm = "rtn"
    """,
}


@pytest.mark.parametrize("model", MODELS)
def test_mixed_recipes_do_what_each_rule_says(wide: Callable[..., Path], text: str, tmp_path: Path, model: str) -> None:
    kind = "experts" if "moe" in model or model == "mixtral" else "dense"
    (tmp_path / "recipe.toml").write_text(RECIPES[kind])
    source = wide(model)
    result = quantize(source, tmp_path / "out", recipe=tmp_path / "recipe.toml", calibration=text, **SMALL)
    check(source, result, tmp_path)
    layers = result.record["layers"]
    kept = {k["name"]: k["reason"] for k in result.record["kept"]}
    assert not set(kept) & set(layers)
    for name, layer in layers.items():
        got = layer["scheme"], layer["algorithm"]
        if kind == "experts":
            assert got == (("w4a16-g32", "gptq") if re.search(r"experts\.\d", name) else ("w8a16", "rtn")), name
        elif name.endswith(("down_proj", "fc2", "dense_4h_to_h")):
            assert ".0." not in name and got == ("w8a16-g64", "rtn"), name
        elif name.endswith(("k_proj", "query_key_value")):
            assert layer["scheme"].startswith("w4a16") and layer["algorithm"] == "finequant", name
        else:
            assert got == ("w4a16-g32", "gptq"), name
    if kind == "dense":
        assert sum(reason.startswith("rule 1") for reason in kept.values()) == 1
        gptq = next(v for k, v in result.record["options"].items() if k.startswith("gptq"))
        assert (gptq["damp_percent"], gptq["target_strength"]) == (0.05, 0.0)
    else:
        assert kept["model.layers.1.self_attn.v_proj"].startswith("rule 1")
        assert kept["model.layers.1.mlp.gate.weight"].startswith("router")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scales_and_kept_tensors_take_the_output_dtype(
    wide: Callable[..., Path], text: str, tmp_path: Path, dtype: torch.dtype
) -> None:
    """float16 stays float16; float32 becomes bfloat16, unless float16 is asked for."""
    source = wide("llama", dtype)
    expected = torch.float16 if dtype == torch.float16 else torch.bfloat16
    result = quantize(source, tmp_path / "out", scheme="w4a16-g32", calibration=text, **SMALL)
    check(source, result, tmp_path)
    assert {t.dtype for t in weights(result.out).values()} == {torch.int32, torch.int64, expected}
    other = quantize(source, tmp_path / "f16", scheme="w4a16-g32", calibration=text, dtype="float16", **SMALL)
    assert torch.float16 in {t.dtype for t in weights(other.out).values()}
    assert torch.bfloat16 not in {t.dtype for t in weights(other.out).values()}
    assert json.loads((other.out / "config.json").read_text())["dtype"] == "float16"


def test_a_source_in_many_shards_gives_the_same_bytes(
    tiny_folder: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    one, many = (tiny_folder("mixtral", torch.bfloat16, max_shard_size=size) for size in ("5GB", "20KB"))
    assert len(list(many.glob("*.safetensors"))) > 3
    outs = [
        quantize(f, tmp_path / f"out{i}", scheme="w4a16-g16", calibration=text, **SMALL).out
        for i, f in enumerate((one, many))
    ]
    assert (outs[0] / "model.safetensors").read_bytes() == (outs[1] / "model.safetensors").read_bytes()


def test_ragged_groups_go_to_the_native_format_and_load(
    tiny_folder: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    """A width of 48 in groups of 32: what compressed-tensors cannot say, with the same guarantees."""
    for family in ("llama", "mixtral"):
        source = tiny_folder(family, torch.bfloat16)
        result = quantize(source, tmp_path / family, scheme="w3a16-g32-asym", calibration=text, **SMALL)
        assert result.record["format"] == "native"
        (tmp_path / f"twin-{family}").mkdir()
        check(source, result, tmp_path / f"twin-{family}")


@pytest.mark.parametrize("model", ["llama", "opt", "mixtral"])
@torch.no_grad()
def test_gptq_computes_closer_to_the_source_than_rounding(
    wide: Callable[..., Path], text: str, tmp_path: Path, model: str
) -> None:
    """Logits on text of the calibrated kind, against those of the source: what the calibration is for."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = wide(model, torch.float32)
    ids = AutoTokenizer.from_pretrained(source)(TEXT[:512], return_tensors="pt")["input_ids"][:, :512].view(-1, 64)
    target = AutoModelForCausalLM.from_pretrained(source)(ids).logits
    errors = {}
    for algorithm in ("rtn", "gptq"):
        out = tmp_path / algorithm
        quantize(source, out, scheme="w3a16-g32", algorithm=algorithm, calibration=text, num_samples=24, seq_len=64)
        errors[algorithm] = (load(out, torch.float32, packed=False)(ids).logits - target).norm()
    assert errors["gptq"] < 0.85 * errors["rtn"], errors
