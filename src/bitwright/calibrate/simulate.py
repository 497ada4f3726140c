"""Linears that compute as the packed ones will, for the streams of calibration; and what chooses their input's split.

Outlier columns have to be known before the statistics of a block are gathered, because those are taken of inputs as
the integer product sees them. So a block with such linears is passed once more, with its original weights, by the
stream that enters it: `profiles` keeps the largest |x| and the energy of every column, and a few tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from bitwright.algorithms.quik import InputProfile
from bitwright.calibrate.capture import Call, first_tensor, observing
from bitwright.split import InputSplit, SplitTensor

# Tokens of an input that its clip is chosen by, taken evenly from all micro-batches.
SAMPLE = 256


class SimulatedLinear(nn.Linear):
    """The linear of a split input in floating point: y = W_z · seen(x) + bias, with `weight` = W_z in float32."""

    split: InputSplit

    @classmethod
    def of(cls, linear: nn.Module, split: InputSplit) -> SimulatedLinear:
        """The stand-in of `linear` with its weight arranged and not yet rounded; the bias is shared."""
        N, K = linear.weight.shape
        module = cls(K, N, bias=False, device="meta")
        module.weight = nn.Parameter(split.arrange_weight(linear.weight.detach()), requires_grad=False)
        module.bias = linear.bias
        module.split = split
        return module.train(linear.training)

    def install(self, tensor: SplitTensor) -> None:
        """Take over the weight of `tensor` and its split."""
        self.split = tensor.split
        self.weight = nn.Parameter(tensor.arranged(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in the dtype of x."""
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(self.split.seen(x), self.weight, bias).to(x.dtype)


class _Sums:
    def __init__(self, x: Tensor) -> None:
        self.largest = torch.zeros(x.shape[-1], device=x.device)
        self.squares = torch.zeros(x.shape[-1], device=x.device)
        self.tokens = 0
        self.sample: list[Tensor] = []

    def add(self, x: Tensor, keep: int) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        if not len(x):
            return
        self.largest = torch.maximum(self.largest, x.abs().amax(0))
        self.squares += x.square().sum(0)
        self.tokens += len(x)
        self.sample.append(x[torch.arange(min(keep, len(x)), device=x.device) * len(x) // min(keep, len(x))])


@torch.no_grad()
def profiles(
    block: nn.Module, hidden: Sequence[Tensor], calls: Sequence[Call], names: Iterable[str]
) -> dict[str, InputProfile]:
    """What enters each of the submodules `names` of `block` while the micro-batches `hidden` pass through it.

    A submodule that is never called, or never with a token, gets no profile.
    """
    sums: dict[str, _Sums] = {}
    keep = -(-SAMPLE // len(hidden))

    def see(name: str, x: Tensor) -> None:
        sums.setdefault(name, _Sums(x)).add(x, keep)

    with observing(block, names, see):
        for h, call in zip(hidden, calls, strict=True):
            first_tensor(block(h, *call.args, **call.kwargs))
    return {
        name: InputProfile(s.largest, s.squares / s.tokens, torch.cat(s.sample)) for name, s in sums.items() if s.tokens
    }
