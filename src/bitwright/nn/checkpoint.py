"""A quantized folder seen as if it were an ordinary one: `P.weight` stands for all the tensors that P is stored as.

So everything that reads ordinary checkpoints (names, shapes, renaming, completeness) works on quantized ones as it is;
`get` dequantizes one matrix, and `quantized` gives its codes instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bitwright.errors import FormatError, NumericsError
from bitwright.formats import Format
from bitwright.models.checkpoint import Checkpoint
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import Scheme
from bitwright.split import SplitTensor

_WEIGHT = "weight"
_PACKED, _SCALE, _SHAPE = "weight_packed", "weight_scale", "weight_shape"
_STORED = {_PACKED, _SCALE, "weight_values"}  # one of these says that a matrix is quantized (or pruned)


class QuantizedCheckpoint(Checkpoint):
    """Tensors of a quantized folder. `prefixes`: what is quantized, by its name on disk without ".weight".

    format: reads the tensors. dtype: of the run; scales are rounded to it where it is bfloat16, once, for every path.
    `schemes` is set by the loader, which knows how names on disk and in the model correspond.
    """

    def __init__(self, folder: Path, format: Format, dtype: torch.dtype) -> None:
        super().__init__(folder)
        self._format, self._run_dtype = format, dtype
        self.schemes: Mapping[str, Scheme] = {}
        stored = super().names
        self._parts: dict[str, dict[str, str]] = {}  # prefix -> local key -> name on disk
        for name in stored:
            prefix, _, leaf = name.rpartition(".")
            if leaf == _WEIGHT or leaf.startswith(f"{_WEIGHT}_"):
                self._parts.setdefault(prefix, {})[leaf] = name
        self._parts = {prefix: parts for prefix, parts in self._parts.items() if _STORED & parts.keys()}
        hidden = {name for parts in self._parts.values() for name in parts.values()}
        self._names = tuple(sorted({n for n in stored if n not in hidden} | {f"{p}.{_WEIGHT}" for p in self._parts}))

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Quantized modules by their names on disk, sorted."""
        return tuple(sorted(self._parts))

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted; one per quantized matrix."""
        return self._names

    def prefix(self, name: str) -> str | None:
        """The quantized module that `name` is the weight of, or None for a tensor stored as it is."""
        prefix = name.removesuffix(f".{_WEIGHT}")
        return prefix if prefix != name and prefix in self._parts else None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; [N, K] of a quantized one."""
        prefix = self.prefix(name)
        if prefix is None:
            return super().shape(name)
        parts = self._parts[prefix]
        if _WEIGHT in parts:
            return super().shape(parts[_WEIGHT])
        if _SHAPE not in parts:
            raise FormatError(f"{self.folder}: {prefix}.{_SHAPE} is missing; the checkpoint is incomplete")
        return tuple(super().get(parts[_SHAPE]).tolist())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor; of a quantized one, that of its scales."""
        return super().dtype(self._any_part(name, _SCALE))

    def nbytes(self, name: str) -> int:
        """Stored bytes of a tensor, scales included."""
        prefix = self.prefix(name)
        return super().nbytes(name) if prefix is None else sum(map(super().nbytes, self._parts[prefix].values()))

    def file(self, name: str) -> Path:
        """The shard that holds a tensor (the first of its parts)."""
        return super().file(self._any_part(name, _SCALE))

    def get(self, name: str) -> Tensor:
        """One tensor; a quantized one dequantized to float32."""
        prefix = self.prefix(name)
        return super().get(name) if prefix is None else self.quantized(prefix).dequantize()

    def quantized(self, prefix: str) -> QuantizedTensor | SplitTensor:
        """Codes and scales of the module `prefix`. FormatError or NumericsError names the tensor that is malformed."""
        if prefix not in self.schemes:
            raise FormatError(
                f"{self.folder}: {prefix} is stored quantized, but quantization_config gives it no scheme; "
                "config.json is damaged or belongs to another checkpoint"
            )
        tensors = {leaf: super(QuantizedCheckpoint, self).get(name) for leaf, name in self._parts[prefix].items()}
        qt = self._format.unpack(tensors, self.schemes[prefix], prefix)
        if isinstance(qt, SplitTensor):
            return qt  # the format has checked its values, and no operator needs its scales in another dtype
        if not bool(torch.isfinite(qt.scale).all()):
            raise NumericsError(
                f"{self.file(f'{prefix}.{_WEIGHT}')}: {prefix}.{_SCALE} holds NaN or Inf; "
                "download the file or quantize the model again"
            )
        return replace(qt, scale=qt.scale.to(torch.bfloat16)) if self._run_dtype == torch.bfloat16 else qt

    def _any_part(self, name: str, leaf: str) -> str:
        prefix = self.prefix(name)
        if prefix is None:
            return name
        parts = self._parts[prefix]
        return parts.get(leaf) or parts.get("weight_values") or next(iter(parts.values()))
