"""Smoothing in whole models: the same bits with factors moved, guesses refused, and what reaches the folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, build_tiny, save_tokenizer, tiny_config
from pipeline_oracle import IDS, TEXT, WIDE, module_name, read, twin, weights
from torch import nn

from bitwright.algorithms.smooth import ALPHAS, LIMIT, Factors
from bitwright.calibrate import smoothing
from bitwright.calibrate.capture import Call, Group, block_calls, first_tensor, readers, trace
from bitwright.calibrate.links import Link
from bitwright.calibrate.smoothing import Smoothed, _exact, smooth_block
from bitwright.errors import BitwrightError
from bitwright.models.discover import discover
from bitwright.models.experts import unfuse
from bitwright.models.structure import Block, Linear
from bitwright.nn.load import load
from bitwright.pipeline import Result, quantize
from bitwright.recipe import Recipe, Rule
from bitwright.scheme import Scheme

SMALL: dict[str, Any] = {"num_samples": 6, "seq_len": 64}
W8 = Scheme.parse("w8a8").weight
MAKERS = r"norm|v_proj|up_proj|w3|fc1|dense_h_to_4h"
# What gives factors away in each family, with numbers of experts left out. Where a GELU stands between, or q, k and v
# are one matrix (Falcon, NeoX), only the norms do.
EXPECTED = {
    "llama": {"input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj"},
    "opt": {"self_attn_layer_norm", "final_layer_norm", "self_attn.v_proj", "fc1"},
    "falcon": {"input_layernorm"},
    "gpt_neox": {"input_layernorm", "post_attention_layernorm"},
    "mixtral": {"input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.experts.w3"},
    "qwen2_moe": {
        *("input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj"),
        *("mlp.experts.up_proj", "mlp.shared_expert.up_proj"),
    },
    "qwen3_moe": {"input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.experts.up_proj"},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return str(file)


def skewed(family: str, **changes: Any) -> Any:
    """A tiny model whose norms and value and up projections make channels of very different size."""
    model = build_tiny(tiny_config(family, **(WIDE[family] | changes)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            inner = int(p.shape[1]) // 2 if p.ndim == 3 and "gate_up" in name else 0
            rows = p[:, inner:].transpose(0, 1) if inner else p
            if inner or (re.search(MAKERS, name) and re.search(r"\d", name)):
                spread = torch.randn(len(rows), generator=generator).exp()
                rows.mul_(spread.view(-1, *[1] * (rows.ndim - 1)))
    return model


def smooth_all(model: Any, structure: Any) -> tuple[list[Smoothed], list[list[tuple[str, Any]]]]:
    """Smooth every block of a model in memory, unquantized; the results, and every block's parameters: path, before,
    after."""
    results, every = [], []
    kind = type(model).__name__

    def returns(hidden: torch.Tensor) -> Any:  # what this family's blocks do
        return (hidden, None) if kind.startswith("Falcon") else hidden

    with torch.no_grad():
        hidden, calls = block_calls(
            model.base_model, [model.get_submodule(b.name) for b in structure.blocks], IDS, returns
        )
        for block, call in zip(structure.blocks, calls, strict=True):
            module = model.get_submodule(block.name)
            local = [x.name.removeprefix(f"{block.name}.") for x in block.all_linears]
            routed = {x.name.removeprefix(f"{block.name}.") for s in block.experts for x in s.linears}
            groups = trace(module, hidden, call, local, routed)
            storage: dict[str, torch.dtype | None] = {k: torch.float32 for k, _ in module.named_parameters()}
            storage |= {f"{name}.weight": None for name in local}
            asked = {name: (ALPHAS, W8) for name in local}
            before = {k: p.clone() for k, p in module.named_parameters()}
            results.append(smooth_block(block, module, groups, [hidden], [call], asked, storage))
            every.append([(k, (before[k], p)) for k, p in module.named_parameters()])
            hidden = first_tensor(module(hidden, *call.args, **call.kwargs))
    return results, every


def unfuse_all(model: Any, structure: Any) -> None:
    """Turn expert stacks into linears in memory: they become views of what the stack held."""
    for block in structure.blocks:
        for stack in block.experts:
            held = [p.detach().clone() for p in model.get_submodule(stack.name).parameters(recurse=False)]
            unfuse(model.get_submodule(block.name), stack)
            for e in range(stack.num_experts):
                rows = held[0][e].split(held[1].shape[2])
                parts = [*zip((*stack.gate[e : e + 1], stack.up[e]), rows, strict=True), (stack.down[e], held[1][e])]
                for linear, weight in parts:
                    assert torch.equal(model.get_submodule(linear.name).weight, weight)


def makers(result: Smoothed) -> set[str]:
    """Paths in the block, without numbers."""
    found = {w["from"] for w in result.records.values() if isinstance(w, dict)}
    return {re.sub(r"\.\d+\.", ".", re.sub(r"^.*?\.(layers|h)\.\d+\.", "", name)) for name in found}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_models_with_factors_moved_give_the_same_bits(family: str) -> None:
    model = skewed(family)
    structure = discover(model)
    unfuse_all(model, structure)
    other = torch.randint(2, 300, (2, 50), generator=torch.Generator().manual_seed(3))
    before = [model(ids).logits for ids in (IDS, other)]
    results, every = smooth_all(model, structure)
    assert set().union(*map(makers, results)) == EXPECTED[family]
    for ids, logits in zip((IDS, other), before, strict=True):
        assert torch.equal(model(ids).logits, logits)
    for result, parameters in zip(results, every, strict=True):
        for key, (old, new) in parameters:
            for factor in result.factors.get(key, []):
                assert torch.equal(factor.log2(), factor.log2().round()) and factor.log2().abs().max() <= LIMIT
                old = old * factor
            assert torch.equal(old, new), key  # nothing else changed, and what changed is said
        for what in result.records.values():
            if isinstance(what, dict):
                assert what["channels"] > 0 and what["error"] < 1 and what["exponents"][0] < what["exponents"][1]


# ---------------------------------------------------------------------------------------------------- what is refused


def test_nothing_moves_through_a_gelu() -> None:
    model = skewed("opt", activation_function="gelu")
    before = model(IDS).logits
    results, _ = smooth_all(model, discover(model))
    assert torch.equal(model(IDS).logits, before)
    for result in results:
        assert makers(result) == EXPECTED["opt"] - {"fc1"}
        assert result.records["fc2"] == "nothing before it commutes with factors" and "fc1.bias" not in result.factors


def test_a_norm_that_someone_else_reads_keeps_its_weight() -> None:
    """OPT-350m normalizes after the residual sum: fc1 reads a norm's output, and so does the next sum."""
    model = skewed("opt", do_layer_norm_before=False)
    before = {k: p.clone() for k, p in model.named_parameters() if "norm" in k}
    results, _ = smooth_all(model, discover(model))
    for result in results:
        assert makers(result) == {"self_attn.v_proj", "fc1"}
        assert result.records["fc1"] == result.records["self_attn.k_proj"] == "nothing before it commutes with factors"
    assert all(torch.equal(p, model.get_parameter(k)) for k, p in before.items())


