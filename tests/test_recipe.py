"""Recipes: first match wins, nothing is skipped in silence, and every mistake is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitwright.errors import RecipeError, SchemeError
from bitwright.recipe import Recipe, Rule
from bitwright.scheme import Scheme

NAMES = [
    f"model.layers.{i}.{part}"
    for i in range(12)
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
]
SPECIAL = ["lm_head", "embedding"]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_first_match_wins(tmp_path: Path) -> None:
    recipe = Recipe.from_toml(
        write(
            tmp_path,
            r"""
            [[rule]]
            match = 'layers\.0\.'
            keep = true
            [[rule]]
            match = 'down_proj$'
            scheme = "w8a16-g64"
            algorithm = "rtn"
            [[rule]]
            match = "mlp|layers"
            scheme = "w4a16-g64-asym"
            [rule.options]
            damp_percent = 0.05
            """,
        )
    )
    assigned = recipe.assign(NAMES + SPECIAL)
    assert list(assigned) == NAMES + SPECIAL
    for name, a in assigned.items():
        if name in SPECIAL:
            assert (a.scheme, a.algorithm, a.reason) == (None, "keep", f"no rule names {name}")
        elif name.startswith("model.layers.0."):  # not layers.10: the dot is escaped
            assert (a.scheme, a.algorithm, a.reason) == (None, "keep", r"rule 1: match 'layers\\.0\\.'")
        elif name.endswith("down_proj"):
            assert (a.scheme, a.algorithm, a.options) == (Scheme.parse("w8a16-g64"), "rtn", {})
        else:
            assert (a.scheme, a.algorithm, a.options) == (
                Scheme.parse("w4a16-g64-asym"),
                "gptq",
                {"damp_percent": 0.05},
            )


def test_unmatched_names_are_kept_with_the_reason() -> None:
    assigned = Recipe((Rule("self_attn", Scheme.parse("w8a8")),)).assign(NAMES)
    assert {a.reason for n, a in assigned.items() if "mlp" in n} == {"no rule matches"}
    assert {a.scheme for n, a in assigned.items() if "mlp" in n} == {None}


def test_uniform_keeps_the_special_matrices() -> None:
    assigned = Recipe.uniform("w4a16-g64", "rtn", {"mse": True}).assign(NAMES + SPECIAL)
    assert {str(a.scheme) for n, a in assigned.items() if n in NAMES} == {"w4a16-g64"}
    assert {a.algorithm for n, a in assigned.items() if n in NAMES} == {"rtn"}
    assert all(a.options == {"mse": True} for n, a in assigned.items() if n in NAMES)
    assert {assigned[n].scheme for n in SPECIAL} == {None}
    with pytest.raises(SchemeError, match="unknown scheme 'w5'"):
        Recipe.uniform("w5")


def test_special_matrices_only_when_spelled_out() -> None:
    recipe = Recipe((Rule("^lm_head$|^embedding$", Scheme.parse("w8a16")), Rule(".*", Scheme.parse("w4a16-g64"))))
    assigned = recipe.assign(NAMES + SPECIAL)
    assert [(str(assigned[n].scheme), assigned[n].algorithm) for n in SPECIAL] == [("w8a16", "rtn")] * 2
    with pytest.raises(RecipeError, match="rule 1 gives lm_head the scheme w4a16-g64; it takes 8-bit"):
        Recipe((Rule("lm_head", Scheme.parse("w4a16-g64")),)).assign(SPECIAL)
    with pytest.raises(RecipeError, match="8-bit weights with 16-bit activations"):
        Recipe((Rule("embedding", Scheme.parse("w8a8")),)).assign(SPECIAL)
    with pytest.raises(RecipeError, match="rule 1 gives lm_head the algorithm 'gptq'"):
        Recipe((Rule("lm_head", Scheme.parse("w8a16"), "gptq"),)).assign(SPECIAL)


def test_a_rule_that_matches_nothing_names_the_nearest() -> None:
    recipe = Recipe((Rule(".", Scheme.parse("w4a16")), Rule(r"self_attn\.k_prj$", None)))
    with pytest.raises(RecipeError) as error:
        recipe.assign(NAMES)
    message = str(error.value)
    assert r"rule 2 (match 'self_attn\\.k_prj$') matches none of the 48 matrices" in message
    nearest = message.split("nearest names are ")[1].split(", ")
    assert set(nearest[:2]) == {"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"}
    with pytest.raises(RecipeError, match="none of the 0 matrices"):
        recipe.assign([])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rule"),
        ("[rule]\nmatch='a'\nkeep=true", "with two brackets"),
        ("[[rules]]\nmatch='a'", "unknown keys rules; the only one is"),
        ("[[rule]]\nmatch='a'\nshceme='w8a8'", "rule 1 has unknown keys shceme; known are match, scheme"),
        ("[[rule]]\nkeep=true", "rule 1 has no match"),
        ("[[rule]]\nmatch='a'\nkeep=true\n[[rule]]\nmatch='a'", "rule 2: give either scheme"),
        ("[[rule]]\nmatch='a'\nkeep=true\nscheme='w8a8'", "and not both"),
        ("[[rule]]\nmatch='a'\nkeep='yes'", "keep is 'yes'; it must be of type bool"),
        ("[[rule]]\nmatch='a'\nkeep=true\nalgorithm='rtn'", "takes no algorithm"),
        ("[[rule]]\nmatch='a('\nkeep=true", "rule 1: match 'a\\(' is not a regular expression"),
        ("[[rule]]\nmatch='a'\nscheme='w4'", "rule 1: unknown scheme 'w4'"),
        ("[[rule]]\nmatch='a'\nscheme='w4a16'\nalgorithm='magic'", "'magic'; choose one of gptq, rtn, finequant"),
        ("[[rule]]\nmatch=", "is not valid TOML"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RecipeError, match=message) as error:
        Recipe.from_toml(path)
    assert str(path) in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read recipe .*No such file"):
        Recipe.from_toml(tmp_path / "none.toml")


def test_options_are_copied() -> None:
    options = {"damp_percent": 0.01}
    recipe = Recipe.uniform("w4a16", options=options)
    options["damp_percent"] = 1.0
    assert recipe.assign(["a"])["a"].options == {"damp_percent": 0.01}
