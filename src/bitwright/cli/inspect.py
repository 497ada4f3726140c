"""`bitwright inspect`: what is in a model, or what was done to a quantized one.

--json gives everything, name by name. What people are shown is drawn together: matrices whose names differ in nothing
but their numbers (the same matrix of every block, or of every expert) share a row.
"""

from __future__ import annotations

import json as jsonlib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitwright.cli import options, output
from bitwright.errors import CheckpointError, FormatError
from bitwright.scheme import Scheme, WeightScheme

if TYPE_CHECKING:
    from bitwright.models.load import SourceModel

RECORD = "bitwright.json"
# Group sizes that every reader has kernels for, the smallest file first.
COMMON_GROUPS = (128, 64, 32)


def inspect(
    model: options.Model,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show the blocks, linears, experts and bytes of a model; of a quantized folder, its record.

    \b
    bitwright inspect HuggingFaceTB/SmolLM2-135M-Instruct
    bitwright inspect MODEL-w4 --json

    No weight is loaded. A * in a name stands for every block, or every expert; --json names each matrix. For a folder
    that bitwright made, the scheme, bits per weight and error of the matrices are shown, and who can load it.
    """
    with output.one_line_errors(debug):
        from bitwright.models.source import resolve

        folder = resolve(model, trust_remote_code)
        where = {"model": model, "folder": str(folder), "weights_bytes": weights_bytes(folder)}
        found, for_people = _quantized(folder) or _plain(folder, trust_remote_code)
        if json:
            output.print_json({"command": "inspect", **where, **found})
        else:
            output.print_values({**where, **for_people()})


def weights_bytes(folder: Path) -> int:
    """Bytes of all safetensors files of a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _quantized(folder: Path) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]] | None:
    """For JSON, and what makes it readable for people: the record of a folder that bitwright made, else the
    quantization_config of another tool; None if the folder is not quantized."""
    if (folder / RECORD).is_file():
        record = _read(folder / RECORD)
        return {"quantized": True, **record}, lambda: _record_for_people(record)
    config = _read(folder / "config.json").get("quantization_config")
    if config is None:
        return None
    return {"quantized": True, "quantization_config": config}, lambda: _config_for_people(config)


def _plain(folder: Path, trust_remote_code: bool) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
    from bitwright.models.load import open_model

    source = open_model(folder, trust_remote_code=trust_remote_code)
    return {"quantized": False, **source.describe()}, lambda: _model_for_people(source)


def _model_for_people(source: SourceModel) -> dict[str, Any]:
    structure = source.structure
    linears, stacks = structure.linears, [stack for block in structure.blocks for stack in block.experts]
    weights = sum(x.numel for x in linears)
    classes = sorted({block.class_name for block in structure.blocks})
    scheme = suggested_scheme(x.K for x in linears)
    bits = sum(scheme.bits_per_weight(x.N, x.K) * x.numel for x in linears)
    shown: dict[str, Any] = {
        "quantized": False,
        "model_class": structure.model_class,
        "dtype": str(source.dtype).removeprefix("torch."),
        "parameters": structure.parameters,
        "blocks": f"{len(structure.blocks)} {', '.join(classes)} in {structure.blocks_name}",
        "linears": f"{len(linears)} with {weights:,} weights, {100 * weights / structure.parameters:.0f} % of all "
        "parameters: what is quantized",
    }
    if stacks:
        inside = sum(len(stack.linears) for stack in stacks)
        shown["experts"] = (
            f"{inside} of the linears, in {len(stacks)} stacks of {max(stack.num_experts for stack in stacks)}"
        )
    shown["size at 16 bits"] = output.size(2 * structure.parameters)
    shown[f"size at {scheme}"] = f"about {output.size(bits / 8 + 2 * (structure.parameters - weights))}"
    if source.weights.unused:
        shown["unused_on_disk"] = list(source.weights.unused)
    shown["linears, outputs × inputs"] = _drawn_together(
        ((x.name, {"shape": [x.N, x.K], "bias": x.bias, "class": x.class_name}) for x in linears),
        lambda rows: {"weights": sum(row["shape"][0] * row["shape"][1] for row in rows)},
    )
    kept = [k for block in structure.blocks for k in block.kept] + list(structure.others)
    shown["what stays unquantized"] = _drawn_together(
        (k.name, {"shape": list(k.shape), "reason": k.reason}) for k in kept
    )
    return shown


def suggested_scheme(widths: Iterable[int]) -> Scheme:
    """4 bits with the largest common group size that divides every width, so that any reader takes the result."""
    each = set(widths)
    group = next((g for g in COMMON_GROUPS if all(K % g == 0 for K in each)), None)
    return Scheme(WeightScheme(4, group))


