"""Whether calibration may keep every micro-batch waiting inside a block, and on which device it runs."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import psutil
import torch

from bitwright.calibrate.capture import Group
from bitwright.calibrate.stream import Streams, waiting_bytes
from bitwright.errors import CalibrationError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
# What is free is shared with others and with the solver's own matrices: half of it may be taken by activations.
_SHARE = 0.5


def parse_bytes(text: str) -> int:
    """Bytes of "1.4GB", "800 MB" or a plain number."""
    m = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", text.lower())
    if m is None:
        raise CalibrationError(f"memory size {text!r} is not understood; write it like 8GB or 800MB")
    return int(float(m[1]) * _UNITS[m[2]])


def fits_one_pass(
    groups: Sequence[Group],
    routed: Collection[str],
    tokens: int,
    streams: Streams,
    max_memory: str | None,
    device: torch.device,
) -> bool:
    """Whether the waiting activations of a one-pass block stay inside the memory allowed."""
    count = 1 if streams.reference is None else 2
    need = waiting_bytes(groups, routed, tokens, streams.quantized[0].shape[-1], count)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return need <= _SHARE * free
    if max_memory is None:
        return need <= _SHARE * psutil.virtual_memory().available
    return need <= parse_bytes(max_memory) - psutil.Process().memory_info().rss
