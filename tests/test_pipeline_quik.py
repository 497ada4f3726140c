"""QUIK and 2:4 from a source folder to a running model: every family, independent twins, resuming, recipes, errors."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, MOE_FAMILIES, build_tiny, save_tokenizer, tiny_config
from pipeline_oracle import IDS, TEXT, WIDE, module_name, weights

from bitwright.calibrate.data import calibration_samples, read_text
from bitwright.errors import BitwrightError
from bitwright.formats import native
from bitwright.kernels import reference
from bitwright.nn.linear import QuantLinear
from bitwright.nn.load import load
from bitwright.pipeline import Result, quantize
from bitwright.recipe import Recipe, Rule
from bitwright.scheme import Scheme
from bitwright.split import SplitTensor

SMALL: dict[str, Any] = {"num_samples": 6, "seq_len": 64}
AFTER = re.compile(r"(down_proj|fc2|dense_4h_to_h|\.w2)$")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return str(file)


@pytest.fixture(scope="module")
def wide(tiny_folder: Callable[..., Path]) -> Callable[..., Path]:
    return lambda family, dtype=torch.bfloat16: tiny_folder(family, dtype, **WIDE[family])


def matrices(result: Result) -> dict[str, SplitTensor]:
    """Every quantized matrix by its name in the model, read with the format alone."""
    stored, found = weights(result.out), {}
    for prefix in sorted(k.removesuffix(".weight_shape") for k in stored if k.endswith(".weight_shape")):
        local = {k.removeprefix(f"{prefix}."): t for k, t in stored.items() if k.startswith(f"{prefix}.weight_")}
        name = module_name(prefix)
        found[name] = native.unpack(local, Scheme.parse(result.record["layers"][name]["scheme"]), prefix)
    return found


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits.float()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_as_the_reference_says(
    wide: Callable[..., Path], text: str, tmp_path: Path, family: str
) -> None:
    result = quantize(
        wide(family), tmp_path / "out", scheme="w4a4-o16-rot", algorithm="quik", calibration=text, **SMALL
    )
    assert result.record["format"] == "native" and result.record["algorithm"] == "quik"
    for name, layer in result.record["layers"].items():
        bits = "w8a8" if AFTER.search(name) else "w4a4"
        assert re.fullmatch(rf"{bits}-o\d+-rot", layer["scheme"]), (name, layer["scheme"])
        if "fallback" not in layer:
            assert layer["outliers"] == Scheme.parse(layer["scheme"]).outliers.count
            assert 0 < layer["relative_proxy_loss"] < 1
    found = matrices(result)
    model = load(result.out, torch.float32)
    got = logits(model)
    packed = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert packed.keys() == found.keys()
    for name, module in packed.items():
        assert torch.equal(module.dequantize(), found[name].dequantize())
        module.packed.linear = lambda x, bias, tensor=found[name]: reference.linear(x, tensor, tensor.scheme, bias)
    torch.testing.assert_close(logits(model), got, rtol=1e-4, atol=1e-4)
    source = logits(load(wide(family), torch.float32))
    assert (got - source).norm() < 0.7 * source.norm()


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in MOE_FAMILIES])
def test_plain_transformers_with_the_reference_in_its_linears(
    wide: Callable[..., Path], text: str, tmp_path: Path, family: str
) -> None:
    """The source model, its linears' outputs replaced by the reference's, shares nothing with the loader."""
    from transformers import AutoModelForCausalLM

    result = quantize(wide(family), tmp_path / "out", scheme="w4a4-o16", algorithm="quik", calibration=text, **SMALL)
    model = AutoModelForCausalLM.from_pretrained(wide(family), dtype=torch.float32)
    for name, tensor in matrices(result).items():

        def replaced(module: Any, args: Any, output: Any, tensor: SplitTensor = tensor) -> torch.Tensor:
            return reference.linear(args[0], tensor, tensor.scheme, module.bias)

        model.get_submodule(name).register_forward_hook(replaced)
    torch.testing.assert_close(logits(load(result.out, torch.float32)), logits(model), rtol=1e-4, atol=1e-4)


def test_outliers_are_the_largest_columns_and_shared_by_those_who_read_them(
    wide: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    """Of the first block, whose input no quantization has changed yet: against plain hooks on the source model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = quantize(wide("llama"), tmp_path / "out", scheme="w4a4-o16", algorithm="quik", calibration=text, **SMALL)
    found = matrices(result)
    model = AutoModelForCausalLM.from_pretrained(wide("llama"), dtype=torch.float32)
    samples = calibration_samples(AutoTokenizer.from_pretrained(wide("llama")), read_text(text), 6, 64, 0)
    largest: dict[str, torch.Tensor] = {}
    for name in found:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: largest.update({name: args[0].abs().amax((0, 1))})
        )
    with torch.no_grad():
        model(samples)
    for leaf, O in (("self_attn.q_proj", 16), ("self_attn.o_proj", 16), ("mlp.up_proj", 16), ("mlp.down_proj", 32)):
        name = f"model.layers.0.{leaf}"
        want = largest[name].argsort(descending=True, stable=True)[:O].sort().values
        assert torch.equal(found[name].split.outlier_idx, want), name
    for layer in ("model.layers.0", "model.layers.1"):
        for leaves in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            first, *others = (found[f"{layer}.{leaf}"].split for leaf in leaves)
            assert all(torch.equal(first.order, s.order) and first.clip == s.clip for s in others)


