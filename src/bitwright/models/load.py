"""A model on meta whose modules come to memory one at a time.

`open_model` builds the transformers model without weights and checks, before anything long starts, that the checkpoint
holds every parameter in the right shape. `materialize` then reads exactly the tensors of one module, through
transformers' own renaming and merging (`naming`), and `release` lets them go. Parameters come in the dtype that
from_pretrained would give them (some models keep a few in float32), so a materialized block computes bit for bit what
the fully loaded one does. Buffers that no checkpoint holds, such as rotary frequencies, are computed by the model's
own initialisation on opening and stay real.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import CheckpointError, NumericsError, StructureError
from bitwright.models.checkpoint import Checkpoint, read_config
from bitwright.models.discover import ExpertStack, Linear, Structure, describe, discover
from bitwright.models.experts import fuse, unfuse
from bitwright.models.naming import WeightMap, map_weights
from bitwright.models.skeleton import Skeleton, build_skeleton

_COMPANIONS = re.compile(
    r"(tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|.+\.model|.+\.tiktoken"
    r"|chat_template.*|generation_config\.json|(pre)?processor_config\.json|(licen[cs]e|notice|use_policy|copying).*)",
    re.IGNORECASE,
)


def open_model(path: str | Path, trust_remote_code: bool = False, dtype: torch.dtype | None = None) -> SourceModel:
    """Open the model folder `path`; no weight is read beyond what tells whether tied tensors are equal.

    dtype: what `materialize` gives unless told otherwise; None = the one in config.json, else the most common on disk.
    CheckpointError: files missing, damaged or not matching config.json, already quantized, custom code without
    `trust_remote_code`. StructureError: blocks or linears that are not understood.
    """
    folder = Path(path)
    config_dict = read_config(folder)
    _refuse_unfit(folder, config_dict, trust_remote_code)
    checkpoint = Checkpoint(folder)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, TypeError, ImportError) as e:
        reason = str(e).strip().partition("\n")[0]
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers cannot read it: {reason}; check model_type, upgrade transformers"
        ) from e
    if dtype is None:
        dtype = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    if not isinstance(dtype, torch.dtype):
        dtype = _common_dtype(checkpoint)
    skeleton = build_skeleton(config, dtype, trust_remote_code, folder)
    return SourceModel(folder, config, dict(config_dict), checkpoint, skeleton, dtype, trust_remote_code)


def companion_files(folder: str | Path) -> list[Path]:
    """Files of a model folder that a quantized copy should take along: tokenizer, chat template, generation config,
    licence and notice, and Python files where config.json refers to custom code. Sorted; weights are not among them."""
    folder = Path(folder)
    custom = "auto_map" in read_config(folder)
    return sorted(
        p for p in folder.iterdir() if p.is_file() and (_COMPANIONS.fullmatch(p.name) or (custom and p.suffix == ".py"))
    )


class SourceModel:
    """An opened model: `config`, `config_dict` (config.json as read), `model` (on meta), `checkpoint`, `structure`,
    `weights` (which tensors on disk make which parameter), `folder`, `dtype`."""

    def __init__(
        self,
        folder: Path,
        config: Any,
        config_dict: dict[str, Any],
        checkpoint: Checkpoint,
        skeleton: Skeleton,
        dtype: torch.dtype,
        trust_remote_code: bool,
    ) -> None:
        self.folder = folder
        self.config = config
        self.config_dict = config_dict
        self.checkpoint = checkpoint
        self.model = skeleton.model
        self.dtype = dtype
        self._trust_remote_code = trust_remote_code
        self._skeletons = {dtype: skeleton}
        self.weights: WeightMap = map_weights(self.model, checkpoint.names)
        self._aliases = self._resolve_tied()
        self._check_complete()
        self.structure: Structure = self._with_disk_names(discover(self.model))
        self._expert_keys = {
            f"{linear.name}.weight": f"{linear.disk_name}.weight"
            for block in self.structure.blocks
            for stack in block.experts
            for linear in stack.linears
        }

    # ------------------------------------------------------------------ memory

    def materialize(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> nn.Module:
        """Load the parameters and buffers of the module `name` ("" = the whole model) and return the module.

        Only the tensors of that module are read. Experts may be fused or unfused; unfused before loading is leaner,
        because then nothing is merged. Parameters do not require gradients. A tied parameter becomes real in all its
        places. NumericsError names the tensor that holds NaN or Inf, as stored or after the cast to `dtype`.
        """
        module = self._module(name)
        prefix = f"{name}." if name else ""
        self._load([prefix + key for key in module.state_dict()], dtype, device)
        self._place_buffers(lambda key: key.startswith(prefix), dtype, device)
        return module

    def materialize_rest(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> None:
        """Load everything outside the decoder blocks: embeddings, final norm, projections, output head."""
        inside = f"{self.structure.blocks_name}."
        self._load([key for key in self.model.state_dict() if not key.startswith(inside)], dtype, device)
        self._place_buffers(lambda key: not key.startswith(inside), dtype, device)

    def release(self, name: str) -> None:
        """Put the parameters of the module `name` ("" = the whole model) back to meta; unfused experts are fused
        again. A tied parameter goes in all its places. Computed buffers stay."""
        module = self._module(name)
        fuse(module)
        prefix = f"{name}." if name else ""
        for key, tensor in module.state_dict(keep_vars=True).items():
            self._set(prefix + key, torch.empty_like(tensor, device="meta"))

    def release_rest(self) -> None:
        """Put everything outside the decoder blocks back to meta."""
        inside = f"{self.structure.blocks_name}."
        for key, tensor in self.model.state_dict(keep_vars=True).items():
            if not key.startswith(inside):
                self._set(key, torch.empty_like(tensor, device="meta"))

    def unfuse(self, block_name: str) -> None:
        """Turn every fused expert stack of a block into linears, before or after the block is materialized."""
        for block in self.structure.blocks:
            if block.name == block_name:
                module = self._module(block_name)
                for stack in block.experts:
                    unfuse(module, stack)
                return
        raise StructureError(f"{block_name!r} is not a block of {self.structure.blocks_name}")

    # ------------------------------------------------------------------- names

    def disk_names(self, key: str) -> list[str]:
        """Tensors on disk that make the parameter `key` (with experts fused or unfused); a tied parameter that is not
        stored itself gives those of its partner."""
        if key in self._expert_keys:
            return [self._expert_keys[key]]
        for alias in (key, *self._aliases.get(key, ())):
            if names := self.weights.disk_names(alias):
                return list(names)
        raise StructureError(f"the model has no parameter {key!r}")

    def own_tensor(self, key: str) -> str | None:
        """The tensor on disk that is the parameter `key` (experts unfused) and nothing else; None if several make it,
        or it is tied to another."""
        if key in self._expert_keys:
            return self._expert_keys[key]
        group = self.weights.groups.get(key)
        if group is None or group.converter is not None or len(group.names) != 1 or self._aliases.get(key):
            return None
        return group.names[0]

    def kept_tensors(self, quantized: Iterable[str]) -> list[str]:
        """Sorted names of the tensors on disk to copy unchanged when the modules `quantized` (module paths as in
        `Linear.name`, or the embedding or head) write their weights themselves.

        Biases stay among them. What a quantized module is tied to does not: it is no longer the same matrix, or is
        stored only once, so whoever quantizes one half writes the other. StructureError if a tensor on disk serves a
        quantized and an unquantized module both.
        """
        chosen = set(quantized)
        replaced: set[str] = set()
        for name in sorted(chosen):
            key = f"{name}.weight"
            if key in self._expert_keys:
                replaced.add(self._expert_keys[key])
                continue
            if key not in self.weights.groups and key not in self._aliases:
                raise StructureError(f"{name!r} is not a module with a weight of this model")
            tied = (key, *self._aliases.get(key, ()))
            for group in (self.weights.groups[k] for k in tied if k in self.weights.groups):
                for target in group.targets:
                    if target not in tied and target.removesuffix(".weight") not in chosen:
                        raise StructureError(
                            f"{group.names[0]} on disk holds both {name} and {target.removesuffix('.weight')}; "
                            "quantize both or neither"
                        )
                replaced.update(group.names)
        return [name for name in self.checkpoint.names if name not in replaced]

    def describe(self) -> dict[str, Any]:
        """`discover.describe` of this model, with bytes on disk and the tensors the model does not use."""
        summary = describe(self.structure, self.checkpoint.bytes)
        return {**summary, "dtype": str(self.dtype).removeprefix("torch."), "unused_on_disk": list(self.weights.unused)}

    # ---------------------------------------------------------------- internals

    def _module(self, name: str) -> nn.Module:
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            raise StructureError(f"{type(self.model).__name__} has no module {name!r}") from None

    def _load(self, keys: list[str], dtype: torch.dtype | None, device: torch.device | str) -> None:
        skeleton = self._skeleton(dtype or self.dtype)
        done: set[str] = set()
        for key in keys:
            if key in done:
                continue
            read = self._reader(skeleton.dtypes.get(key, dtype or self.dtype), device)
            if key in self._expert_keys:
                made = {key: read(self._expert_keys[key])}
            else:
                stored = next(a for a in (key, *self._aliases.get(key, ())) if a in self.weights.groups)
                made = self.weights.groups[stored].build(self.model, read)
            for target, tensor in made.items():
                done.update(self._set(target, tensor))

    def _reader(self, dtype: torch.dtype, device: torch.device | str) -> Callable[[str], Tensor]:
        def read(name: str) -> Tensor:
            stored = self.checkpoint.get(name)
            _require_finite(stored, name, self.checkpoint.file(name), "")
            tensor = stored.to(device=device, dtype=dtype)
            if tensor.dtype != stored.dtype:
                _require_finite(tensor, name, self.checkpoint.file(name), f" after the cast to {dtype}")
            return tensor

        return read

    def _set(self, key: str, tensor: Tensor) -> tuple[str, ...]:
        """Place one tensor at `key` and wherever it is tied to; returns those keys."""
        keys = (key, *self._aliases.get(key, ()))
        value = nn.Parameter(tensor, requires_grad=False)
        for k in keys:
            parent, _, leaf = k.rpartition(".")
            module = self.model.get_submodule(parent)
            expected = getattr(module, leaf)
            if expected.shape != tensor.shape:
                raise CheckpointError(
                    f"{k}: the checkpoint gives shape {list(tensor.shape)}, config.json asks for "
                    f"{list(expected.shape)}; the two do not belong together"
                )
            setattr(module, leaf, value if leaf in module._parameters else tensor)
        return keys

    def _place_buffers(
        self, wanted: Callable[[str], bool], dtype: torch.dtype | None, device: torch.device | str
    ) -> None:
        for key, buffer in self._skeleton(dtype or self.dtype).buffers.items():
            if wanted(key):
                parent, _, leaf = key.rpartition(".")
                self.model.get_submodule(parent)._buffers[leaf] = buffer.to(device, copy=True)

    def _skeleton(self, dtype: torch.dtype) -> Skeleton:
        """What from_pretrained would do at `dtype`: a second model on meta, built once per dtype asked for."""
        if dtype not in self._skeletons:
            other = build_skeleton(self.config, dtype, self._trust_remote_code, self.folder)
            self._skeletons[dtype] = replace(other, model=None)
        return self._skeletons[dtype]

    def _resolve_tied(self) -> dict[str, tuple[str, ...]]:
        """Key -> the other keys that are the same parameter. Where config.json ties two tensors that are both stored
        and differ, they are untied, as from_pretrained does."""
        groups: dict[int, list[str]] = {}
        for key, tensor in self.model.state_dict(keep_vars=True).items():
            groups.setdefault(id(tensor), []).append(key)
        aliases: dict[str, tuple[str, ...]] = {}
        for keys in groups.values():
            stored = [key for key in keys if key in self.weights.groups]
            for key in stored[1:]:
                first, other = self.weights.groups[stored[0]].names[0], self.weights.groups[key].names[0]
                if not torch.equal(self.checkpoint.get(first), self.checkpoint.get(other)):
                    parent, _, leaf = key.rpartition(".")
                    module = self.model.get_submodule(parent)
                    setattr(module, leaf, nn.Parameter(torch.empty_like(getattr(module, leaf)), requires_grad=False))
                    keys = [k for k in keys if k != key]
            for key in keys:
                if len(keys) > 1:
                    aliases[key] = tuple(k for k in keys if k != key)
        return aliases

    def _check_complete(self) -> None:
        """CheckpointError unless every state-dict entry can be made, in the right shape where that can be seen."""
        state = self.model.state_dict()
        absent = [
            key
            for key in state
            if not any(alias in self.weights.groups for alias in (key, *self._aliases.get(key, ())))
        ]
        if absent:
            unused = f"; {len(self.weights.unused)} tensors on disk have no place in it" if self.weights.unused else ""
            raise CheckpointError(
                f"{self.folder}: {len(absent)} of {len(state)} parameters of {type(self.model).__name__} are not in "
                f"the checkpoint (first {absent[0]!r}){unused}; the weights are incomplete, or config.json is another "
                "model's"
            )
        for key, group in self.weights.groups.items():
            if group.converter is None and self.checkpoint.shape(group.names[0]) != tuple(state[key].shape):
                name = group.names[0]
                raise CheckpointError(
                    f"{self.checkpoint.file(name)}: tensor {name!r} has shape {list(self.checkpoint.shape(name))}, "
                    f"config.json asks for {list(state[key].shape)}; the two do not belong together"
                )

    def _with_disk_names(self, structure: Structure) -> Structure:
        """The structure with `disk_name` of every linear as it is in this checkpoint."""
        blocks = tuple(
            replace(
                block,
                linears=tuple(self._renamed(linear) for linear in block.linears),
                experts=tuple(self._renamed_stack(stack) for stack in block.experts),
            )
            for block in structure.blocks
        )
        head = None if structure.head is None else self._renamed(structure.head)
        return replace(structure, blocks=blocks, head=head)

    def _renamed(self, linear: Linear) -> Linear:
        group = self.weights.groups.get(f"{linear.name}.weight")
        # A weight merged from several tensors, or cut out of one, has no name of its own on disk: it keeps its path,
        # which transformers reads back as it is.
        if group is None or group.converter is not None or not group.names[0].endswith(".weight"):
            return linear
        return replace(linear, disk_name=group.names[0].removesuffix(".weight"))

    def _renamed_stack(self, stack: ExpertStack) -> ExpertStack:
        fused = list(self.model.get_submodule(stack.name)._parameters)
        found: dict[str, str] = {}  # path of an expert's linear -> prefix on disk
        for leaf in fused:
            for name in self.weights.disk_names(f"{stack.name}.{leaf}"):
                m = re.search(r"\.(\d+)\.(\w+)\.weight$", name)
                if m is None:
                    raise StructureError(
                        f"{stack.name}: the checkpoint stores its experts fused ({name!r}), not one tensor per expert; "
                        "load it with transformers, save it with save_pretrained, and give that folder"
                    )
                found[f"{stack.name}.{m[1]}.{m[2]}"] = name.removesuffix(".weight")

        def rename(linears: tuple[Linear, ...]) -> tuple[Linear, ...]:
            for x in linears:
                disk = found.get(x.name)
                if disk is None or self.checkpoint.shape(f"{disk}.weight") != (x.N, x.K):
                    what = "is not in the checkpoint" if disk is None else "has another shape in the checkpoint"
                    raise CheckpointError(f"{self.folder}: expert weight {x.name} [{x.N}, {x.K}] {what}")
            return tuple(replace(x, disk_name=found[x.name]) for x in linears)

        renamed = replace(stack, gate=rename(stack.gate), up=rename(stack.up), down=rename(stack.down))
        if len(found) != len(renamed.linears):
            raise CheckpointError(
                f"{self.folder}: {stack.name} has {len(found)} expert tensors on disk, config.json asks for "
                f"{len(renamed.linears)}; the two do not belong together"
            )
        return renamed


def _refuse_unfit(folder: Path, config: Mapping[str, Any], trust_remote_code: bool) -> None:
    """CheckpointError for models that are already quantized or that need custom code without the flag."""
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        raise CheckpointError(
            f"{folder}: already quantized ({method}); give the folder of the unquantized model instead"
        )
    if "auto_map" not in config or trust_remote_code:
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise CheckpointError(
            f"{folder}: model type {config.get('model_type')!r} needs Python code that lies in that folder (auto_map); "
            "read the code, and if you trust it, pass trust_remote_code (--trust-remote-code)"
        )


def _common_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating dtype that holds most bytes on disk."""
    held: dict[torch.dtype, int] = {}
    for name in checkpoint.names:
        dtype = checkpoint.dtype(name)
        if dtype.is_floating_point:
            held[dtype] = held.get(dtype, 0) + checkpoint.nbytes(name)
    return max(held, key=lambda d: held[d]) if held else torch.float32


def _require_finite(tensor: Tensor, name: str, file: Path, when: str) -> None:
    if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
        return
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        kind = "NaN" if bool(tensor.isnan().any()) else "Inf"
        way = "use float32 or bfloat16" if when else "download or train it again"
        raise NumericsError(f"{file}: tensor {name!r} holds {bad} {kind} values of {tensor.numel()}{when}; {way}")