def test_a_norm_that_adds_one_to_its_weight_is_refused() -> None:
    import transformers as tf

    small = {
        "vocab_size": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    model = build_tiny(tf.GemmaConfig(**small, hidden_size=64, intermediate_size=128, max_position_embeddings=128))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(torch.randn(64, generator=torch.Generator().manual_seed(0)).exp())
    for result in smooth_all(model, discover(model))[0]:
        assert (
            result.records["mlp.up_proj"]
            == result.records["self_attn.q_proj"]
            == "nothing before it commutes with factors"
        )


class Wide(nn.Module):
    """A norm, a linear behind it, and one more that reads the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(4), nn.Linear(4, 3), nn.Linear(4, 2, bias=False)


def test_no_factor_where_a_stored_tensor_could_not_hold_the_product() -> None:
    module = Wide()
    with torch.no_grad():
        module.norm.weight.copy_(torch.tensor([1.0, 3 * 2.0**-24, 40000.0, 1.0]))
        module.norm.bias.fill_(0.5)
        module.a.weight.fill_(0.25)
        module.b.weight.copy_(torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 40000.0]]))
    link = Link("norm", ("a", "b"), "a", torch.arange(4))
    storage: dict[str, Any] = {
        "a.weight": None,
        "b.weight": None,
        "norm.weight": torch.float16,
        "norm.bias": torch.float16,
    }
    e = torch.tensor([3.0, 1.0, -1.0, 1.0])
    assert _exact(module, link, e, storage).tolist() == [3, 0, 0, 1]  # 1.5 * 2^-24 and 80000 are no halves
    assert _exact(module, link, torch.tensor([3.0, -1.0, 1.0, 1.0]), storage).tolist() == [3, -1, 1, 1]
    assert _exact(module, link, e, storage | {"b.weight": torch.float16}).tolist() == [3, 0, 0, 0]  # 80000 again
    assert _exact(module, link, e, dict.fromkeys(storage, torch.bfloat16)).tolist() == e.tolist()
    with torch.no_grad():
        module.half()
    assert _exact(module, link, e, dict.fromkeys(storage, None)).tolist() == [3, 0, 0, 0]  # nor can they compute so


def test_readers_are_those_that_are_given_the_very_output() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b, self.c = nn.LayerNorm(4), *(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(x)
            return self.a(y) + self.b(y.view(-1, 4)).view_as(y) + self.c(y + 0)

    block, x = Small(), torch.randn(2, 3, 4)
    out, found = readers(block, x, Call((), {}), ["norm"], ["a", "b", "c"])
    assert found == {"norm": ["a", "b"]} and torch.equal(out, block(x))


class Clamped(nn.Module):
    """Two norms with a linear each; what the first gives is clamped where small factors do not reach."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.norm, self.a, self.norm2, self.b = nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)
        self.noise = noise

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + self.a(self.norm(x).clamp_(-100, 100))
        return y + self.b(self.norm2(y)) + self.noise * torch.randn_like(y)


def smooth_clamped(module: Clamped) -> Smoothed:
    linears = tuple(Linear(f"block.{n}", 4, 4, True, "Linear", f"block.{n}") for n in "ab")
    block = Block("block", "Clamped", linears, (), (), (), 0)
    x, calls, groups = torch.randn(2, 32, 4), [Call((), {})], [Group(("a",), False), Group(("b",), False)]
    storage: dict[str, Any] = {k: torch.float32 for k, _ in module.named_parameters()} | {"a.weight": None}
    return smooth_block(
        block, module, groups, [x], calls, {n: (ALPHAS, W8) for n in "ab"}, storage | {"b.weight": None}
    )


def test_factors_that_change_the_output_after_all_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    e = torch.tensor([-9.0, 0.0, 1.0, 2.0])
    monkeypatch.setattr(smoothing, "choose_factors", lambda *rest: Factors(e, 0.5, 0.5))
    torch.manual_seed(0)
    module = Clamped()
    before = {k: p.clone() for k, p in module.named_parameters()}
    result = smooth_clamped(module)
    assert result.records["a"] == "factors here would not be exact"
    moved = {"from": "block.norm2", "alpha": 0.5, "channels": 3, "exponents": [-9, 2], "error": 0.5}
    assert result.records["b"] == moved and result.factors.keys() == {"norm2.weight", "norm2.bias", "b.weight"}
    for key, p in module.named_parameters():
        factor = {"norm2.weight": (-e).exp2(), "norm2.bias": (-e).exp2(), "b.weight": e.exp2()}.get(key, 1)
        assert torch.equal(p, before[key] * factor), key


def test_a_block_that_is_not_repeatable_is_left_alone() -> None:
    module = Clamped(noise=1e-3)
    before = {k: p.clone() for k, p in module.named_parameters()}
    result = smooth_clamped(module)
    assert set(result.records.values()) == {"two forwards of the block differ, so nothing can be verified"}
    assert all(torch.equal(before[k], p) for k, p in module.named_parameters()) and not result.factors


# ----------------------------------------------------------------------------------------------------- the whole thing


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[Any, Path] = {}

    def make(family: str, dtype: torch.dtype = torch.bfloat16) -> Path:
        if (family, dtype) not in made:
            made[family, dtype] = skewed_folder(tmp_path_factory.mktemp(family), family, dtype)
        return made[family, dtype]

    return make


def skewed_folder(folder: Path, family: str, dtype: torch.dtype) -> Path:
    skewed(family).to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits.float()


def makers_of(result: Result) -> set[str]:
    layers = result.record["layers"].values()
    return makers(Smoothed({str(i): layer["smooth"] for i, layer in enumerate(layers)}))


@pytest.mark.parametrize("family", ["llama", "opt", "falcon", "mixtral"])
@pytest.mark.parametrize("format", ["compressed-tensors", "native"])
def test_folders_hold_the_changed_norms_and_compute_what_the_source_does(
    source: Callable[..., Path], text: str, tmp_path: Path, family: str, format: str
) -> None:
    call = {"scheme": "w8a8", "calibration": text, "format": format, **SMALL}
    result = quantize(source(family), tmp_path / "out", **call)
    assert makers_of(result) and makers_of(result) <= EXPECTED[family]
    assert f"{result.record['smoothing']['channels']} channels" in (result.out / "README.md").read_text()
    old, new = weights(source(family)), read(result.out)
    named = {w["from"] for w in (layer["smooth"] for layer in result.record["layers"].values()) if isinstance(w, dict)}
    changed = {module_name(k).rpartition(".")[0] for k, t in new.kept.items() if not torch.equal(t, old[k])}
    changed -= {name for name in changed if name.endswith("mlp.gate")}  # a router reads what experts do
    assert changed == {name for name in named if any(module_name(k).startswith(f"{name}.") for k in new.kept)}
    assert any("norm" in name for name in changed)
    for key, tensor in new.kept.items():
        assert tensor.dtype == old[key].dtype
        ratio = (tensor.float() / old[key].float()).log2()
        assert torch.equal(ratio, ratio.round()), key
    # Weights alone, activations exact: 8 bits are close to the source, whose function has not moved; with the source's
    # own norms they would be something else.
    exact, stale = logits(load(source(family), torch.float32)), replace(new, kept=old)
    rounded, wrong = (
        logits(twin(source(family), q, tmp_path / n, torch.float32)) for n, q in (("a", new), ("b", stale))
    )
    packed = logits(load(result.out, torch.float32))
    limit = (0.2 if family == "mixtral" else 0.1) * exact.norm()  # of a random router some choices turn
    assert (rounded - exact).norm() < limit < 0.5 * (wrong - exact).norm()
    assert (packed - exact).norm() < 2 * limit


def test_plain_transformers_loads_the_folder_with_the_same_loss(
    source: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    out = quantize(source("llama"), tmp_path / "out", scheme="w8a8", calibration=text, **SMALL).out
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(source("llama"), dtype=torch.float32)
        wanted = exact(IDS, labels=IDS).loss
        got = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(IDS, labels=IDS).loss
        ours = load(out, torch.float32)(IDS, labels=IDS).loss
    assert abs(got - wanted) < 0.02 * wanted and abs(got - ours) < 0.01 * wanted


def test_it_rounds_better_than_without(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    exact, error = logits(load(source("opt"), torch.float32)), {}
    for smooth in (0, 0.5, "auto"):
        options = {"smooth": smooth}
        result = quantize(
            source("opt"), tmp_path / str(smooth), scheme="w8a8", calibration=text, options=options, **SMALL
        )
        assert (result.record["smoothing"] is None) == (smooth == 0)
        error[smooth] = float((logits(load(result.out, torch.float32)) - exact).norm())
    assert max(error["auto"], error[0.5]) < 0.7 * error[0], error


@pytest.mark.parametrize("change", ["interrupted", "little memory"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_same_bytes_however_it_runs(
    source: Callable[..., Path], text: str, tmp_path: Path, family: str, change: str
) -> None:
    arguments: dict[str, Any] = {"scheme": "w8a8", "calibration": text, **SMALL}
    whole = quantize(source(family), tmp_path / "whole", **arguments)
    assert whole.record["smoothing"]["inputs"] > 2
    if change == "little memory":
        arguments["max_memory"] = "1MB"
    else:

        def stop(stage: str, done: int, total: int, detail: str) -> None:
            if stage == "calibrate" and done == 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quantize(source(family), tmp_path / "other", progress=stop, **arguments)
    other = quantize(source(family), tmp_path / "other", **arguments)
    for file in ("model.safetensors", "config.json", "bitwright.json", "README.md"):
        assert (whole.out / file).read_bytes() == (other.out / file).read_bytes(), file


def test_readers_that_stay_at_sixteen_bits_take_the_factors_too(
    source: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    """q_proj and v_proj are kept: the first as a reader of the norm, the second as a maker too."""
    recipe = Recipe((Rule(r"(q|v)_proj"), Rule(".", Scheme.parse("w8a8"))))
    result = quantize(source("llama"), tmp_path / "out", recipe=recipe, calibration=text, **SMALL)
    old, new = weights(source("llama")), read(result.out).kept
    layers = result.record["layers"]
    for i in range(2):
        norm, q, v = (
            f"model.layers.{i}.{n}.weight" for n in ("input_layernorm", "self_attn.q_proj", "self_attn.v_proj")
        )
        taken, given = (
            layers[f"model.layers.{i}.self_attn.k_proj"]["smooth"],
            layers[f"model.layers.{i}.self_attn.o_proj"],
        )
        assert taken["from"] == norm.removesuffix(".weight")
        columns = old[norm].float() / new[norm].float()
        assert torch.equal(new[q].float(), old[q].float() * columns) and not torch.equal(new[q], old[q])
        rows = (new[v].float() / (old[v].float() * columns))[:, 0]
        assert torch.equal(new[v].float(), old[v].float() * columns * rows[:, None])
        assert int((rows != 1).sum()) == (given["smooth"]["channels"] if isinstance(given["smooth"], dict) else 0)
    exact = logits(load(source("llama"), torch.float32))
    assert (
        logits(twin(source("llama"), read(result.out), tmp_path / "twin", torch.float32)) - exact
    ).norm() < 0.1 * exact.norm()


def test_readers_quantized_without_factors_keep_an_input_as_it_is(
    source: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    recipe = Recipe(
        (
            Rule("k_proj", Scheme.parse("w8a8"), "rtn"),
            Rule("v_proj", Scheme.parse("w8a16")),
            Rule(".", Scheme.parse("w8a8")),
        )
    )
    result = quantize(source("llama"), tmp_path / "out", recipe=recipe, calibration=text, **SMALL)
    layers = result.record["layers"]
    assert layers["model.layers.0.self_attn.q_proj"]["smooth"].endswith(
        "reads the same input and is quantized without factors"
    )
    assert "smooth" not in layers["model.layers.0.self_attn.k_proj"] | layers["model.layers.0.self_attn.v_proj"]
    assert isinstance(layers["model.layers.0.mlp.up_proj"]["smooth"], dict)
    new, name = read(result.out).kept, "model.layers.0.input_layernorm.weight"
    assert torch.equal(new[name], weights(source("llama"))[name])


def test_sixteen_bit_floats_of_either_kind(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    """A float32 source stored at 16 bits: what is stored times the factors is what would have been stored without."""
    for dtype in ("float16", "bfloat16"):
        call = {"scheme": "w8a8", "calibration": text, "dtype": dtype, **SMALL}
        quantize(source("llama", torch.float32), tmp_path / dtype, **call)
        quantize(source("llama", torch.float32), tmp_path / f"{dtype}-plain", options={"smooth": 0}, **call)
        new, old = read(tmp_path / dtype).kept, read(tmp_path / f"{dtype}-plain").kept
        for key, tensor in new.items():
            ratio = (tensor.float() / old[key].float()).log2()
            assert tensor.dtype == getattr(torch, dtype) and torch.equal(ratio, ratio.round()), key
        assert not torch.equal(
            new["model.layers.0.input_layernorm.weight"], old["model.layers.0.input_layernorm.weight"]
        )


def test_w8a8_by_quik_is_smoothed_and_split_schemes_are_not(
    source: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    call = {"algorithm": "quik", "calibration": text, **SMALL}
    assert quantize(source("llama"), tmp_path / "plain", scheme="w8a8", **call).record["smoothing"]["inputs"]
    assert quantize(source("llama"), tmp_path / "split", scheme="w8a8-o16", **call).record["smoothing"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"options": {"smooth": 1.5}}, r"gptq option smooth=1\.5 is no share.*0 \(off\) to 1, or auto"),
        ({"options": {"smooth": -0.5}}, r"smooth=-0\.5 is no share"),
        ({"options": {"smooth": "yes"}}, r"smooth='yes' is not understood.*auto"),
        ({"options": {"smooth": True}}, "smooth=True is not understood"),
        (
            {"options": {"smooth": 0.5}, "scheme": "w4a16-g32"},
            r"smooth=0\.5.*w8a8 alone and not w4a16-g32; leave it out",
        ),
        ({"options": {"smooth": 0.5}, "scheme": "w4a4-o16", "algorithm": "quik"}, "w8a8 alone and not w4a4-o16"),
        ({"options": {"smooth": 0.5}, "algorithm": "rtn"}, "unknown rtn option 'smooth'"),
    ],
)
def test_bad_values(
    source: Callable[..., Path], text: str, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(BitwrightError, match=message):
        quantize(source("llama"), tmp_path / "out", **({"scheme": "w8a8", "calibration": text} | SMALL | arguments))
    assert not (tmp_path / "out").exists()


def test_off_changes_no_tensor_that_is_kept(source: Callable[..., Path], text: str, tmp_path: Path) -> None:
    for smooth in (0, None):
        options = {"smooth": smooth}
        out = quantize(
            source("llama"), tmp_path / str(smooth), scheme="w8a8", calibration=text, options=options, **SMALL
        )
        old = weights(source("llama"))
        assert all(torch.equal(t, old[k]) for k, t in read(out.out).kept.items())
        assert (
            "smooth" not in json.dumps(out.record["layers"]) and "Smoothed" not in (out.out / "README.md").read_text()
        )
