"""Module names as targets of a config: matching them, and writing many names as few patterns.

A target is an exact module name or ``re:<regex>``. compressed-tensors, transformers and vLLM match a regex from the
name's start (``re.match``), so every pattern written here ends in ``$``; a pattern is written only where it selects no
name outside its group, which is why the names that stay unquantized are asked for too.

Numbers inside a name (`model.layers.3.mlp.experts.7.w1`) are indices: names that differ in nothing else share a
*template*. That is all the structure assumed; no module or model is known by name.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

REGEX = "re:"
_ANY_INDEX = r"\d+"
_ANY_LEAF = r"[^.]+"

Key = TypeVar("Key", bound=Hashable)


def matches(name: str, target: str) -> bool:
    """True if `target` is `name` itself or a ``re:`` pattern that matches from the name's start."""
    if target.startswith(REGEX):
        return re.match(target.removeprefix(REGEX), name) is not None
    return target == name


def in_block(name: str) -> bool:
    """True for a module inside a numbered list, as opposed to an lm_head or an embedding."""
    return any(part.isdigit() for part in name.split("."))


def expert_stack(name: str) -> str | None:
    """The list of experts that a matrix such as `model.layers.3.mlp.experts.7.w1` belongs to; None for any other.

    An expert's matrix is the last part of a name whose last but one is an index, inside a numbered block.
    """
    *outer, index, _leaf = ["", "", *name.split(".")]
    return ".".join(outer[2:]) if index.isdigit() and any(part.isdigit() for part in outer) else None


def compact(groups: Mapping[Key, Sequence[str]], others: Iterable[str]) -> dict[Key, list[str]]:
    """Targets per group that select exactly the group's names among all names given.

    groups: names per key; others: names that no group may select. A template whose names all fall into one group
    becomes one pattern; one that groups share by the first index (the decoder block) becomes an alternation over that
    index; what is left is listed by exact name. Expert matrices that differ in their last part only are joined.
    """
    owner: dict[str, Key | None] = dict.fromkeys(others)
    owner.update({name: key for key, names in groups.items() for name in names})
    templates: dict[tuple[str | None, ...], list[str]] = {}
    for name in owner:
        templates.setdefault(_template(name), []).append(name)

    exact: dict[Key, list[str]] = {key: [] for key in groups}
    patterns: dict[Key, dict[tuple[str, ...], list[str]]] = {key: {} for key in groups}  # pattern parts -> last parts
    for template, names in templates.items():
        for key, indices, members in _split(template, names, owner):
            if indices is None or len(members) == 1:
                exact[key].extend(members)
            else:
                parts = _pattern_parts(template, indices)
                patterns[key].setdefault(parts[:-1], []).append(parts[-1])
    return {key: exact[key] + _patterns(patterns[key], owner) for key in groups}


def _template(name: str) -> tuple[str | None, ...]:
    return tuple(None if part.isdigit() else part for part in name.split("."))


def _split(
    template: tuple[str | None, ...], names: list[str], owner: Mapping[str, Key | None]
) -> Iterable[tuple[Key, list[str] | None, list[str]]]:
    """(key, first indices, names) of one template: [] = every index, None = these names have to be listed."""
    owners = {owner[name] for name in names}
    if len(owners) == 1:
        (key,) = owners
        if key is not None:
            yield key, [] if None in template else None, names
        return
    first = template.index(None) if None in template else None
    by_index: dict[str, list[str]] = {}
    for name in names:
        by_index.setdefault("" if first is None else name.split(".")[first], []).append(name)
    whole: dict[Key, tuple[list[str], list[str]]] = {}
    for index, members in by_index.items():
        keys = {owner[name] for name in members}
        if len(keys) == 1:
            (key,) = keys
            if key is not None:
                indices, of_key = whole.setdefault(key, ([], []))
                indices.append(index)
                of_key.extend(members)
            continue
        for name in members:
            key = owner[name]
            if key is not None:
                yield key, None, [name]
    for key, (indices, members) in whole.items():
        yield key, indices, members


def _pattern_parts(template: tuple[str | None, ...], indices: list[str]) -> tuple[str, ...]:
    parts = [_ANY_INDEX if part is None else re.escape(part) for part in template]
    if indices:
        alternatives = "|".join(sorted(indices, key=int))
        parts[template.index(None)] = f"(?:{alternatives})" if len(indices) > 1 else alternatives
    return tuple(parts)


def _patterns(stems: Mapping[tuple[str, ...], list[str]], owner: Mapping[str, Key | None]) -> list[str]:
    result: list[str] = []
    for stem, leaves in stems.items():
        written = [REGEX + r"\.".join((*stem, leaf)) + "$" for leaf in leaves]
        joined = REGEX + r"\.".join((*stem, _ANY_LEAF)) + "$"
        # vLLM asks for the experts' matrices by its own last parts (gate_proj where the folder says w1), so a stack
        # that is quantized as a whole is named without them.
        experts = len(stem) > 1 and stem[-1] == _ANY_INDEX and any(_is_index(part) for part in stem[:-1])
        selected = {name for name in owner if matches(name, joined)}
        if experts and selected == {name for name in owner if any(matches(name, target) for target in written)}:
            result.append(joined)
        else:
            result.extend(written)
    return result


def _is_index(part: str) -> bool:
    return part == _ANY_INDEX or part.isdigit() or part.startswith("(?:")
