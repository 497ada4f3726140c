"""Triton kernels from the attention of a layer to its experts, for few tokens: norm, router, choice, sorted rows.

The experts cannot begin before all of it is done, and each launch in between costs more than its work. So a token's
program adds and normalises its row, multiplies it with the router, which was fetched before the row was there, and
chooses; with one token that is all there is to know, else a second launch counts who goes where and moves the rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitwright.kernels import dependent
from bitwright.kernels.dependent import release, wait
from bitwright.kernels.triton.elementwise import normalized

_MAX_TOKENS = 64  # every program of the second launch reads all choices
_MAX_ROUTER = 1 << 16  # numbers of a router, padded to powers of two, that the registers of one program hold


def takes(M: int, E: int, H: int) -> bool:
    """Whether `norm_route` is for M tokens of width H and E experts."""
    return 0 < M <= _MAX_TOKENS and _padded(E) * _padded(H) <= _MAX_ROUTER


@triton.jit
def _norm_choose(
    x,
    residual,
    weight,
    bias,
    router,
    normed,
    total,
    choices,
    shares,
    offsets,
    tokens,
    H,
    eps,
    E: tl.constexpr,
    TOP: tl.constexpr,
    CENTER: tl.constexpr,
    BIAS: tl.constexpr,
    ALONE: tl.constexpr,
    BLOCK: tl.constexpr,
    BE: tl.constexpr,
    BT: tl.constexpr,
    PDL: tl.constexpr,
):
    """ALONE: there is one token; its row goes to its experts at once, and `choices` are places."""
    release(PDL)
    token = tl.program_id(0)
    row = token.to(tl.int64) * H
    i = tl.arange(0, BLOCK)
    e = tl.arange(0, BE)
    t = tl.arange(0, BT)
    inside = i < H
    gain = tl.load(weight + i, mask=inside, other=0.0)
    shift = gain
    if BIAS:
        shift = tl.load(bias + i, mask=inside, other=0.0)
    routes = tl.load(router + e[:, None] * H + i[None, :], mask=(e < E)[:, None] & inside[None, :], other=0.0)
    wait(PDL)
    h = tl.load(residual + row + i, mask=inside, other=0.0).to(tl.float32)
    h += tl.load(x + row + i, mask=inside, other=0.0).to(tl.float32)
    h = h.to(normed.dtype.element_ty)
    tl.store(total + row + i, h, mask=inside)
    y = normalized(h, gain, shift, inside, H, eps, CENTER, BIAS).to(normed.dtype.element_ty)
    if ALONE:
        for j in tl.static_range(TOP):
            tl.store(normed + j * H + i, y, mask=inside)
    else:
        tl.store(normed + row + i, y, mask=inside)
    logits = tl.sum(routes.to(tl.float32) * tl.where(inside, y.to(tl.float32), 0.0)[None, :], 1)
    left = tl.where(e < E, logits.to(normed.dtype.element_ty).to(tl.float32), float("-inf"))
    experts = tl.full([BT], 2147483647, tl.int32)  # padding: beyond all experts
    tops = tl.full([BT], float("-inf"), tl.float32)
    for j in tl.static_range(TOP):
        expert = tl.argmax(left, 0)  # of equals the first
        experts = tl.where(t == j, expert, experts)
        tops = tl.where(t == j, tl.max(left, 0), tops)
        left = tl.where(e == expert, float("-inf"), left)
    share = tl.exp(tops - tl.max(tops, 0))
    tl.store(shares + token * TOP + t, share / tl.sum(share, 0), mask=t < TOP)
    if ALONE:
        # Places among the chosen are in the order of experts.
        place = tl.sum((experts[None, :] < experts[:, None]).to(tl.int32), 1)
        tl.store(choices + t, place, mask=t < TOP)
        tl.store(tokens + t, 0, mask=t < TOP)
        first = tl.arange(0, 2 * BE)
        start = tl.sum((experts[None, :] < first[:, None]).to(tl.int32), 1)
        tl.store(offsets + first, start, mask=first <= E)
    else:
        tl.store(choices + token * TOP + t, experts, mask=t < TOP)


@triton.jit
def _send(
    normed,
    choices,
    rows,
    offsets,
    tokens,
    places,
    count,
    H,
    E: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
    BC: tl.constexpr,
    BE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per choice: its place is the number of choices before it, in the order of experts, then of tokens."""
    release(PDL)
    wait(PDL)
    mine = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    c = tl.arange(0, BC)
    row = tl.load(normed + (mine // TOP).to(tl.int64) * H + i, mask=i < H, other=0.0)
    expert = tl.load(choices + mine)
    experts = tl.load(choices + c, mask=c < count, other=2147483647)
    place = tl.sum(((experts < expert) | ((experts == expert) & (c < mine))).to(tl.int32), 0)
    tl.store(rows + place.to(tl.int64) * H + i, row, mask=i < H)
    tl.store(tokens + place, mine // TOP)
    tl.store(places + mine, place)
    first = tl.arange(0, BE)
    start = tl.sum((experts[None, :] < first[:, None]).to(tl.int32), 1)
    tl.store(offsets + first, start, mask=(first <= E) & (mine == 0))


def norm_route(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    center: bool,
    router: Tensor,
    top_k: int,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """See `routing.norm_route`, for what `takes` says: rows, residual + x, the four tensors of a Routing.

    weight, bias and router are read before the launch before this one is waited for (`dependent`).
    """
    M, H = residual.shape
    E, count = router.shape[0], M * top_k
    made = {"dtype": torch.int32, "device": residual.device}
    offsets, tokens, places = torch.empty(E + 1, **made), torch.empty(count, **made), torch.empty(M, top_k, **made)
    shares = torch.empty(M, top_k, dtype=torch.float32, device=residual.device)
    rows, total = residual.new_empty(count, H), torch.empty_like(residual)
    alone = M == 1
    choices = places if alone else torch.empty_like(places)
    normed = rows if alone else torch.empty_like(residual)
    launch = dependent.options(residual.device)
    _norm_choose[(M,)](
        x,
        residual,
        weight,
        weight if bias is None else bias,
        router,
        normed,
        total,
        choices,
        shares,
        offsets,
        tokens,
        H,
        eps,
        E=E,
        TOP=top_k,
        CENTER=center,
        BIAS=bias is not None,
        ALONE=alone,
        BLOCK=_padded(H),
        BE=_padded(E),
        BT=_padded(top_k),
        num_warps=min(16, max(4, _padded(E) * _padded(H) // 2048)),
        **launch,
    )
    if not alone:
        _send[(count,)](
            normed,
            choices,
            rows,
            offsets,
            tokens,
            places,
            count,
            H,
            E=E,
            TOP=top_k,
            BLOCK=_padded(H),
            BC=_padded(count),
            BE=_padded(E + 1),
            num_warps=4,
            **launch,
        )
    return rows, total, (offsets, tokens, places, shares)


def _padded(n: int) -> int:
    return max(2, triton.next_power_of_2(n))
