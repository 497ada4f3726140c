"""`load`: a transformers causal LM from a folder, quantized linears packed.

The model is built on meta. Tensors that are not quantized are read into place; each quantized matrix is read in its
stored form, laid out for the kernel that will run it, and dropped: at no time does memory hold the model at full
precision, and what it holds beside the packed weights is one matrix. Reading goes through the same code as that for
unquantized folders (`models.load`), so transformers' renamings, tied embeddings, computed buffers and the checks of
completeness are the same.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitwright.errors import CheckpointError, FormatError
from bitwright.formats import reader
from bitwright.kernels.dispatch import Choice, prepare
from bitwright.kernels.problem import PackedWeight
from bitwright.models.checkpoint import read_config
from bitwright.models.experts import UnfusedExperts
from bitwright.models.load import SourceModel
from bitwright.models.naming import WeightMap, map_weights
from bitwright.models.skeleton import build_skeleton
from bitwright.nn.attention import widen_single_queries
from bitwright.nn.checkpoint import QuantizedCheckpoint
from bitwright.nn.embedding import QuantEmbedding
from bitwright.nn.experts import QuantExperts
from bitwright.nn.linear import FlatLinear, QuantLinear
from bitwright.nn.packed import PackedModule

logger = logging.getLogger(__name__)

_EXPERT = re.compile(r"\.(\d+)\.(\w+)$")


def load(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    packed: bool = True,
    *,
    trust_remote_code: bool = False,
) -> Any:
    """The causal LM of a model folder, in evaluation mode and without gradients.

    A folder quantized in compressed-tensors or bitwright's own format gets QuantLinear, QuantEmbedding and
    QuantExperts in place of what is quantized; with packed=False every weight is dequantized instead and the model is
    an ordinary one (the same weights, rounded to `dtype`; activations are not quantized then). A folder that is not
    quantized is loaded by transformers.

    dtype: of activations and unquantized weights. None = bfloat16 for packed weights on a CPU, because PyTorch's packed
    operators take nothing else at speed; float32 unpacks every matrix at every call, a bit slower than an unquantized
    float32 model, with its accuracy. In all other cases None is what config.json states.
    Errors: CheckpointError, FormatError, NumericsError, StructureError, each naming the file or layer.
    """
    folder = Path(folder)
    config_dict = read_config(folder)
    quantization = config_dict.get("quantization_config")
    if quantization is None:
        return _load_plain(folder, dtype, device, trust_remote_code)
    config = _read_model_config(folder, trust_remote_code)
    stated = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    if dtype is None:
        dtype = stated if isinstance(stated, torch.dtype) else torch.bfloat16
        if packed and torch.device(device).type == "cpu" and dtype != torch.bfloat16:
            logger.info("%s: running in bfloat16, the dtype of the packed CPU operators, not %s", folder, dtype)
            dtype = torch.bfloat16
    form = reader(quantization)
    checkpoint = QuantizedCheckpoint(folder, form, dtype)
    skeleton = build_skeleton(config, dtype, trust_remote_code, folder)
    modules = _module_names(map_weights(skeleton.model, checkpoint.names), checkpoint)
    classes = {name: "Embedding" for name, module in skeleton.model.named_modules() if isinstance(module, nn.Embedding)}
    found = form.read_config(quantization, [*modules.values(), *modules], classes)
    checkpoint.schemes = {
        disk: found.get(name) or found[disk] for disk, name in modules.items() if {name, disk} & set(found)
    }
    source = SourceModel(folder, config, dict(config_dict), checkpoint, skeleton, dtype, trust_remote_code)
    if packed:
        _install_packed(source, checkpoint, dtype, device)
        if torch.device(device).type == "cpu" and dtype != torch.float32:
            _avoid_slow_paths(source.model)
    else:
        source.materialize("", dtype, device)
    return _finished(source.model, folder)


def explain(model: nn.Module) -> list[str]:
    """One line per kind of packed module in `model`: how many, their scheme, what runs them and why, their bytes.

    And one per reason why experts run one after the other.
    """
    kinds: dict[tuple[str, str, str, str], list[int]] = {}
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, PackedModule):
            key = (type(module).__name__, str(module.scheme), module.choice.name, module.choice.reason)
            shared = id(module.packed) in seen  # a tied head: its bytes are the embedding's
            seen.add(id(module.packed))
            kinds.setdefault(key, []).append(0 if shared else module.nbytes)
    lines = [
        f"{len(sizes)} {kind} {scheme}: {name} ({reason}), {sum(sizes) / 1e6:.1f} MB"
        for (kind, scheme, name, reason), sizes in kinds.items()
    ]
    loops = Counter(m.unstacked for m in model.modules() if isinstance(m, QuantExperts) and m.unstacked)
    return lines + [f"{count} QuantExperts: one expert after the other ({why})" for why, count in loops.items()]


def _load_plain(folder: Path, dtype: torch.dtype | None, device: str | torch.device, trust_remote_code: bool) -> Any:
    """An unquantized folder, as transformers loads it."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", trust_remote_code=trust_remote_code, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        raise CheckpointError(f"{folder}: transformers cannot load it: {' '.join(str(e).split())[:300]}") from e
    return model.requires_grad_(False).to(device).eval()


