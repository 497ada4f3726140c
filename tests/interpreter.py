"""For programs that run Triton kernels in Triton's interpreter: import this before whatever imports Triton.

Such a program is a process of its own, because TRITON_INTERPRET counts when a kernel is defined, and the tests that
compile need it unset. `interpreted.py` starts it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

from triton.runtime import interpreter

sys.path.insert(0, str(Path(__file__).parent))
from gpu.cases import poisoned


def report(checks: Mapping[str, Callable[[], None]]) -> None:
    """Make every check, memory from torch.empty poisoned, and print one JSON object, its name -> error or ""."""
    _accept_numpy()
    results = {}
    for name, check in checks.items():
        try:
            with poisoned():
                check()
            results[name] = ""
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(results))


def _accept_numpy() -> None:
    """Bounds of loops are arrays of one element in the interpreter, which NumPy 2.4 no longer takes for numbers."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: type, scope: object) -> None:
        patch(tensor, scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patched
