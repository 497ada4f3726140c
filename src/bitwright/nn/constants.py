"""Numbers that Python hands to torch, made into tensors once: for steps that are recorded as CUDA graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Constants(TorchFunctionMode):
    """Within, numbers and lists that Python hands to torch become tensors once, and the same ones when they come again.

    Made anew they are copied from the host, which cannot be recorded; `x[..., [-2], :]` does that in every attention
    of Falcon. So a rehearsal makes them and the recording finds them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__getitem__:
            x, index = args
            parts = index if isinstance(index, tuple) else (index,)
            if any(map(_is_list_of_int, parts)):
                parts = tuple(self._find([*i], {"device": x.device}) if _is_list_of_int(i) else i for i in parts)
                return func(x, parts)
        elif func is torch.tensor and len(args) == 1 and _is_plain(args[0]) and not kwargs.get("requires_grad"):
            return self._find(args[0], kwargs).clone()  # what the caller may write to must not be the one kept
        return func(*args, **kwargs)

    def _find(self, data: Any, options: dict[str, Any]) -> Tensor:
        key = f"{data!r} {sorted(options.items())!r}"
        if key not in self._made:
            self._made[key] = torch.tensor(data, **options)
        return self._made[key]


def _is_plain(data: Any) -> bool:
    """Numbers, or lists of them: what its text tells apart from all else."""
    return isinstance(data, bool | int | float) or (isinstance(data, list | tuple) and all(map(_is_plain, data)))


def _is_list_of_int(index: Any) -> bool:
    return isinstance(index, list) and bool(index) and all(type(i) is int for i in index)