def _read_model_config(folder: Path, trust_remote_code: bool) -> Any:
    """The folder's config without its quantization_config, which is ours to act on."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, TypeError, ImportError) as e:
        raise CheckpointError(f"{folder / 'config.json'}: transformers cannot read it: {e}") from e
    config = deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _module_names(weights: WeightMap, checkpoint: QuantizedCheckpoint) -> dict[str, str]:
    """Name on disk -> path in the model of every quantized module; an expert's path is that in unfused stacks."""
    result: dict[str, str] = {}
    unused = {name.removesuffix(".weight") for name in weights.unused}
    for target, group in weights.groups.items():
        owner = target.rpartition(".")[0]
        for name in group.names:
            prefix = checkpoint.prefix(name)
            if prefix is None:
                continue
            expert = _EXPERT.search(prefix) if group.converter is not None else None
            result[prefix] = f"{owner}.{expert[1]}.{expert[2]}" if expert else owner
    for prefix in checkpoint.prefixes:
        if prefix in unused:
            result[prefix] = prefix
    return result


def _install_packed(
    source: SourceModel, checkpoint: QuantizedCheckpoint, dtype: torch.dtype, device: str | torch.device
) -> None:
    """Load what is not quantized, then put packed modules where the quantized ones are."""
    model = source.model
    for block in source.structure.blocks:
        if any(checkpoint.prefix(f"{x.disk_name}.weight") for stack in block.experts for x in stack.linears):
            source.unfuse(block.name)
    plan = dict(_quantized_modules(source, checkpoint))
    for paths in plan.values():
        for path in paths:
            model.get_submodule(path).weight = None  # so that the next line reads only the rest
    source.materialize("", dtype, device)
    stacks: dict[str, tuple[QuantExperts, set[str]]] = {}  # path -> experts, and their matrices still to come
    for path, module in list(model.named_modules()):
        if isinstance(module, UnfusedExperts):
            experts = QuantExperts.adopt(module)
            _replace(model, path, experts)
            stacks[path] = experts, {p for paths in plan.values() for p in paths if p.startswith(f"{path}.")}
    for prefix, paths in plan.items():
        scheme = checkpoint.schemes.get(prefix)
        qt = checkpoint.quantized(prefix)  # raises where there is no scheme
        assert scheme is not None
        weight, choice = prepare(qt, scheme, dtype, device)
        for path in paths:
            _replace(model, path, _packed_module(model.get_submodule(path), path, weight, choice, qt.shape, scheme))
        del weight
        for path in paths:
            experts, missing = stacks.get(path.rsplit(".", 2)[0], (None, set()))
            missing.discard(path)
            if experts is not None and not missing:  # at once, so that the next layer finds the memory given back
                experts.stack()


def _avoid_slow_paths(model: Any) -> None:
    """What torch does badly in 16 bits on a CPU, beside packed linears that are fast."""
    widen_single_queries(model)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        model.set_output_embeddings(FlatLinear.adopt(head))


def _quantized_modules(source: SourceModel, checkpoint: QuantizedCheckpoint) -> Iterator[tuple[str, list[str]]]:
    """(name on disk, paths of the modules that hold this weight) of every quantized matrix the model uses."""
    experts = {x.disk_name: x.name for b in source.structure.blocks for s in b.experts for x in s.linears}
    holders: dict[int, list[str]] = {}
    for path, module in source.model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            holders.setdefault(id(weight), []).append(path)
    for target, group in source.weights.groups.items():
        for prefix in filter(None, map(checkpoint.prefix, group.names)):
            if prefix in experts:
                yield prefix, [experts[prefix]]
            elif group.converter is None and target.endswith(".weight"):
                owner = source.model.get_submodule(target.removesuffix(".weight"))
                yield prefix, holders[id(owner.weight)]
            else:
                raise FormatError(
                    f"{prefix} is stored quantized, but this model merges it into {target}, which cannot run packed; "
                    "load it with packed=False"
                )


def _packed_module(
    module: nn.Module, path: str, weight: PackedWeight, choice: Choice, shape: tuple[int, int], scheme: Any
) -> PackedModule:
    """What replaces `module`: a QuantLinear with its bias, or a QuantEmbedding."""
    if isinstance(module, nn.Linear):
        if (module.out_features, module.in_features) != shape:
            raise CheckpointError(
                f"{path}: the checkpoint gives shape {list(shape)}, config.json asks for "
                f"{[module.out_features, module.in_features]}; the two do not belong together"
            )
        return QuantLinear(weight, scheme, choice, module.bias)
    if isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward:
        return QuantEmbedding(weight, scheme, choice)
    raise FormatError(
        f"{path} is stored quantized, but a {type(module).__name__} cannot run packed; load it with packed=False"
    )


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _finished(model: Any, folder: Path) -> Any:
    """Generation defaults and name, as from_pretrained sets them."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config.name_or_path = model.name_or_path = str(folder)
    return model.requires_grad_(False).eval()
