"""Which tensors on disk make which parameter of the model, by transformers' own rules.

Since transformers 5 the two differ: names are rewritten (`block_sparse_moe` on disk is `mlp` in the model) and tensors
are merged (the experts of a layer become one 3-D parameter). The rules live in transformers as an ordered list of
renamings and converters per model type. `map_weights` runs each name on disk through that list once, without reading
any weight; the answer is a table that `load` follows one module at a time and that names every tensor a quantized
linear replaces.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from bitwright.errors import CheckpointError, StructureError


@dataclass(frozen=True)
class Group:
    """Tensors on disk that together make one or more state-dict entries of the model.

    targets: state-dict keys. sources: (pattern, name on disk), in the order transformers collects them; the pattern
    is the converter's, or the name itself. converter: a transformers WeightConverter, None for a plain renaming.
    """

    targets: tuple[str, ...]
    sources: tuple[tuple[str, str], ...]
    converter: Any = field(default=None, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Names on disk."""
        return tuple(name for _, name in self.sources)

    def build(self, model: nn.Module, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """State-dict key -> tensor, from `read(name on disk)`; runs transformers' converter where there is one.

        CheckpointError if the converter fails or gives other keys than expected.
        """
        if self.converter is None:
            return {self.targets[0]: read(self.names[0])}
        converter = copy.deepcopy(self.converter)
        for pattern, name in self.sources:
            # A thunk, not a tensor: the converter then reads and merges one source pattern after the other.
            converter.add_tensor(self.targets[0], name, pattern, _thunk(read, name))
        try:
            made = converter.convert(self.targets[0], model=model, config=getattr(model, "config", None))
        except (RuntimeError, ValueError, IndexError, KeyError) as e:
            raise CheckpointError(
                f"{self.targets[0]}: its {len(self.sources)} tensors on disk ({self.names[0]}, ...) do not fit "
                f"together: {e}; the checkpoint does not match its config.json"
            ) from e
        tensors = {key: value[0] if isinstance(value, list) else value for key, value in made.items()}
        if set(tensors) != set(self.targets):
            raise CheckpointError(
                f"{self.targets[0]}: converting {self.names[0]}, ... gives {sorted(tensors)}, "
                f"expected {sorted(self.targets)}; this transformers version and the checkpoint disagree"
            )
        return tensors


def _thunk(read: Callable[[str], Tensor], name: str) -> Callable[[], Tensor]:
    return lambda: read(name)


@dataclass(frozen=True)
class WeightMap:
    """groups: state-dict key -> Group. unused: names on disk that the model has no place for (kept as they are)."""

    groups: Mapping[str, Group]
    unused: tuple[str, ...]

    def disk_names(self, key: str) -> tuple[str, ...]:
        """Names on disk that make a state-dict entry; empty if it is not stored (tied to another, or absent)."""
        group = self.groups.get(key)
        return () if group is None else group.names


def map_weights(model: nn.Module, disk_names: Iterable[str]) -> WeightMap:
    """Assign every tensor on disk to the state-dict entries of `model` (meta tensors suffice).

    model: a transformers PreTrainedModel. CheckpointError if two unrelated tensors claim one parameter.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix

    sources: dict[str, list[tuple[str, str]]] = {}
    converter_of: dict[str, Any] = {}
    unused: list[str] = []
    for name in sorted(disk_names, key=dot_natural_key):  # transformers' order; it fixes the order of the experts
        key, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, pattern = rename_source_key(name, [], [], prefix, state)
        if key not in state:
            unused.append(name)
        elif key not in sources:
            converter_of[key] = None if pattern is None else by_pattern[pattern]
            sources[key] = [(pattern or name, name)]
        elif pattern is not None and converter_of[key] is not None:
            sources[key].append((pattern, name))
        else:
            raise CheckpointError(
                f"both {sources[key][0][1]!r} and {name!r} on disk are the model's {key!r}; remove one of them"
            )

    groups: dict[str, Group] = {}
    for key, found in sources.items():
        converter = converter_of[key]
        targets = [key]
        if converter is not None and len(converter.target_patterns) > 1:
            first = converter.target_patterns[0]
            targets = [key.replace(first, other) for other in converter.target_patterns]
        group = Group(tuple(targets), tuple(found), converter)
        for target in targets:
            groups[target] = group
    return WeightMap(groups, tuple(unused))


def expert_leaves(model: nn.Module, key: str, class_name: str) -> tuple[str, ...]:
    """Names of the linears of one expert that a fused 3-D parameter holds, in the order they lie in it.

    key: state-dict key of the parameter, e.g. `model.layers.0.mlp.experts.gate_up_proj` -> ("w1", "w3") for Mixtral,
    ("gate_proj", "up_proj") for Qwen. StructureError if transformers does not build it from one tensor per expert.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    transforms = get_model_conversion_mapping(model) if hasattr(model, "base_model_prefix") else []
    for t in transforms:
        if not isinstance(t, WeightConverter) or not any(key.endswith(target) for target in t.target_patterns):
            continue
        plain = [p.replace("\\.", ".") for p in t.source_patterns]
        leaves = [re.search(r"\.\*\.(\w+)\.weight$", p) for p in plain]
        if leaves and all(leaves):
            return tuple(m[1] for m in leaves if m)
    raise StructureError(
        f"{key} ({class_name}): transformers does not build this expert stack from one 2-D tensor per expert, so its "
        "experts have no names on disk of their own; stacks stored fused are not supported"
    )
