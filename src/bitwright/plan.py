"""What will happen to each matrix: scheme, algorithm and options, decided and checked before anything long starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from bitwright.algorithms import finequant
from bitwright.algorithms.gptq import GPTQOptions
from bitwright.algorithms.quik import SAME, QUIKOptions, SparseGPTOptions, check_columns
from bitwright.algorithms.smooth import ALPHAS
from bitwright.errors import RecipeError, SchemeError
from bitwright.formats import Format, choose, portability
from bitwright.formats.portability import FUSED
from bitwright.models.load import SourceModel
from bitwright.models.structure import Linear, Structure
from bitwright.numerics import Search, check_finite
from bitwright.recipe import CALIBRATED, Assignment, Recipe
from bitwright.scheme import UNQUANTIZED_BITS, Scheme

EMBEDDING, LM_HEAD = "embedding", "lm_head"
OUTPUT_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Entry:
    """One quantized matrix: where it is, what it becomes, how. options: of the algorithm, parsed."""

    linear: Linear
    scheme: Scheme
    algorithm: str
    options: Any
    reason: str

    @property
    def smoothing(self) -> tuple[float, ...]:
        """The alphas to choose from for factors between this matrix and its input; empty: no factors."""
        asked = getattr(self.options, "smooth", None)
        if not asked or not _smoothable(self.scheme):
            return ()
        return ALPHAS if asked == "auto" else (float(asked),)


@dataclass(frozen=True)
class Plan:
    """entries by module path; kept: (name, reason) of every matrix that stays; format to write; portability notes;
    dtype that scales and unquantized tensors are stored in; untie: a tied lm_head gets its own tensor; notes: what a
    user would not expect of it."""

    entries: Mapping[str, Entry]
    kept: tuple[tuple[str, str], ...]
    format: Format
    portability: tuple[str, ...]
    dtype: torch.dtype
    untie: bool
    notes: tuple[str, ...] = ()

    @property
    def calibrated(self) -> bool:
        """Whether any matrix needs calibration text."""
        return any(e.algorithm in CALIBRATED for e in self.entries.values())

    @property
    def two_streams(self) -> bool:
        """Whether any matrix is solved towards the full-precision activations."""
        return any(e.algorithm in CALIBRATED and e.options.target_strength > 0 for e in self.entries.values())

    @property
    def bits_per_weight(self) -> float:
        """Average stored bits over the quantized matrices as their schemes say; the record has what was written."""
        bits = sum(e.scheme.bits_per_weight(e.linear.N, e.linear.K) * e.linear.numel for e in self.entries.values())
        return bits / sum(e.linear.numel for e in self.entries.values())


@dataclass(frozen=True)
class RTNOptions:
    """search: "mse" or "minmax" grids."""

    search: Search = "mse"

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> RTNOptions:
        """Options by name; an unknown one is a SchemeError."""
        for name in options:
            if name != "search":
                raise SchemeError(f"unknown rtn option {name!r}; known: search")
        if options.get("search", "mse") not in ("mse", "minmax"):
            raise SchemeError(f"rtn option search={options['search']!r}; choose mse or minmax")
        return cls(**options)


def make_plan(
    source: SourceModel,
    recipe: Recipe,
    requested_format: str | None,
    dtype: str,
    progress: Callable[[str, int, int, str], None],
) -> Plan:
    """Resolve a recipe against a model. Errors: RecipeError, SchemeError, FormatError."""
    structure = source.structure
    linears = {x.name: x for x in structure.linears}
    names = dict(linears)
    if structure.head is not None:
        names[LM_HEAD] = structure.head
    N, K = structure.embedding_shape
    names[EMBEDDING] = Linear(structure.embedding, N, K, False, "Embedding", disk_name(source, structure.embedding))
    entries: dict[str, Entry] = {}
    kept: list[tuple[str, str]] = []
    for name, assignment in recipe.assign(names).items():
        x = names[name]
        if assignment.scheme is None:
            kept.append((x.name, assignment.reason))
        else:
            entries[x.name] = _entry(x, assignment, structure.embedding_shape[1])
    kept += [(k.name, k.reason) for block in structure.blocks for k in block.kept]
    kept += [(k.name, k.reason) for k in structure.others if (k.name.removesuffix(".weight") not in entries)]
    if not entries:
        raise RecipeError("the recipe keeps every matrix, so there is nothing to quantize; add a rule with a scheme")
    untie = _share_tied(structure, entries, kept)
    entries = _choose_granularity(source, entries, progress)
    schemes = {n: e.scheme for n, e in entries.items()}
    widths = {n: e.linear.K for n, e in entries.items()}
    classes = {n: e.linear.class_name for n, e in entries.items() if e.linear.class_name != "Linear"}
    chosen = choose(schemes, widths, requested_format, classes)
    notes = portability(schemes, ignore=ignored(source, entries), widths=widths, classes=classes, requested=chosen.NAME)
    surprises = _unprotected(structure, entries)
    return Plan(
        entries, tuple(dict.fromkeys(kept)), chosen, tuple(notes), output_dtype(source, dtype), untie, surprises
    )


def disk_name(source: SourceModel, module: str) -> str:
    """What the weight of a module outside the blocks is called on disk, without ".weight"; the module's own path if it
    is tied to another and not stored itself."""
    own = source.weights.disk_names(f"{module}.weight")
    return own[0].removesuffix(".weight") if own else module


def _share_tied(structure: Structure, entries: dict[str, Entry], kept: list[tuple[str, str]]) -> bool:
    """Whether a tied head has to be stored apart, because it and the embedding are no longer the same matrix. If both
    become the same quantized matrix, the embedding's entry stands for both."""
    head, embedding = (None if n is None else entries.get(n) for n in (structure.lm_head, structure.embedding))
    if not structure.tied or (head is None and embedding is None):
        return False
    if head is None or embedding is None or (head.scheme, head.options) != (embedding.scheme, embedding.options):
        return True
    del entries[head.linear.name]
    kept.append((head.linear.name, f"tied: it is the quantized matrix of {structure.embedding}"))
    return False


