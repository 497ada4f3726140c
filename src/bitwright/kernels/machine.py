"""What a launch asks of its device."""

from __future__ import annotations

from functools import cache

import torch


@cache
def machine(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors."""
    if device.type != "cuda":
        return (9, 0), 8  # the interpreter: few programs
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count
