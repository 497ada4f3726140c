"""Smoothing inside a block: factors move from the makers of channels to those who read them, and nothing else changes.

A maker's channels (a norm's weight and bias, the rows and bias of a linear) are divided by s_j, the columns of the
matrices that read them multiplied. What belongs together is guessed (`links`), and the guess is put to the test:
factors are powers of two (`algorithms.smooth`), so the block with arbitrary ones in place must give the same bits for a
batch of calibration text. Between gate_proj and down_proj, behind a GELU, or where someone else reads the norm, it does
not, and the link is dropped. The chosen factors then pass the same test. A channel one of whose tensors could not hold
the product exactly, in memory or as it will be stored, keeps the factor 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.algorithms.quik import InputProfile
from bitwright.algorithms.smooth import choose_factors
from bitwright.calibrate.capture import Call, Group, first_tensor
from bitwright.calibrate.links import Asked, Link, Storage, candidate_links, parts
from bitwright.calibrate.simulate import profiles
from bitwright.models.structure import Block

_INEXACT = "factors here would not be exact"


@dataclass(frozen=True, eq=False)
class _Move:
    """Exponents e [C] for a link, and what the record says of them (in words if they are all zero)."""

    link: Link
    e: Tensor
    said: dict[str, Any] | str = ""


@dataclass
class Smoothed:
    """records: by linear (path in the block), what was moved into it, or in words why nothing. factors: by path of a
    changed parameter, what it was multiplied with, each fp32 and broadcastable to it."""

    records: dict[str, dict[str, Any] | str] = field(default_factory=dict)
    factors: dict[str, list[Tensor]] = field(default_factory=dict)


@torch.no_grad()
def smooth_block(
    block: Block,
    module: nn.Module,
    groups: Sequence[Group],
    hidden: Sequence[Tensor],
    calls: Sequence[Call],
    asked: Asked,
    storage: Storage,
) -> Smoothed:
    """Move factors into the linears `asked`, in place.

    module: the block with its original weights. groups: all of `trace`. hidden, calls: the micro-batches that enter it.
    Costs one forward of each micro-batch, and three more of the first, or if a guess is wrong about one for every link.
    """
    result = Smoothed(dict.fromkeys(asked, "nothing before it commutes with factors"))
    plain, candidates = candidate_links(block, module, groups, hidden[0], calls[0], asked, storage, result.records)

    def same_bits() -> bool:
        return torch.equal(plain, first_tensor(module(hidden[0], *calls[0].args, **calls[0].kwargs)))

    generator = torch.Generator().manual_seed(0)

    def holds(links: Sequence[Link]) -> bool:
        return _holds(links, module, storage, same_bits, generator)

    firsts = [tries[0] for tries in candidates if tries]
    if firsts and holds([link for links in firsts for link in links]):  # one forward for all of them
        held = firsts
    elif firsts and not same_bits():
        result.records |= dict.fromkeys(asked, "two forwards of the block differ, so nothing can be verified")
        return result
    else:
        held = [links for links in (next(filter(holds, tries), None) for tries in candidates) if links]
    seen = profiles(module, hidden, calls, [link.seen for links in held for link in links]) if held else {}

    moves: list[list[_Move]] = []
    for links in held:
        moves.append([_Move(link, *_factors(link, module, asked, seen, storage)) for link in links])
        _multiply(module, moves[-1])
    if held and not same_bits():
        moves = _one_by_one(module, moves, storage, same_bits)
    for m in (m for move in moves for m in move):
        said = {"from": f"{block.name}.{m.link.maker}", **m.said} if isinstance(m.said, dict) else m.said
        result.records |= {name: said for name in m.link.readers if name in asked}
        if bool(m.e.any()):
            for key, _, s in _scales(module, m.link, m.e):
                result.factors.setdefault(key, []).append(s)
    return result


def _one_by_one(
    module: nn.Module, moves: Sequence[Sequence[_Move]], storage: Storage, same_bits: Callable[[], bool]
) -> list[list[_Move]]:
    """What becomes of `moves`, which are in place and together change the output: each is tried alone on top of those
    that do not."""
    for move in reversed(moves):
        _multiply(module, move, back=True)
    out = []
    for move in moves:
        kept = [replace(m, e=_exact(module, m.link, m.e, storage)) for m in move]
        _multiply(module, kept)
        if not same_bits():
            _multiply(module, kept, back=True)
            kept = [replace(m, e=torch.zeros_like(m.e)) for m in kept]
        out.append([m if bool(m.e.any()) or isinstance(m.said, str) else replace(m, said=_INEXACT) for m in kept])
    return out


def _scales(module: nn.Module, link: Link, e: Tensor) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Every parameter with the factors for it, fp32 and broadcastable: 1/s for the maker, s for readers."""
    for key, p, dim, channel in parts(module, link):
        s = (-e if channel is None else e[channel]).exp2()
        yield key, p, s.view(-1, *[1] * (p.ndim - 1)) if dim == 0 else s