def output_dtype(source: SourceModel, requested: str) -> torch.dtype:
    """The 16-bit dtype of scales and unquantized tensors: the source's own, bfloat16 for a float32 source."""
    if requested == "auto":
        return source.dtype if source.dtype in OUTPUT_DTYPES.values() else torch.bfloat16
    if requested not in OUTPUT_DTYPES:
        raise SchemeError(f"dtype {requested!r} cannot be stored; choose auto, {' or '.join(OUTPUT_DTYPES)}")
    return OUTPUT_DTYPES[requested]


def ignored(source: SourceModel, entries: Mapping[str, Entry]) -> list[str]:
    """Module names that readers must leave alone: every linear, inside the blocks or outside, router or head that is
    not quantized."""
    structure = source.structure
    out = [x.name for x in structure.linears if x.name not in entries]
    out += [k.name.removesuffix(".weight") for block in structure.blocks for k in block.kept if len(k.shape) == 2]
    for name, module in source.model.named_modules():
        linear = isinstance(module, nn.Linear) and not name.startswith(f"{structure.blocks_name}.")
        if (linear or name == structure.lm_head) and name not in entries:
            out.append(name)
    return out


def _entry(x: Linear, assignment: Assignment, hidden: int) -> Entry:
    assert assignment.scheme is not None
    parse: dict[str, Callable[[Any], Any]] = {
        "gptq": GPTQOptions.parse,
        "rtn": RTNOptions.parse,
        "finequant": finequant.FineQuantOptions.parse,
        "quik": QUIKOptions.parse,
        "sparsegpt": SparseGPTOptions.parse,
    }
    scheme, algorithm = assignment.scheme, assignment.algorithm
    options = parse[algorithm](dict(assignment.options))
    _check_values(algorithm, options)
    _check_algorithm(x.name, scheme, algorithm, options)
    reason = assignment.reason
    if isinstance(options, QUIKOptions):
        if x.after_activation and options.after_activation != SAME:
            scheme = scheme.behind_activation(Scheme.parse(options.after_activation))
            reason += "; it reads the activation function's output" if scheme != assignment.scheme else ""
        scheme = scheme.resolved(x.K, hidden if options.proportional else None)
    else:
        scheme = scheme.resolved(x.K)
    check_columns(x.K, scheme, x.name)
    return Entry(x, scheme, algorithm, options, reason)


def _unprotected(structure: Structure, entries: Mapping[str, Entry]) -> tuple[str, ...]:
    """A note if some blocks have no linear that is known to read the output of an activation function, although what
    is asked for them would treat it apart."""
    found = []
    for block in structure.blocks:
        asked = [entries[x.name] for x in block.all_linears if x.name in entries]
        apart = any(
            isinstance(e.options, QUIKOptions)
            and e.options.after_activation != SAME
            and e.scheme.behind_activation(Scheme.parse(e.options.after_activation)) != e.scheme
            for e in asked
        )
        if apart and not any(x.after_activation for x in block.all_linears):
            found.append(block.name)
    if not found:
        return ()
    where = found[0] if len(found) == 1 else f"{found[0]} and {len(found) - 1} more"
    return (
        f"no linear behind an activation function was found in {where}: after_activation changes nothing there, and "
        "all linears have the scheme of their rule; if one of them reads an activation function's output, give it a "
        "rule of its own (w8a8)",
    )


