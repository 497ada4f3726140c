"""Which tokens go to which expert, and the sum of what comes back; nothing here waits for the device.

A step of few tokens has hardly any work here, so launches count: what lies between attention and experts is one call
(`norm_route`), and what the experts gave is summed by the next norm (`combine_norm`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.kernels.elementwise import add_norm, add_norm_reference


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


@dataclass(frozen=True)
class Outputs:
    """What the experts gave, not summed yet: rows [M top_k, H] in the order of `routing`."""

    rows: Tensor
    routing: Routing


def norm_route(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    center: bool,
    router: Tensor,
    top_k: int,
) -> tuple[Tensor, Tensor, Routing]:
    """`add_norm`, its tokens sent by `route`: (rows [M top_k, H] for the experts, residual + x [M, H], the routing).

    router [E, H], in the dtype of x. Its logits are summed in float32 and rounded once.
    """
    if x.is_cuda:
        from bitwright.kernels.triton import router as kernels

        if kernels.takes(x.shape[0], *router.shape):
            rows, total, sent = kernels.norm_route(x, residual, weight, bias, eps, center, router, top_k)
            return rows, total, Routing(*sent)
    normed, total = add_norm(x, residual, weight, bias, eps, center)
    routing = route(torch.mm(normed, router.t()), top_k)
    return normed.index_select(0, routing.tokens), total, routing


def combine_norm(
    outputs: Outputs, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool
) -> tuple[Tensor, Tensor]:
    """`add_norm` of the tokens' sums over their experts (`combine`)."""
    if residual.is_cuda:
        from bitwright.kernels.triton import elementwise as kernels

        routing = outputs.routing
        return kernels.add_norm(
            outputs.rows, residual, weight, bias, eps, center, places=routing.places, shares=routing.shares
        )
    return add_norm_reference(combine(outputs), residual, weight, bias, eps, center)


def route(logits: Tensor, top_k: int) -> Routing:
    """The top_k best of the router's logits [M, E], their weights a softmax over the chosen; ties: the lower expert."""
    if logits.is_cuda:
        from bitwright.kernels.triton import route as kernels

        if logits.shape[0] <= kernels.MAX_TOKENS:
            return Routing(*kernels.route(logits, top_k))
    return route_reference(logits, top_k)


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


def combine(outputs: Outputs) -> Tensor:
    """[M, H]: the rows of each token, weighted and summed in float32, best choice first, rounded once."""
    y, routing = outputs.rows, outputs.routing
    total = y.new_zeros(routing.places.shape[0], y.shape[1], dtype=torch.float32)
    for j in range(routing.places.shape[1]):
        total = total + routing.shares[:, j, None] * y[routing.places[:, j].long()].float()
    return total.to(y.dtype)