def test_calibration_is_worth_its_text(wide: Callable[..., Path], text: str, tmp_path: Path) -> None:
    """Against rounding to nearest with no outliers, and outliers against none, on the text it was calibrated on."""
    from transformers import AutoTokenizer

    source = wide("opt", torch.float32)
    ids = AutoTokenizer.from_pretrained(source)(TEXT[:512], return_tensors="pt")["input_ids"][:, :512].view(-1, 64)
    with torch.no_grad():
        target = load(source, torch.float32)(ids).logits
        errors = {}
        for algorithm, scheme in (("rtn", "w4a4"), ("quik", "w4a4"), ("quik", "w4a4-o16")):
            out = tmp_path / f"{algorithm}-{scheme}"
            quantize(source, out, scheme=scheme, algorithm=algorithm, calibration=text, num_samples=24, seq_len=64)
            errors[algorithm, scheme] = float((load(out, torch.float32)(ids).logits - target).norm())
    assert errors["quik", "w4a4-o16"] < errors["quik", "w4a4"] < errors["rtn", "w4a4"], errors


@pytest.mark.parametrize("change", ["interrupted", "little memory", "again"])
def test_the_same_bytes_however_it_runs(
    wide: Callable[..., Path], text: str, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"scheme": "w4a4-o16-24", "algorithm": "quik", "calibration": text, **SMALL}
    whole = quantize(wide("mixtral"), tmp_path / "whole", **arguments)
    if change == "little memory":
        arguments["max_memory"] = "1MB"
    if change == "interrupted":

        def stop(stage: str, done: int, total: int, detail: str) -> None:
            if stage == "calibrate" and done == 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quantize(wide("mixtral"), tmp_path / "other", progress=stop, **arguments)
        assert (tmp_path / "other.partial").is_dir()
    other = quantize(wide("mixtral"), tmp_path / "other", **arguments)
    for file in ("model.safetensors", "config.json", "bitwright.json"):
        assert (whole.out / file).read_bytes() == (other.out / file).read_bytes(), file


def test_two_of_four_in_attention_alone_by_a_recipe(wide: Callable[..., Path], text: str, tmp_path: Path) -> None:
    recipe = Recipe(
        (
            Rule("self_attn", Scheme.parse("w4a4-o16-24"), "quik"),
            Rule(r"mlp\.(gate|up)", Scheme.parse("w4a8"), "quik", {"after_activation": "same"}),
            Rule(".", Scheme.parse("w16a16-24"), "sparsegpt"),
        )
    )
    result = quantize(wide("llama"), tmp_path / "out", recipe=recipe, calibration=text, **SMALL)
    for name, tensor in matrices(result).items():
        W = tensor.arranged()[:, : len(tensor.split.base_idx)]
        zeros = (W.view(len(W), -1, 4) == 0).sum(-1)
        if "gate" in name or "up" in name:
            assert str(tensor.scheme) == "w4a8" and zeros.float().mean() < 1
        else:
            assert (zeros >= 2).all() and str(tensor.scheme).endswith("-24"), name
    plain = load(result.out, torch.float32, packed=False)
    assert torch.isfinite(logits(plain)).all() and torch.isfinite(logits(load(result.out))).all()


def test_bits_per_weight_are_the_bytes_on_disk(wide: Callable[..., Path], text: str, tmp_path: Path) -> None:
    """Orders of columns and clips included, outliers only where an input took them."""
    recipe = Recipe(
        (
            Rule("lm_head", Scheme.parse("w8a16"), "rtn"),
            Rule("self_attn", Scheme.parse("w4a4-o16-24"), "quik"),
            Rule(".", Scheme.parse("w4a4-o16"), "quik", {"threshold": 1e9}),
        )
    )
    source = wide("llama")
    result = quantize(source, tmp_path / "out", recipe=recipe, calibration=text, **SMALL)
    stored = {k: t for k, t in weights(result.out).items() if re.search(r"\.weight_(?!shape)", k)}
    assert any(k.endswith("weight_base_idx") for k in stored) and any(k.endswith("weight_clip") for k in stored)
    assert not any("mlp" in k and "outlier" in k for k in stored)
    bits = 8 * sum(t.nbytes for t in stored.values()) / result.record["quantized_weights"]
    assert result.record["bits_per_weight"] == pytest.approx(bits, abs=1e-6)


