"""bitwright: quantize large language models, run them packed, and measure what it cost.

>>> import bitwright as bw
>>> bw.quantize("model", "model-w4", scheme="w4a16-g128", calibration="speeches.txt")
>>> model = bw.load("model-w4")
>>> print(bw.evaluate("model-w4", "held-out.txt", reference="model").quality)

Importing this costs little: torch and transformers are loaded by the first call that needs them. `evaluate` and
`generate` are bound here at once although they share their names with the modules that define them; bound later, the
import of such a module would put the module in the function's place.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bitwright import errors
from bitwright.evaluate import evaluate
from bitwright.generate import generate
from bitwright.recipe import Recipe
from bitwright.scheme import Scheme

if TYPE_CHECKING:
    from bitwright.nn.load import load
    from bitwright.pipeline import quantize
    from bitwright.qtensor import QuantizedTensor

    __version__: str

__all__ = ["QuantizedTensor", "Recipe", "Scheme", "__version__", "errors", "evaluate", "generate", "load", "quantize"]

_HOMES = {
    "QuantizedTensor": "bitwright.qtensor",
    "load": "bitwright.nn.load",
    "quantize": "bitwright.pipeline",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("bitwright")
    if name not in _HOMES:
        raise AttributeError(f"module 'bitwright' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