def _multiply(module: nn.Module, moves: Sequence[_Move], back: bool = False) -> None:
    """Put factors in place, or take them back in the opposite order: a tensor may be part of several links."""
    for move in reversed(moves) if back else moves:
        for _, p, s in _scales(module, move.link, -move.e if back else move.e):
            p.mul_(s.to(p.dtype))


def _exact(module: nn.Module, link: Link, e: Tensor, storage: Storage) -> Tensor:
    """e [C] with 0 where a parameter could not hold the product, or not give back what it held."""
    lossy = torch.zeros(link.size, dtype=torch.bool, device=e.device)
    for (key, p, s), (_, _, dim, channel) in zip(_scales(module, link, e), parts(module, link), strict=True):
        product = p * s.to(p.dtype)
        wrong = (product / s.to(p.dtype) != p) | ~product.isfinite()
        kept = storage[key]
        if kept is not None:
            stored = product.to(kept).float()
            wrong |= (stored != p.to(kept).float() * s) | ~stored.isfinite()
        places = wrong.transpose(0, dim).flatten(1).any(1) if p.ndim > 1 else wrong
        lossy[places if channel is None else channel[places]] = True
    return torch.where(lossy, 0.0, e)


def _holds(
    links: Sequence[Link],
    module: nn.Module,
    storage: Storage,
    same_bits: Callable[[], bool],
    generator: torch.Generator,
) -> bool:
    """Whether arbitrary factors on every channel leave the block's output as it was."""
    tried: list[_Move] = []
    for link in links:
        size = torch.randint(1, 3, (link.size,), generator=generator)
        sign = 1 - 2 * torch.randint(0, 2, (link.size,), generator=generator)
        e = (size * sign).float().to(link.channel.device)
        tried.append(_Move(link, _exact(module, link, e, storage)))
        _multiply(module, tried[-1:])
    same = same_bits()
    _multiply(module, tried, back=True)
    return same


def _factors(
    link: Link, module: nn.Module, asked: Asked, seen: Mapping[str, InputProfile], storage: Storage
) -> tuple[Tensor, dict[str, Any] | str]:
    """The exponents [C] to move, and what the record says of them; zeros and the reason if there are none."""
    names = [name for name in link.readers if name in asked]
    alphas, scheme = asked[names[0]]
    profile = seen.get(link.seen)
    none = torch.zeros(link.size, device=link.channel.device)
    if profile is None:
        return none, "calibration sent no tokens here"
    weights = [module.get_submodule(name).weight for name in names]
    chosen = choose_factors(profile, weights, link.channel, alphas, scheme)
    if chosen is None:
        return none, "no factors round better than none"
    e = _exact(module, link, chosen.exponents, storage)
    if not bool(e.any()):
        return none, _INEXACT
    return e, {
        "alpha": chosen.alpha,
        "channels": int((e != 0).sum()),
        "exponents": [int(e.min()), int(e.max())],
        "error": float(f"{chosen.error:.6g}"),
    }
