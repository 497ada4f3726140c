"""Links of a block: modules that make channels, with the matrices that read them. Guesses, for `smoothing` to verify.

* A norm is linked with all linears, expert stacks and routers that are given its very output.
* A linear that reads something else (o_proj, down_proj, an expert's w2) is linked with an earlier one beside it whose
  width fits (v_proj, up_proj; where heads share keys and values, several columns share a row's factor), the last first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.calibrate.capture import Call, Group, readers
from bitwright.models.structure import Block
from bitwright.scheme import WeightScheme

# Linear (path in its block) -> the alphas to choose from, and its scheme.
Asked = Mapping[str, tuple[Sequence[float], WeightScheme]]
# Parameter (path in its block) -> the dtype it is stored in, None if it is quantized. Those missing may not change.
Storage = Mapping[str, torch.dtype | None]


@dataclass(frozen=True)
class Link:
    """Paths of modules in the block, and channel: int64 [K], the channel that each column reads.

    maker: makes channels [C]. readers: their matrices [·, K] read them. seen: is given all that the readers are (one of
    them, or the expert stack of some).
    """

    maker: str
    readers: tuple[str, ...]
    seen: str
    channel: Tensor

    @property
    def size(self) -> int:
        """C."""
        return int(self.channel.max()) + 1


def candidate_links(
    block: Block,
    module: nn.Module,
    groups: Sequence[Group],
    hidden: Tensor,
    call: Call,
    asked: Asked,
    storage: Storage,
    why: dict[str, dict[str, Any] | str],
) -> tuple[Tensor, list[list[list[Link]]]]:
    """The block's output, and sets of links, each set in several versions to be tried in turn. Links of a set hold or
    fall together: the same one in every expert. why: of linears without a candidate, filled in."""
    local = {x.name: x.name.removeprefix(f"{block.name}.") for x in block.all_linears}
    stacks = {s.path: [local[x.name] for x in (*s.gate, *s.up)] for s in block.experts}
    stack_of = {local[x.name]: s.path for s in block.experts for x in s.linears}
    others = [k.name.removeprefix(f"{block.name}.").rpartition(".")[0] for k in block.kept if len(k.shape) == 2]
    takers = [name for name in local.values() if name not in stack_of] + [*stacks, *others]
    plain, found = readers(module, hidden, call, _norms(module), takers)

    norms: list[list[list[Link]]] = []
    fed: set[str] = set()
    for norm, takes in found.items():
        names = tuple(n for taker in takes for n in stacks.get(taker, [taker]))
        fed |= set(names)
        wanted = [n for n in names if n in asked]
        if not wanted:
            continue
        C = module.get_submodule(norm).weight.numel()
        link = Link(norm, names, takes[0], torch.arange(C, device=plain.device))
        if obstacle := _obstacle(link, module, asked, storage):
            why |= dict.fromkeys(wanted, obstacle)
        else:
            norms.append([[link]])

    inner: dict[str, list[list[Link]]] = {}
    called: list[str] = []
    for group in groups:
        first = group.names[0]
        parent, _, leaf = first.rpartition(".")
        beside = [name for name in reversed(called) if name.rpartition(".")[0] == parent]
        called += group.names
        if first in fed or first not in asked:
            continue
        tries = inner.setdefault(f"{stack_of[first]}.*.{leaf}" if first in stack_of else first, [])
        version = 0
        for maker in beside:
            channel = _shared_channels(module, maker, first)
            if channel is None:
                continue
            link = Link(maker, group.names, first, channel)
            if obstacle := _obstacle(link, module, asked, storage):
                why |= {name: obstacle for name in group.names if name in asked}
                continue
            tries += [[]] * (version == len(tries))
            tries[version] = [*tries[version], link]
            version += 1
    return plain, [*inner.values(), *norms]


def _norms(module: nn.Module) -> list[str]:
    """Paths of the modules that hold a vector `weight` and nothing that is no vector of that size."""
    found = []
    for path, m in module.named_modules():
        own = list(m.parameters(recurse=False))
        weight = getattr(m, "weight", None)
        if isinstance(weight, Tensor) and not list(m.children()) and all(p.shape == (weight.numel(),) for p in own):
            found.append(path)
    return found


def _shared_channels(module: nn.Module, maker: str, reader: str) -> Tensor | None:
    """The row of `maker` that each column of `reader` reads if neighbouring heads share keys and values; None if the
    widths cannot belong to one another."""
    weight = module.get_submodule(maker).weight
    C, K = weight.shape[0], module.get_submodule(reader).weight.shape[1]
    rows = torch.arange(C, device=weight.device)
    if C == K:
        return rows
    head_dim = getattr(module.get_submodule(maker.rpartition(".")[0]), "head_dim", None)
    if K % C or not isinstance(head_dim, int) or C % head_dim:
        return None
    return rows.view(-1, head_dim).repeat_interleave(K // C, 0).reshape(-1)


def _obstacle(link: Link, module: nn.Module, asked: Asked, storage: Storage) -> str | None:
    """Why the factors of a link cannot be moved at all."""
    sizes = [p.shape[0] for p in module.get_submodule(link.maker).parameters(recurse=False)]
    if any(size != link.size for size in sizes):
        return f"{link.maker} does not make one channel a row"
    for name in link.readers:
        if not any(key.startswith(f"{name}.") for key, _, dim, _ in parts(module, link) if dim == 1):
            return f"{name} reads the same input and has no column a channel"
        if name not in asked and storage.get(f"{name}.weight", torch.float32) is None:
            return f"{name} reads the same input and is quantized without factors"
    absent = [key for key, *_ in parts(module, link) if key not in storage]
    return f"{absent[0]} is not a tensor of its own on disk" if absent else None


def parts(module: nn.Module, link: Link) -> Iterator[tuple[str, nn.Parameter, int, Tensor | None]]:
    """Every parameter of a link: path, itself, the dimension along which its channels lie, the channel of each place in
    it (None: in order)."""
    for leaf, p in module.get_submodule(link.maker).named_parameters(recurse=False):
        yield f"{link.maker}.{leaf}", p, 0, None
    for name in link.readers:
        for leaf, p in module.get_submodule(name).named_parameters(recurse=False):
            if p.ndim == 2 and p.shape[1] == len(link.channel):
                yield f"{name}.{leaf}", p, 1, link.channel