def _check_algorithm(name: str, scheme: Scheme, algorithm: str, options: Any) -> None:
    """SchemeError for a scheme that the algorithm cannot make."""
    if algorithm == "finequant" and (scheme.activation_bits != UNQUANTIZED_BITS or not scheme.plain):
        raise SchemeError(
            f"{name}: finequant chooses among weight-only schemes, not {scheme}; use a16, or rtn, gptq or quik"
        )
    if algorithm == "gptq" and not scheme.plain:
        raise SchemeError(f"{name}: gptq makes grids alone, not {scheme}; use quik" + (" or sparsegpt" * scheme.sparse))
    smooth = getattr(options, "smooth", None)
    if smooth and smooth != "auto" and not _smoothable(scheme):
        raise SchemeError(
            f"{name}: smooth={smooth} moves the range of 8-bit activations into weights, for w8a8 alone and not "
            f"{scheme}; leave it out"
        )
    if algorithm == "rtn" and scheme.outliers is not None:
        raise SchemeError(f"{name}: outlier columns ({scheme}) are chosen from calibration text; use quik, not rtn")
    if algorithm == "sparsegpt" and not scheme.sparse:
        raise SchemeError(f"{name}: sparsegpt prunes, and {scheme} keeps every weight; add -24, or use gptq or quik")
    if algorithm == "quik" and not scheme.weight.symmetric:
        raise SchemeError(f"{name}: quik makes symmetric grids, not {scheme}; leave out -asym, or use gptq")


def _smoothable(scheme: Scheme) -> bool:
    """Whether factors between weights and activations have a use and no rival: outliers and rotations do the same."""
    return scheme.plain and scheme.activation_bits < UNQUANTIZED_BITS


def _check_values(algorithm: str, options: Any) -> None:
    """SchemeError for an option whose value is of another type than its field declares, or a negative number."""
    for name, declared in get_type_hints(type(options)).items():
        value = getattr(options, name)
        if not _fits(value, declared):
            allowed = (
                ", ".join(map(str, get_args(declared))) if get_origin(declared) is Literal else f"a {_said(declared)}"
            )
            raise SchemeError(f"{algorithm} option {name}={value!r} is not understood; it takes {allowed}")


def _fits(value: Any, declared: Any) -> bool:
    origin, inner = get_origin(declared), get_args(declared)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, inner[0]) for v in value)
    if origin in (UnionType, Union):
        return any(_fits(value, kind) for kind in inner)
    if declared is float or declared is int:
        kinds = (int, float) if declared is float else (int,)
        return isinstance(value, kinds) and not isinstance(value, bool) and 0 <= value < float("inf")
    return isinstance(value, declared)


def _said(declared: Any) -> str:
    if get_origin(declared) is tuple:
        return f"list of {_said(get_args(declared)[0])}s"
    if get_origin(declared) is Literal:
        return ", ".join(map(str, get_args(declared)))
    if get_origin(declared) in (UnionType, Union):
        return " or a ".join(_said(kind) for kind in get_args(declared) if kind is not type(None))
    return {float: "number from 0", int: "whole number from 0", bool: "true or false"}.get(declared, declared.__name__)


def _choose_granularity(
    source: SourceModel, entries: dict[str, Entry], progress: Callable[[str, int, int, str], None]
) -> dict[str, Entry]:
    """Replace the schemes of finequant entries by what their weights ask for. Matrices that rules ask different schemes
    or options for are chosen for apart, even those that servers would hold together."""
    units: dict[tuple[Any, str], list[Entry]] = {}
    shared = _shared(source, entries)
    for name, e in entries.items():
        if e.algorithm == "finequant":
            units.setdefault(((e.options, e.scheme.weight), shared.get(name, name)), []).append(e)
    candidates: dict[Any, dict[str, Sequence[finequant.Choice]]] = {}
    out = dict(entries)
    for done, ((asked, unit), members) in enumerate(units.items()):
        progress("granularity", done, len(units), unit)
        matrices = [_read(source, f"{e.linear.disk_name}.weight") for e in members]
        options, weight = asked
        if options.budget is None:
            group = finequant.ladder(matrices, options)
            for e in members:
                out[e.linear.name] = replace(e, scheme=replace(e.scheme, weight=replace(weight, group_size=group)))
        else:
            candidates.setdefault(asked, {})[unit] = finequant.choices(matrices, weight.symmetric, options)
    for asked, choices in candidates.items():
        of = {unit: members for (a, unit), members in units.items() if a == asked}
        weights = sum(e.linear.numel for members in of.values() for e in members)
        for unit, choice in finequant.allocate(choices, asked[0].budget * weights).items():
            for e in of[unit]:
                out[e.linear.name] = replace(e, scheme=Scheme(choice.scheme, 16))
    return out


def _read(source: SourceModel, name: str) -> Tensor:
    tensor = source.checkpoint.get(name)
    check_finite(name, tensor)
    return tensor


def _shared(source: SourceModel, names: Iterable[str]) -> dict[str, str]:
    """The unit that each linear shares its scheme with, by name: servers hold the experts of a stack in one tensor, and
    multiply some linears (q/k/v, gate/up) as one matrix."""
    units = {x.name: stack.name for block in source.structure.blocks for stack in block.experts for x in stack.linears}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        fused = next((parts for parts in FUSED if leaf in parts), None)
        if fused is not None:
            units.setdefault(name, f"{parent}.{'/'.join(fused)}")
    return units
