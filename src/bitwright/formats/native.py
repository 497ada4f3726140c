r"""bitwright's own format, for what compressed-tensors cannot say: ragged last groups, experts that differ in scheme,
quantized embeddings, outlier columns, 4-bit activations, 2:4.

Tensors lie as `dense` describes for every plain scheme (w8a8 codes too: packed 8-bit words are the int8 bytes offset
by 128), and as `split` describes for the others. The config lists the scheme string per module, exact names or ``re:``
patterns that match the whole name::

    {"quant_method": "bitwright", "format_version": 1,
     "schemes": {"w4a16-g128": ["re:model\\.layers\\.\\d+\\.mlp\\.up_proj$"], "w8a16": ["lm_head"]},
     "ignore": ["model.layers.0.mlp.down_proj"]}

`ignore` states what was left out on purpose; reading does not need it, because no target matches by class. Only
bitwright reads this format: `bitwright.load` and the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from bitwright.errors import FormatError, SchemeError
from bitwright.formats import dense, split, targets
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import Scheme
from bitwright.split import SplitTensor

NAME = "native"
QUANT_METHOD = "bitwright"
FORMAT_VERSION = 1


def can_express(scheme: Scheme, K: int, class_name: str = "Linear") -> str | None:
    """None: every scheme, width and kind of module can be stored."""
    return None


def objections(
    schemes: Mapping[str, Scheme], widths: Mapping[str, int], classes: Mapping[str, str] | None = None
) -> list[str]:
    """Empty: every assignment of schemes can be stored."""
    return []


def pack(qt: QuantizedTensor | SplitTensor, scheme: Scheme, layer: str = "") -> dict[str, Tensor]:
    """Local tensors of one module, `dense` keys, or `split` keys. `layer` only names it in errors."""
    if isinstance(qt, SplitTensor):
        if qt.scheme != scheme:
            raise FormatError(f"{layer or 'weight'}: quantized at {qt.scheme}, but the config would say {scheme}")
        return split.pack(qt, layer)
    if qt.scheme != scheme.weight:
        raise FormatError(f"{layer or 'weight'}: quantized at {Scheme(qt.scheme)}, but the config would say {scheme}")
    return dense.pack(qt, layer)


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme, layer: str = "") -> QuantizedTensor | SplitTensor:
    """The QuantizedTensor of one module's local tensors, a SplitTensor where the scheme is not plain; FormatError names
    the tensor that is malformed."""
    if not scheme.plain:
        return split.unpack(tensors, scheme, layer)
    return dense.unpack(tensors, scheme.weight, layer)


def write_config(schemes: Mapping[str, Scheme], ignore: Sequence[str], classes: Mapping[str, str]) -> dict[str, Any]:
    """The quantization_config for config.json. `classes` plays no part: nothing is matched by class."""
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme, []).append(name)
    named = targets.compact(groups, (name for name in ignore if not name.startswith(targets.REGEX)))
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "schemes": {str(scheme): named[scheme] for scheme in groups},
        "ignore": list(ignore),
    }


def read_config(
    config: Mapping[str, Any], names: Sequence[str], classes: Mapping[str, str] | None = None
) -> dict[str, Scheme]:
    """Scheme per quantized module among `names`; a name that no target matches is not quantized.

    Raises FormatError for a config that is malformed, written by a newer bitwright, or ambiguous about a module.
    """
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise FormatError(
            f"format_version {version!r} is not read by this bitwright (it reads {FORMAT_VERSION}); update bitwright"
        )
    listed = config.get("schemes")
    if not isinstance(listed, Mapping) or not listed:
        raise FormatError("quantization_config has no schemes; nothing says how the weights are stored")
    exact: dict[str, set[Scheme]] = {}
    patterns: list[tuple[str, Scheme]] = []
    for text, given in listed.items():
        try:
            scheme = Scheme.parse(text)
        except SchemeError as error:
            raise FormatError(f"quantization_config: {error}") from error
        for target in given:
            if target.startswith(targets.REGEX):
                patterns.append((target, scheme))
            else:
                exact.setdefault(target, set()).add(scheme)
    result: dict[str, Scheme] = {}
    for name in names:
        found = exact.get(name, set()) | {scheme for target, scheme in patterns if targets.matches(name, target)}
        if len(found) > 1:
            raise FormatError(
                f"{name} is listed under several schemes ({', '.join(sorted(map(str, found)))}); the config is damaged"
            )
        if found:
            result[name] = found.pop()
    return result
