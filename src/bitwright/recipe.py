"""Recipes: which scheme and which algorithm each matrix gets, as ordered rules. The first rule that matches wins.

.. code-block:: toml

    [[rule]]
    match = 'layers\\.0\\.'          # a regular expression, searched anywhere in the module's name
    keep = true                     # stays at 16 bits

    [[rule]]
    match = 'down_proj$'
    scheme = "w8a16-g64"
    algorithm = "rtn"

    [[rule]]
    match = "."
    scheme = "w4a16-g64"
    algorithm = "gptq"
    [rule.options]                  # handed to the algorithm as they are
    damp_percent = 0.05

Two matrices go by fixed names in every model: ``lm_head`` and ``embedding``. Only a rule that spells that name out
matches them (a catch-all such as ``.`` does not), and they take 8-bit schemes with round-to-nearest: a table is read
row by row, so there is no product whose error calibration could lower, and 4 bits cost far more quality there.

Every name comes back from `Recipe.assign` with a reason: nothing is skipped in silence, and a rule that matches nothing
is an error, because it is a misspelt one.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitwright.errors import RecipeError, SchemeError
from bitwright.scheme import Scheme

ALGORITHMS = ("gptq", "rtn", "finequant", "quik", "sparsegpt")
CALIBRATED = ("gptq", "quik", "sparsegpt")  # those that need text
SPECIAL_NAMES = ("lm_head", "embedding")
SPECIAL_BITS = 8
_KEYS = ("match", "scheme", "algorithm", "options", "keep")


@dataclass(frozen=True)
class Assignment:
    """What happens to one matrix, and which rule said so. scheme None: it stays as it is; algorithm is then "keep"."""

    scheme: Scheme | None
    algorithm: str
    options: Mapping[str, Any]
    reason: str


@dataclass(frozen=True)
class Rule:
    """One rule. match: regular expression searched in the name. scheme None: keep. algorithm None: the default."""

    match: str
    scheme: Scheme | None = None
    algorithm: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            re.compile(self.match)
        except re.error as error:
            raise RecipeError(f"match {self.match!r} is not a regular expression: {error}") from error
        if self.algorithm is not None and self.algorithm not in ALGORITHMS:
            raise RecipeError(
                f"rule {self.match!r} has algorithm {self.algorithm!r}; choose one of {', '.join(ALGORITHMS)}"
            )
        if self.scheme is None and (self.algorithm is not None or self.options):
            raise RecipeError(f"rule {self.match!r} keeps its matrices, so it takes no algorithm and no options")
        object.__setattr__(self, "options", dict(self.options))

    def matches(self, name: str) -> bool:
        """Whether this rule speaks of `name`; the special names must stand in the pattern itself."""
        if name in SPECIAL_NAMES and name not in self.match:
            return False
        return re.search(self.match, name) is not None


@dataclass(frozen=True)
class Recipe:
    """Ordered rules; see the module docstring."""

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        if not self.rules:
            raise RecipeError("a recipe needs at least one [[rule]]")

    @classmethod
    def uniform(cls, scheme: Scheme | str, algorithm: str = "gptq", options: Mapping[str, Any] | None = None) -> Recipe:
        """One scheme and algorithm for every linear; lm_head and embedding are kept."""
        parsed = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
        return cls((Rule(".", parsed, algorithm, options or {}),))

    @classmethod
    def from_toml(cls, path: str | Path) -> Recipe:
        """Recipe of a TOML file. RecipeError names the file, the rule and the key that is wrong."""
        try:
            content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(f"cannot read recipe {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise RecipeError(f"recipe {path} is not UTF-8 at byte {error.start}") from error
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"recipe {path} is not valid TOML: {error}") from error
        unknown = sorted(set(content) - {"rule"})
        if unknown:
            raise RecipeError(f"recipe {path} has unknown keys {', '.join(unknown)}; the only one is [[rule]]")
        tables = content.get("rule", [])
        if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
            raise RecipeError(f"recipe {path}: write each rule as [[rule]], with two brackets")
        if not tables:
            raise RecipeError(f"recipe {path} has no rule; add at least one [[rule]]")
        return cls(tuple(_rule(table, f"recipe {path}, rule {i}") for i, table in enumerate(tables, start=1)))

    def assign(self, names: Iterable[str]) -> dict[str, Assignment]:
        """The assignment of every name, in the order given.

        names: full module names of the linears, and "lm_head" / "embedding" for those two. RecipeError if a rule
        matches none of them, or gives a special name something other than an 8-bit round-to-nearest scheme.
        """
        ordered = list(names)
        for number, rule in enumerate(self.rules, start=1):
            if not any(rule.matches(name) for name in ordered):
                raise RecipeError(
                    f"rule {number} (match {rule.match!r}) matches none of the {len(ordered)} matrices; "
                    f"the nearest names are {', '.join(_nearest(rule.match, ordered)) or '(there are none)'}"
                )
        return {name: self._assign_one(name) for name in ordered}

    def _assign_one(self, name: str) -> Assignment:
        for number, rule in enumerate(self.rules, start=1):
            if not rule.matches(name):
                continue
            reason = f"rule {number}: match {rule.match!r}"
            if rule.scheme is None:
                return Assignment(None, "keep", {}, reason)
            if name in SPECIAL_NAMES:
                _check_special(name, rule, number)
                return Assignment(rule.scheme, "rtn", rule.options, reason)
            return Assignment(rule.scheme, rule.algorithm or "gptq", rule.options, reason)
        if name in SPECIAL_NAMES:
            return Assignment(None, "keep", {}, f"no rule names {name}")
        return Assignment(None, "keep", {}, "no rule matches")


def _check_special(name: str, rule: Rule, number: int) -> None:
    assert rule.scheme is not None
    plain = rule.scheme.plain and rule.scheme.activation_bits == 16
    if rule.scheme.weight.bits != SPECIAL_BITS or not plain:
        raise RecipeError(
            f"rule {number} gives {name} the scheme {rule.scheme}; it takes {SPECIAL_BITS}-bit weights with 16-bit "
            f"activations only, for example w8a16, or keep = true"
        )
    if rule.algorithm not in (None, "rtn"):
        raise RecipeError(f"rule {number} gives {name} the algorithm {rule.algorithm!r}; only rtn is done there")


def _rule(table: dict[str, Any], where: str) -> Rule:
    unknown = sorted(set(table) - set(_KEYS))
    if unknown:
        raise RecipeError(f"{where} has unknown keys {', '.join(unknown)}; known are {', '.join(_KEYS)}")
    for key, kind in (("match", str), ("scheme", str), ("algorithm", str), ("options", dict), ("keep", bool)):
        if key in table and not isinstance(table[key], kind):
            raise RecipeError(f"{where}: {key} is {table[key]!r}; it must be of type {kind.__name__}")
    if "match" not in table:
        raise RecipeError(f"{where} has no match; give a regular expression on module names")
    keep = table.get("keep", False)
    if keep == ("scheme" in table):
        raise RecipeError(f'{where}: give either scheme = "..." or keep = true, and not both')
    try:
        scheme = Scheme.parse(table["scheme"]) if "scheme" in table else None
        return Rule(table["match"], scheme, table.get("algorithm"), table.get("options", {}))
    except (SchemeError, RecipeError) as error:
        raise RecipeError(f"{where}: {error}") from error


def _nearest(pattern: str, names: list[str]) -> list[str]:
    """Up to three names most like the pattern, one for each shape of name (numbers apart)."""
    literal = re.sub(r"[\\^$]", "", pattern)
    shapes = {re.sub(r"\d+", "#", name): name for name in reversed(names)}

    def likeness(name: str) -> float:
        parts = [name, *name.split("."), name.split(".", maxsplit=1)[-1]]
        return max(difflib.SequenceMatcher(None, literal, part).ratio() for part in parts)

    return sorted(shapes.values(), key=likeness, reverse=True)[:3]
