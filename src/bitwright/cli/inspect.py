"""`bitwright inspect`: what is in a model, or what was done to a quantized one."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Any

from bitwright.cli import options, output
from bitwright.errors import CheckpointError

RECORD = "bitwright.json"


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

    No weight is loaded. For a folder that bitwright made, each layer's scheme, bits per weight and error are shown.
    """
    with output.one_line_errors(debug):
        from bitwright.models.source import resolve

        folder = resolve(model, trust_remote_code)
        found = _quantized(folder) or _plain(folder, trust_remote_code)
        values = {"model": model, "folder": str(folder), "weights_bytes": weights_bytes(folder), **found}
        if json:
            output.print_json({"command": "inspect", **values})
        else:
            output.print_values(values)


def weights_bytes(folder: Path) -> int:
    """Bytes of all safetensors files of a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _quantized(folder: Path) -> dict[str, Any] | None:
    """The record of a folder that bitwright made, else the quantization_config of another tool, else None."""
    if (folder / RECORD).is_file():
        return {"quantized": True, **_read(folder / RECORD)}
    config = _read(folder / "config.json")
    if "quantization_config" in config:
        return {"quantized": True, "quantization_config": config["quantization_config"]}
    return None


def _plain(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    from bitwright.models.load import open_model

    return {"quantized": False, **open_model(folder, trust_remote_code=trust_remote_code).describe()}


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