def _config_for_people(config: Mapping[str, Any]) -> dict[str, Any]:
    from bitwright.formats import reader

    try:
        reader(config)
        readable = "yes"
    except FormatError as error:
        readable = f"no: {error}"
    return {"quantized": "yes, by another tool", "readable by bitwright": readable, "quantization_config": config}


def _record_for_people(record: Mapping[str, Any]) -> dict[str, Any]:
    try:
        request, layers = record["request"], record["layers"]
        calibration = request["calibration"]
        text = (
            "none"
            if calibration is None
            else (
                f"{calibration['num_samples']} × {calibration['seq_len']} tokens of {calibration['source']}, "
                f"seed {calibration['seed']}"
            )
        )
        shown: dict[str, Any] = {
            "quantized": f"from {request['model']} by bitwright {request['versions']['bitwright']}",
            "scheme": record["scheme"],
            "algorithm": record["algorithm"],
            "options": "; ".join(f"{name}: {_pairs(given)}" for name, given in record["options"].items()),
            "bits_per_weight": record["bits_per_weight"],
            "quantized_weights": f"{record['quantized_weights']:,} of {record['parameters']:,} parameters, in "
            f"{record['quantized_layers']} matrices; the others are {request['dtype']}",
            "format": request["format"],
            "calibration": text,
            "who can load it": [
                {"reader": who, "": what} for who, _, what in (note.partition(": ") for note in record["portability"])
            ],
            "matrices": _drawn_together(((name, _layer(x)) for name, x in layers.items()), _errors),
        }
        if record.get("notes"):
            shown["notes"] = "; ".join(record["notes"])
        if moved := record.get("smoothing"):
            low, high = moved["exponents"]
            shown["smoothing"] = (
                f"{moved['channels']} channels of {moved['inputs']} inputs, by 2^{low} to 2^{high}; "
                f"{moved['linears_without']} matrices without"
            )
        fallbacks = [(name, {"reason": x["fallback"]}) for name, x in layers.items() if "fallback" in x]
        if fallbacks:
            shown["fallbacks"] = [{"name": name, **reason} for name, reason in fallbacks]
        kept = _reasons(record["kept"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{RECORD} is not a record of this version of bitwright ({type(error).__name__}: {error}); "
            "--json shows it as it is"
        ) from error
    shown["what stayed unquantized"] = _drawn_together(kept)
    return shown


def _layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    told = {key: layer[key] for key in ("scheme", "algorithm", "bits_per_weight")}
    return {**told, "_error": layer["relative_error"], "_tokens": layer.get("tokens")}


def _errors(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Relative error ||W - Q|| / ||W|| of a row of the table, and the tokens that calibration sent there."""
    errors = [row["_error"] for row in rows]
    tokens = [row["_tokens"] for row in rows if row["_tokens"] is not None]
    seen = "" if not tokens else f"{min(tokens):,}" + (f" to {max(tokens):,}" if min(tokens) != max(tokens) else "")
    return {"relative_error": sum(errors) / len(errors), "largest": max(errors), "tokens": seen}


def _pairs(given: Mapping[str, Any]) -> str:
    """As in a=1, b=inverse, c=auto: an option that is None was left to the algorithm."""
    told = {key: "auto" if value is None else jsonlib.dumps(value) for key, value in given.items()}
    return ", ".join(f"{key}={value}" for key, value in told.items()).replace('"', "")


def _reasons(kept: Iterable[Mapping[str, str]]) -> list[tuple[str, dict[str, Any]]]:
    """Every matrix once: the recipe speaks of modules, the model's structure of their weights."""
    found: dict[str, list[str]] = {}
    for x in kept:
        found.setdefault(x["name"].removesuffix(".weight"), []).append(x["reason"])
    return [(name, {"reason": "; ".join(reasons)}) for name, reasons in found.items()]


def _drawn_together(
    named: Iterable[tuple[str, dict[str, Any]]],
    more: Callable[[list[dict[str, Any]]], dict[str, Any]] = lambda rows: {},
) -> list[dict[str, Any]]:
    """One row for all names that differ in their numbers alone and agree in their values; keys that begin with an
    underscore are for `more`, which adds columns."""
    rows: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    for name, values in named:
        told = {key: value for key, value in values.items() if not key.startswith("_")}
        row = {"name": re.sub(r"(?<=\.)\d+(?=\.)", "*", name), **told}
        rows.setdefault(jsonlib.dumps(row), (row, []))[1].append(values)
    return [{"name": row["name"], "count": len(members), **row, **more(members)} for row, members in rows.values()]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = jsonlib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, not an object; the folder is damaged")
    return content
