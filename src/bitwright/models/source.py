"""From what a user calls a model (folder, GGUF file, hub id) to a plain Hugging Face folder with safetensors.

A GGUF file is dequantized once through transformers' own reader and kept as an ordinary float32 folder in a cache
(`BITWRIGHT_CACHE`, else ~/.cache/bitwright) under a name made from the file's SHA-256, so that everything after this
module knows one kind of source only. Cost of that first time: the whole model in float32 in RAM and on disk.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

from bitwright import cache
from bitwright.errors import CheckpointError, DependencyError, OutputError
from bitwright.models.checkpoint import INDEX, PICKLED, SINGLE, pickled_error

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "vocab.txt", "merges.txt"]
_HUB_FILES += ["LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*"]


def resolve(model: str | os.PathLike[str], trust_remote_code: bool = False) -> Path:
    """Folder of the model called `model`: a local folder as it is, a .gguf file converted, a hub id downloaded.

    trust_remote_code: also download the Python files of a hub model. CheckpointError if there is no such model or its
    weights are pickled; DependencyError if a GGUF file is given without the gguf package.
    """
    text = os.fspath(model)
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return _from_gguf(path)
        if path.suffix.lower() in PICKLED:
            raise pickled_error(path)
        raise CheckpointError(
            f"{path}: a model is a folder, a .gguf file or a hub id, not a {path.suffix or 'plain'} file"
        )
    if path.suffix.lower() == ".gguf" or path.is_absolute() or not _HUB_ID.fullmatch(text):
        raise CheckpointError(f"{text}: no such file or folder")
    return _from_hub(text, trust_remote_code)


def _from_hub(name: str, trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = _HUB_FILES + (["*.py"] if trust_remote_code else [])
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as e:  # the hub client raises many unrelated kinds: HTTP, cache, offline, validation
        raise CheckpointError(
            f"{name!r} is no local folder, and it could not be fetched from the hub ({_first_line(e)}); "
            "check the spelling or the network, or download it and give the folder"
        ) from e
    if not (folder / SINGLE).exists() and not (folder / INDEX).exists():
        raise CheckpointError(
            f"{name}: the hub holds no safetensors weights for it (pickled weights are refused, reading them can run "
            "any code); convert it where you trust it with transformers' from_pretrained and save_pretrained"
        )
    return folder


def _from_gguf(file: Path) -> Path:
    """The folder that holds `file` dequantized to float32; made on the first call, atomically."""
    target = cache.folder() / f"gguf-{file.stem}-{_sha256(file)[:16]}"
    if (target / "config.json").is_file():
        return target
    try:
        import gguf  # noqa: F401, only to say early what is missing
    except ImportError:
        raise DependencyError(
            f"{file}: reading GGUF needs the gguf package; install bitwright with the extra `gguf`"
        ) from None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as e:
        raise OutputError(f"{target.parent}: cannot be written ({e}); set BITWRIGHT_CACHE to another folder") from e
    try:
        _dequantize_gguf(file, work)
        os.replace(work, target)
    except OSError as e:
        # Two conversions at once: the other one was first, and its result is the same.
        if not (target / "config.json").is_file():
            raise OutputError(f"{target}: cannot be written ({e}); free space or set BITWRIGHT_CACHE") from e
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _dequantize_gguf(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as e:  # gguf and transformers raise many unrelated kinds for a bad or unknown file
        raise CheckpointError(
            f"{file}: transformers cannot read this GGUF file ({_first_line(e)}); give a GGUF file of a supported "
            "architecture, or a folder with safetensors"
        ) from e
    # transformers marks the model as quantized with gguf and then refuses to save it; its weights are plain float32
    # tensors, which an ordinary model of the same config takes over without a copy.
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _sha256(file: Path) -> str:
    try:
        with open(file, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise CheckpointError(f"{file}: cannot be read: {e}") from e
