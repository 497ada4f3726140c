"""Programmatic dependent launch: a kernel begins while the one before it still runs, and waits where it must.

A kernel launched so starts once every program of the kernel before it has called `release` (or ended), not once that
kernel has drained. `wait` then holds until the kernel before has ended and all it wrote can be seen. That one waited
for its own predecessor in every program, and so on: behind `wait` everything earlier on the stream is done, as with a
plain launch. So no program may end, or read or write anything that another kernel touches, before its `wait`.

What is read before `wait` must have been written before the last plain launch on the stream: weights, and what earlier
steps left (positions, caches), for a step begins with plain launches (the embedding).
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from bitwright.kernels.problem import PDL, cuda_features

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # a Triton without them, where the switch below is off
    gdc_launch_dependents = gdc_wait = None


@triton.jit
def release(ON: tl.constexpr):
    """Let the next kernel begin: the first thing a small kernel does, so that weights are fetched beside it."""
    if ON:
        gdc_launch_dependents()


@triton.jit
def wait(ON: tl.constexpr):
    """Hold until all earlier kernels are done."""
    if ON:
        gdc_wait()


@cache
def options(device: torch.device) -> dict[str, bool]:
    """What a launch on `device` is given: the kernel's switch PDL and, where it is on, the attribute of the launch."""
    on = device.type == "cuda" and PDL in cuda_features(device)
    return {"PDL": True, "launch_pdl": True} if on else {"PDL": False}
