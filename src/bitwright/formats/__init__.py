"""Checkpoint formats: what a quantized module looks like on disk and in config.json.

Each format is a module with the same functions (`Format`): tensors of one module to a dict with local keys and back,
schemes per module to a quantization_config and back. No format sees a model, a file or transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from bitwright.errors import FormatError
from bitwright.formats import compressed_tensors, native
from bitwright.formats.portability import portability
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import Scheme
from bitwright.split import SplitTensor

__all__ = ["FORMATS", "Format", "choose", "portability", "reader"]

_REASONS_SHOWN = 3


class Format(Protocol):
    """What every format module offers; see `compressed_tensors` for the meaning of each function."""

    NAME: str

    def can_express(self, scheme: Scheme, K: int, class_name: str = "Linear") -> str | None: ...

    def objections(
        self, schemes: Mapping[str, Scheme], widths: Mapping[str, int], classes: Mapping[str, str] | None = None
    ) -> list[str]: ...

    def pack(self, qt: QuantizedTensor | SplitTensor, scheme: Scheme, layer: str = "") -> dict[str, Tensor]: ...

    def unpack(
        self, tensors: Mapping[str, Tensor], scheme: Scheme, layer: str = ""
    ) -> QuantizedTensor | SplitTensor: ...

    def write_config(
        self, schemes: Mapping[str, Scheme], ignore: Sequence[str], classes: Mapping[str, str]
    ) -> dict[str, Any]: ...

    def read_config(
        self, config: Mapping[str, Any], names: Sequence[str], classes: Mapping[str, str] | None = None
    ) -> dict[str, Scheme]: ...


FORMATS: dict[str, Format] = {compressed_tensors.NAME: compressed_tensors, native.NAME: native}


def choose(
    schemes: Mapping[str, Scheme],
    widths: Mapping[str, int],
    requested: str | None = None,
    classes: Mapping[str, str] | None = None,
) -> Format:
    """The format to write: the requested one, else compressed-tensors if it can express everything, else native.

    schemes, widths: scheme and K per quantized module. requested: a key of `FORMATS`, or None. classes: class name per
    module where it is not "Linear". Raises FormatError with the reasons if the requested format cannot.
    """
    if not schemes:
        raise FormatError("no module is quantized, so there is nothing to write; check the recipe's rules")
    if requested is not None:
        if requested not in FORMATS:
            raise FormatError(f"unknown format {requested!r}; choose one of {', '.join(FORMATS)}")
        reasons = FORMATS[requested].objections(schemes, widths, classes)
        if reasons:
            more = len(reasons) - _REASONS_SHOWN
            shown = "; ".join(reasons[:_REASONS_SHOWN]) + (f"; and {more} more" if more > 0 else "")
            raise FormatError(f"{requested} cannot express this: {shown}")
        return FORMATS[requested]
    return native if compressed_tensors.objections(schemes, widths, classes) else compressed_tensors


def reader(quantization_config: Mapping[str, Any]) -> Format:
    """The format whose `read_config` and `unpack` understand a folder with this quantization_config."""
    method = quantization_config.get("quant_method")
    by_method: dict[Any, Format] = {compressed_tensors.NAME: compressed_tensors, native.QUANT_METHOD: native}
    if method not in by_method:
        raise FormatError(
            f"quant_method {method!r} is not read; bitwright reads {', '.join(by_method)}. "
            "Start from the unquantized model instead"
        )
    return by_method[method]
