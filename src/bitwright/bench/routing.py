"""Which tokens go to which expert, and the sum of what comes back; nothing here waits for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """M tokens sent to top_k experts each, as M top_k rows sorted by expert, then by token.

    offsets int32 [E + 1]: expert e has rows offsets[e] .. offsets[e + 1] - 1. tokens int32 [M top_k]: of each row.
    places int32 [M, top_k]: the row of each choice, best first. shares float32 [M, top_k]: their weights, sum 1.
    """

    offsets: Tensor
    tokens: Tensor
    places: Tensor
    shares: Tensor


def route(logits: Tensor, top_k: int) -> Routing:
    """The top_k best of the router's logits [M, E], their weights a softmax over the chosen; ties: the lower expert."""
    if logits.is_cuda:
        from bitwright.bench import routing_kernels as kernels

        if logits.shape[0] <= kernels.MAX_TOKENS:
            return Routing(*kernels.route(logits, top_k))
    return route_reference(logits, top_k)


def combine(y: Tensor, routing: Routing) -> Tensor:
    """[M, H]: the rows y [M top_k, H] of each token, weighted and summed in float32, best choice first."""
    if y.is_cuda:
        from bitwright.bench import routing_kernels as kernels

        return kernels.combine(y, routing.places, routing.shares)
    return combine_reference(y, routing)


def route_reference(logits: Tensor, top_k: int) -> Routing:
    """The twin of `route`, any number of tokens."""
    M, E = logits.shape
    ordered, experts = logits.float().sort(dim=-1, descending=True, stable=True)
    experts = experts[:, :top_k].flatten()
    order = torch.sort(experts, stable=True).indices  # row -> choice
    places = torch.empty_like(order).scatter_(0, order, torch.arange(M * top_k, device=logits.device))
    ends = torch.searchsorted(experts[order], torch.arange(E + 1, device=logits.device), out_int32=True)
    return Routing(
        ends,
        (order // top_k).to(torch.int32),
        places.view(M, top_k).to(torch.int32),
        ordered[:, :top_k].softmax(dim=-1),
    )


def combine_reference(y: Tensor, routing: Routing) -> Tensor:
    """The twin of `combine`."""
    total = y.new_zeros(routing.places.shape[0], y.shape[1], dtype=torch.float32)
    for j in range(routing.places.shape[1]):
        total = total + routing.shares[:, j, None] * y[routing.places[:, j].long()].float()
    return total.to(y.dtype)