@pytest.mark.parametrize("scheme", ["w4a4-o16", "w4a4-o16-rot"])
def test_weights_of_small_inputs_are_kept(text: str, tmp_path: Path, scheme: str) -> None:
    """Column 5 is too small for the grid of any token, column 6 is always zero: only the latter is dead, and where a
    rotation mixes it with others not even that."""
    model = build_tiny(tiny_config("llama", **WIDE["llama"])).to(torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[5] = 1e-5
        model.model.layers[0].input_layernorm.weight[6] = 0
    model.save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    arguments: dict[str, Any] = {"scheme": scheme, "algorithm": "quik", "calibration": text, **SMALL}
    result = quantize(tmp_path / "source", tmp_path / "out", **arguments)
    name = "model.layers.0.self_attn.q_proj"
    W, Q = model.get_submodule(name).weight.float(), matrices(result)[name].dequantize()
    assert (Q[:, 5] - W[:, 5]).norm() < 0.3 * W[:, 5].norm()
    assert result.record["layers"][name].get("dead_columns", 0) == (0 if "rot" in scheme else 1)
    if "rot" not in scheme:
        assert not Q[:, 6].any()


def test_w8a8_goes_to_compressed_tensors_by_quik_too(wide: Callable[..., Path], text: str, tmp_path: Path) -> None:
    result = quantize(wide("opt"), tmp_path / "out", scheme="w8a8", algorithm="quik", calibration=text, **SMALL)
    assert result.record["format"] == "compressed-tensors" and result.record["scheme"] == "w8a8"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "w4a4-o64", "algorithm": "quik"}, r"self_attn\.q_proj: 64 outlier columns.*input of 64"),
        ({"scheme": "w4a4-o16", "algorithm": "rtn"}, "chosen from calibration text; use quik"),
        ({"scheme": "w4a4"}, "gptq makes grids alone.*quik"),
        ({"scheme": "w4a16-g32-24"}, "quik or sparsegpt"),
        ({"scheme": "w4a16-g32", "algorithm": "sparsegpt"}, "add -24"),
        ({"scheme": "w4a16-g32-asym", "algorithm": "quik"}, "leave out -asym"),
        ({"scheme": "w4a8", "algorithm": "finequant"}, "weight-only"),
        ({"scheme": "w4a4-o18-24", "algorithm": "quik"}, r"groups of 4.*64 with 18"),
        ({"scheme": "w4a4", "algorithm": "quik", "options": {"after_activation": "w9a9"}}, "9 are not supported"),
        ({"scheme": "w4a4", "algorithm": "quik", "options": {"clipp": 1}}, "unknown quik option 'clipp'"),
        ({"scheme": "w4a4", "algorithm": "quik", "options": {"measure": "mean"}}, "measure='mean'.*max, energy"),
        ({"scheme": "w4a4-o16", "algorithm": "quik", "format": "compressed-tensors"}, "use native"),
        ({"scheme": "w4a4-o16", "algorithm": "quik", "calibration": None}, "quik needs text"),
    ],
)
def test_what_makes_no_sense_is_said_before_the_long_part(
    wide: Callable[..., Path], text: str, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(BitwrightError, match=message):
        quantize(wide("llama"), tmp_path / "out", **({"calibration": text} | SMALL | arguments))
    assert not (tmp_path / "out").exists()


def test_heads_and_embeddings_take_no_split_scheme(wide: Callable[..., Path], text: str, tmp_path: Path) -> None:
    recipe = Recipe((Rule("lm_head", Scheme.parse("w8a16-o16"), "rtn"), Rule(".", Scheme.parse("w4a4"), "quik")))
    with pytest.raises(BitwrightError, match=r"lm_head.*8-bit weights with 16-bit activations only"):
        quantize(wide("opt"), tmp_path / "out", recipe=recipe, calibration=text, **SMALL)


def test_experts_that_saw_too_little_text(tiny_folder: Callable[..., Path], text: str, tmp_path: Path) -> None:
    """A short calibration reaches some experts with a few tokens, some with none; each is named, and all run."""
    source = tiny_folder("qwen3_moe", torch.bfloat16, **(WIDE["qwen3_moe"] | {"num_experts": 16}))
    result = quantize(
        source, tmp_path / "out", scheme="w4a4-o16", algorithm="quik", calibration=text, num_samples=1, seq_len=64
    )
    layers = result.record["layers"]
    few = {name: layer for name, layer in layers.items() if "fallback" in layer}
    assert few and all(".experts." in name for name in few)
    assert {layer["outliers"] for layer in few.values()} <= {0, 16}
    assert torch.isfinite(logits(load(result.out, torch.float32))).all()
