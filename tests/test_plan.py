"""What is decided before anything long starts: which matrix gets what, what stays, in which format and dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_oracle import WIDE

from bitwright.algorithms.finequant import FineQuantOptions
from bitwright.algorithms.gptq import GPTQOptions
from bitwright.errors import FormatError, RecipeError, SchemeError
from bitwright.formats.portability import FUSED
from bitwright.models.load import SourceModel, open_model
from bitwright.plan import Plan, RTNOptions, ignored, make_plan
from bitwright.recipe import Recipe, Rule
from bitwright.scheme import Scheme

FAMILIES = ("llama", "opt", "falcon", "gpt_neox", "mixtral", "qwen2_moe", "qwen3_moe")


@pytest.fixture(scope="module")
def source(tiny_folder: Callable[..., Path]) -> Callable[..., SourceModel]:
    return lambda family, dtype=torch.bfloat16, **changes: open_model(
        tiny_folder(family, dtype, **WIDE[family] | changes)
    )


def plan(
    source: SourceModel, *rules: Rule, format: str | None = None, dtype: str = "auto", progress: Any = None
) -> Plan:
    return make_plan(source, Recipe(rules), format, dtype, progress or (lambda *_: None))


def rule(match: str, scheme: str | None = None, algorithm: str | None = None, **options: Any) -> Rule:
    return Rule(match, None if scheme is None else Scheme.parse(scheme), algorithm, options)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_is_an_entry_or_kept_with_a_reason(source: Callable[..., SourceModel], family: str) -> None:
    model = source(family)
    found = plan(model, rule(r"\.1\.", "w4a16-g32"), rule(r"\.0\..*o", "w8a16"))
    kept = {name.removesuffix(".weight"): reason for name, reason in found.kept}
    matrices = {n.removesuffix(".weight") for n, p in model.model.named_parameters() if p.ndim == 2}
    matrices |= {x.name for x in model.structure.linears}
    assert matrices <= set(found.entries) | set(kept)
    assert not set(found.entries) & set(kept) and all(kept.values())
    for x in model.structure.linears:
        if x.name not in found.entries:
            assert kept[x.name] == "no rule matches"
    left = set(ignored(model, found.entries))
    assert left == {
        n for n in kept if not n.endswith(("embed_tokens", "embed_positions", "embed_in", "word_embeddings"))
    }


def test_the_first_rule_that_matches_decides_and_is_named(source: Callable[..., SourceModel]) -> None:
    found = plan(
        source("llama"),
        rule("up_proj"),
        rule("layers.0", "w8a16", "rtn", search="minmax"),
        rule(".", "w4a16-g32", damp_percent=0.05),
    )
    first = found.entries["model.layers.0.mlp.down_proj"]
    assert (str(first.scheme), first.algorithm, first.options) == ("w8a16", "rtn", RTNOptions("minmax"))
    assert first.reason.startswith("rule 2")
    second = found.entries["model.layers.1.mlp.down_proj"]
    assert (second.algorithm, second.options) == ("gptq", GPTQOptions(damp_percent=0.05))
    assert dict(found.kept)["model.layers.1.mlp.up_proj"].startswith("rule 1")
    assert found.calibrated and found.two_streams


@pytest.mark.parametrize(
    ("algorithm", "options", "calibrated", "two"),
    [
        ("gptq", {}, True, True),
        ("gptq", {"target_strength": 0}, True, False),
        ("rtn", {}, False, False),
        ("finequant", {}, False, False),
    ],
)
def test_what_needs_calibration(
    source: Callable[..., SourceModel], algorithm: str, options: dict[str, Any], calibrated: bool, two: bool
) -> None:
    found = plan(source("llama"), rule(".", "w4a16", algorithm, **options))
    assert (found.calibrated, found.two_streams) == (calibrated, two)


def test_bits_per_weight_by_hand(source: Callable[..., SourceModel]) -> None:
    """q/k/v/o: 12288 weights of K = 64 at 8 bits, one scale a row; the MLP: 24576 weights at 4.5 bits."""
    found = plan(source("llama"), rule("self_attn", "w8a16"), rule("mlp", "w4a16-g32"))
    attention, mlp = 2 * (2 * 64 * 64 + 2 * 32 * 64), 2 * 3 * 64 * 128
    expected = (attention * (8 + 16 / 64) + mlp * (4 + 16 / 32)) / (attention + mlp)
    assert found.bits_per_weight == pytest.approx(expected, rel=1e-12)


def test_formats(source: Callable[..., SourceModel]) -> None:
    assert plan(source("llama"), rule(".", "w4a16-g32", "rtn")).format.NAME == "compressed-tensors"
    assert plan(source("llama"), rule(".", "w4a16-g32", "rtn"), format="native").format.NAME == "native"
    ragged = source("llama", intermediate_size=80)
    assert plan(ragged, rule(".", "w4a16-g32", "rtn")).format.NAME == "native"
    with pytest.raises(FormatError, match=r"down_proj.*80"):
        plan(ragged, rule(".", "w4a16-g32", "rtn"), format="compressed-tensors")
    experts = source("mixtral")
    uneven = (rule(r"experts\.0\.", "w8a16", "rtn"), rule(".", "w4a16-g32", "rtn"))
    assert plan(experts, *uneven).format.NAME == "native"
    with pytest.raises(FormatError, match="experts"):
        plan(experts, *uneven, format="compressed-tensors")


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (torch.float32, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float16),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.bfloat16, "float16", torch.float16),
    ],
)
def test_output_dtype(
    source: Callable[..., SourceModel], stored: torch.dtype, asked: str, expected: torch.dtype
) -> None:
    assert plan(source("llama", stored), rule(".", "w4a16", "rtn"), dtype=asked).dtype == expected


def test_float32_cannot_be_stored(source: Callable[..., SourceModel]) -> None:
    with pytest.raises(SchemeError, match=r"float32.*bfloat16"):
        plan(source("llama"), rule(".", "w4a16", "rtn"), dtype="float32")


def test_linears_outside_the_blocks_are_named_to_readers(source: Callable[..., SourceModel]) -> None:
    model = source("opt", word_embed_proj_dim=32)
    found = plan(model, rule(".", "w4a16-g32", "rtn"))
    assert {"model.decoder.project_in", "model.decoder.project_out", "lm_head"} <= set(ignored(model, found.entries))


# -------------------------------------------------------------------------------------------------- head and embedding


HEAD, EMBEDDING = rule("lm_head", "w8a16"), rule("embedding", "w8a16")


@pytest.mark.parametrize(
    ("tied", "rules", "entries", "untie"),
    [
        (True, [HEAD], {"lm_head"}, True),
        (True, [EMBEDDING], {"model.embed_tokens"}, True),
        (True, [HEAD, EMBEDDING], {"model.embed_tokens"}, False),
        (True, [rule("lm_head", "w8a16-g32"), EMBEDDING], {"lm_head", "model.embed_tokens"}, True),
        (True, [rule("lm_head", "w8a16", None, search="minmax"), EMBEDDING], {"lm_head", "model.embed_tokens"}, True),
        (True, [], set(), False),
        (False, [HEAD], {"lm_head"}, False),
        (False, [HEAD, EMBEDDING], {"lm_head", "model.embed_tokens"}, False),
    ],
)
def test_tied_matrices(
    source: Callable[..., SourceModel], tied: bool, rules: list[Rule], entries: set[str], untie: bool
) -> None:
    model = source("llama", tie_word_embeddings=tied)
    found = plan(model, *rules, rule(".", "w4a16-g32", "rtn"))
    assert {n for n in found.entries if "layers" not in n} == entries
    assert found.untie is untie
    kept = dict(found.kept)
    assert ("lm_head" in entries) != ("lm_head" in kept or "lm_head.weight" in kept)


# ----------------------------------------------------------------------------------------------------------- finequant


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"alpha": 0.1}, {"budget": 5.0, "bits": (3, 4, 8)}, {"budget": 6.5}])
def test_what_servers_hold_in_one_tensor_shares_a_scheme(
    source: Callable[..., SourceModel], family: str, options: dict[str, Any]
) -> None:
    """So that the choice never costs the user a server: q/k/v, gate/up and all experts of a stack agree."""
    model = source(family)
    found = plan(model, rule(".", "w4a16", "finequant", **options))
    assert found.format.NAME == "compressed-tensors"
    assert not any("fuses" in note for note in found.portability)
    for block in model.structure.blocks:
        for stack in block.experts:
            assert len({found.entries[x.name].scheme for x in stack.linears}) == 1
    for parts in FUSED:
        for name in found.entries:
            if name.endswith(parts[0]):
                together = [name.removesuffix(parts[0]) + part for part in parts]
                assert len({found.entries[n].scheme for n in together if n in found.entries}) == 1
    if "budget" in options:
        assert found.bits_per_weight <= options["budget"]
        assert found.bits_per_weight > options["budget"] - 1.5


def test_budgets_of_two_rules_are_kept_apart(source: Callable[..., SourceModel]) -> None:
    model = source("llama")
    found = plan(
        model,
        rule("self_attn", "w4a16", "finequant", budget=8.5),
        rule("mlp", "w4a16-asym", "finequant", budget=4.6),
    )

    def bits(part: str) -> float:
        chosen = [e for n, e in found.entries.items() if part in n]
        stored = sum(e.scheme.weight.bits_per_weight(e.linear.K) * e.linear.numel for e in chosen)
        return stored / sum(e.linear.numel for e in chosen)

    assert 8.0 < bits("self_attn") <= 8.5 and 4.0 < bits("mlp") <= 4.6
    assert all(e.scheme.weight.symmetric == ("self_attn" in n) for n, e in found.entries.items())


@pytest.mark.parametrize("options", [{}, {"budget": 8.5, "bits": (4, 8)}])
def test_schemes_of_two_rules_are_kept_apart(source: Callable[..., SourceModel], options: dict[str, Any]) -> None:
    """Also where a server would like one scheme for both: what a rule says about a matrix goes first."""
    first, second = ("w8a16", "w4a16") if not options else ("w4a16", "w4a16-asym")
    found = plan(
        source("llama"), rule("v_proj", first, "finequant", **options), rule(".", second, "finequant", **options)
    )
    for name, e in found.entries.items():
        asked = Scheme.parse(first if "v_proj" in name else second).weight
        assert e.scheme.weight.symmetric == asked.symmetric, name
        if not options:
            assert e.scheme.weight.bits == asked.bits, name


def test_granularity_reports_its_progress(source: Callable[..., SourceModel]) -> None:
    seen: list[tuple[int, int, str]] = []

    def progress(stage: str, done: int, total: int, detail: str) -> None:
        assert stage == "granularity"
        seen.append((done, total, detail))

    plan(source("mixtral"), rule(".", "w4a16", "finequant"), progress=progress)
    # per block: q/k/v, o, the experts
    assert [done for done, _, _ in seen] == list(range(6)) and {total for _, total, _ in seen} == {6}
    assert [d.rpartition(".")[2] for _, _, d in seen][:3] == ["q_proj/k_proj/v_proj", "o_proj", "experts"]


def test_a_block_without_a_linear_behind_an_activation_is_noted(source: Callable[..., SourceModel]) -> None:
    model = source("llama")
    asked = rule(".", "w4a4-o16", "quik")
    assert plan(model, asked).notes == ()
    blocks = tuple(
        replace(block, linears=tuple(replace(x, after_activation=False) for x in block.linears))
        for block in model.structure.blocks
    )
    before, model.structure = model.structure, replace(model.structure, blocks=blocks)
    try:
        (note,) = plan(model, asked).notes
        assert note.startswith("no linear behind an activation function was found in model.layers.0 and 1 more")
        for silent in (rule(".", "w4a4-o16", "quik", after_activation="same"), rule(".", "w4a16-o16", "quik")):
            assert plan(model, silent).notes == ()
    finally:
        model.structure = before


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("algorithm", "options", "words"),
    [
        ("gptq", {"act_order": "sideways"}, r"act_order='sideways'.*true or false.*group"),
        ("gptq", {"weighting": None}, r"weighting=None.*hessian"),
        ("gptq", {"static_groups": "no"}, r"static_groups='no'.*true or false"),
        ("gptq", {"passes": 2.5}, r"passes=2\.5.*whole number"),
        ("gptq", {"passes": True}, r"passes=True.*whole number"),
        ("gptq", {"damp_percent": float("nan")}, r"damp_percent=nan.*number"),
        ("gptq", {"act_order": True, "static_groups": False}, r"static_groups=true"),
        ("finequant", {"bits": [4, "8"]}, r"bits=\(4, '8'\).*list of whole number"),
        ("finequant", {"alpha": -1}, r"alpha=-1.*number from 0"),
        ("finequant", {"ragged": 1}, r"ragged=1.*true or false"),
        ("finequant", {"bits": [5], "budget": 6}, r"bits 5.*\(2, 3, 4, 8\)"),
        ("rtn", {"search": "best"}, r"search='best'.*mse"),
    ],
)
def test_options_of_the_wrong_kind(
    source: Callable[..., SourceModel], algorithm: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(SchemeError, match=words):
        plan(source("llama"), rule(".", "w4a16", algorithm, **options))


def test_options_of_the_right_kind(source: Callable[..., SourceModel]) -> None:
    """Whole numbers are numbers, and None is what a field says it may be."""
    found = plan(source("llama"), rule(".", "w4a16", damp_percent=1, rounds=None, sink_weight=0))
    assert next(iter(found.entries.values())).options == GPTQOptions(damp_percent=1, rounds=None, sink_weight=0)
    found = plan(source("llama"), rule(".", "w4a16", "finequant", budget=None, groups=[64, 32]))
    assert next(iter(found.entries.values())).options == FineQuantOptions(groups=(64, 32))


def test_a_recipe_that_keeps_everything(source: Callable[..., SourceModel]) -> None:
    with pytest.raises(RecipeError, match="nothing to quantize"):
        plan(source("llama"), rule("."))
