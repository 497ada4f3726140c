"""Which device a name such as "auto" stands for; everything that takes a device asks here."""

from __future__ import annotations

import torch

from bitwright.errors import BitwrightError


def choose_device(name: str) -> torch.device:
    """The device named, or for "auto" a CUDA device if there is one. BitwrightError if torch cannot use it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise BitwrightError(f"device {name!r} cannot be used: {str(e).splitlines()[0]}; try cpu or auto") from e
    return device
