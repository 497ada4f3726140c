"""The only hooks: forwards of a block that stop at the input of a linear and go on when they are told to.

A block's forward runs inside a greenlet. When it reaches a linear that calibration waits for, a pre-hook switches back
to the caller with that linear's input; the caller may solve the linear, replace its weight and switch back, and the
forward continues with the new weight. So every micro-batch needs one forward per block, however many linears are
solved on the way, and each linear sees inputs made by quantized predecessors (true sequential) without any re-run.
Killing the greenlet instead and starting anew gives the same numbers with nothing kept in memory: that is the
several-pass plan.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from bitwright.errors import StructureError


@dataclass(frozen=True)
class Call:
    """What a block was called with, apart from the hidden states: positional and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Stop:
    """A forward waiting at the linear `name` with its input [..., K]."""

    name: str
    x: Tensor


class Forward:
    """One forward of `block` that stops at each linear in `stops` the first time it is called.

    `advance` runs to the next stop, or returns None at the end; `output` then holds the hidden states.
    `outputs` keeps what the linears named in `watch` returned, for the caller to take away.
    """

    def __init__(
        self, block: nn.Module, hidden: Tensor, call: Call, stops: Iterable[str], watch: Iterable[str] = ()
    ) -> None:
        self.stops = set(stops)
        self.watch = set(watch)
        self.outputs: dict[str, Tensor] = {}
        self.output: Tensor | None = None
        self._run: _Run | None = _Run(self, lambda: first_tensor(block(hidden, *call.args, **call.kwargs)))

    def advance(self) -> Stop | None:
        """Run until the next stop (returned) or the end (None)."""
        assert self._run is not None, "the forward has ended"
        got = self._run.switch()
        if isinstance(got, Stop):
            return got
        self.output = got
        self.close()
        return None

    def close(self) -> None:
        """End a forward: the frames of one that still waits unwind and let their tensors go.

        The two objects refer to each other, and what hangs on them is large: parted here, not left to the collector.
        """
        if self._run is not None:
            if not self._run.dead:
                self._run.throw(GreenletExit)
            self._run.forward = None
            self._run = None


class _Run(greenlet):
    """The greenlet of one Forward; hooks find their forward through it."""

    def __init__(self, forward: Forward, run: Callable[[], Any]) -> None:
        super().__init__(run)
        self.forward: Forward | None = forward


def _running() -> Forward | None:
    current = getcurrent()
    return current.forward if isinstance(current, _Run) else None


@contextmanager
def stopping(block: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """While open, forwards of `block` run by `Forward` stop at (and report outputs of) its submodules `names`."""

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            forward = _running()
            if forward is not None and name in forward.stops:
                forward.stops.discard(name)  # a linear called twice is solved at its first call
                getcurrent().parent.switch(Stop(name, args[0]))

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            forward = _running()
            if forward is not None and name in forward.watch:
                forward.outputs[name] = output.clone()  # the block may add the residual to it in place, as Falcon does

        return hook

    handles = []
    try:
        for name in names:
            module = block.get_submodule(name)
            handles += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def observing(block: nn.Module, names: Iterable[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, `see(name, x)` is called with the input of each of the submodules `names` at every call."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args: see(name, args[0])

    handles = [block.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def readers(
    block: nn.Module, hidden: Tensor, call: Call, makers: Iterable[str], takers: Iterable[str]
) -> tuple[Tensor, dict[str, list[str]]]:
    """The block's output, and for each of the submodules `makers` those of `takers` whose first argument is its output
    (or a view of that), by one forward."""
    made: dict[int, tuple[str, Tensor]] = {}  # the tensors too: storage that was let go may be another's soon
    found: dict[str, list[str]] = {}

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                made[output.untyped_storage().data_ptr()] = name, output
                found.setdefault(name, [])

        return hook

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                maker, _ = made.get(args[0].untyped_storage().data_ptr(), (None, None))
                if maker is not None and name not in found[maker]:
                    found[maker].append(name)

        return hook

    handles = [block.get_submodule(name).register_forward_hook(after(name)) for name in makers]
    handles += [block.get_submodule(name).register_forward_pre_hook(before(name)) for name in takers]
    try:
        return first_tensor(block(hidden, *call.args, **call.kwargs)), found
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(output: Any) -> Tensor:
    """The hidden states of a block's output, which is a tensor or a tuple that begins with it."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    raise StructureError(f"a decoder block returned {type(output).__name__}; expected hidden states or a tuple of them")


class _Captured(Exception):
    """Raised at the last block: everything after it is not needed."""


@torch.no_grad()
def block_calls(
    model: nn.Module, blocks: list[nn.Module], input_ids: Tensor, wrap: Callable[[Tensor], Any]
) -> tuple[Tensor, list[Call]]:
    """Hidden states that enter the first block for input_ids [B, L], and the other arguments of every block.

    The blocks (which may be on meta) are passed by: each returns wrap(its hidden states) at once, so masks, positions
    and per-layer arguments are the model's own while nothing is computed.
    """
    calls: list[Call] = []
    first: list[Tensor] = []

    def passing(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            named = dict(kwargs)
            hidden = args[0] if args else named.pop("hidden_states")
            calls.append(Call(tuple(args[1:]), named))
            if index == 0:
                first.append(hidden)
            elif hidden is not first[0]:
                raise StructureError(
                    f"{type(model).__name__} changes the hidden states between block {index - 1} and block {index}; "
                    "such models cannot be calibrated"
                )
            if index == len(blocks) - 1:
                raise _Captured
            return wrap(hidden)

        return forward

    originals = [block.__dict__.get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.__dict__["forward"] = passing(index)
        with suppress(_Captured):
            model(input_ids=input_ids, use_cache=False)
    finally:
        for block, original in zip(blocks, originals, strict=True):
            if original is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = original
    if len(calls) != len(blocks):
        raise StructureError(
            f"{type(model).__name__}: {len(calls)} of {len(blocks)} blocks were called in one forward; "
            "models that skip or repeat blocks cannot be calibrated"
        )
    return first[0], calls


def sharing(calls: list[Call], first: list[Call]) -> list[Call]:
    """`calls` with every tensor that equals the one at the same place in `first` replaced by that one: masks and
    rotary tables are the same for all micro-batches of one shape, and would be held once for each."""

    def same(mine: Any, other: Any) -> Any:
        if isinstance(mine, Tensor):
            alike = isinstance(other, Tensor) and mine.shape == other.shape and mine.dtype == other.dtype
            return other if alike and torch.equal(mine, other) else mine
        if type(mine) is not type(other):
            return mine
        if type(mine) in (tuple, list) and len(mine) == len(other):
            return type(mine)(same(m, o) for m, o in zip(mine, other, strict=True))
        if type(mine) is dict:
            return {key: same(value, other.get(key)) for key, value in mine.items()}
        return mine

    return [Call(same(c.args, f.args), same(dict(c.kwargs), dict(f.kwargs))) for c, f in zip(calls, first, strict=True)]


@dataclass(frozen=True)
class Group:
    """Linears that read the same tensor, in call order; `writes`: the first one's output is added to the block's
    residual stream as it is (so an error already in that stream can be made good there); values: of that tensor, per
    token of the block (experts see some of the tokens only)."""

    names: tuple[str, ...]
    writes: bool
    values: float = 0.0


# Size of the probing vector relative to the mean activation: what a norm lets through beside it must not matter.
_PROBE = 1e3


@torch.no_grad()
def trace(
    block: nn.Module, hidden: Tensor, call: Call, names: Iterable[str], routed: Collection[str] = ()
) -> list[Group]:
    """Groups of `names` (submodules of block) by shared input, in the order of their calls, from real forwards.

    Whether a linear writes to the residual stream is found by adding a huge vector to its output: what comes out of the
    block then holds that vector unchanged, since every other path passes a norm or a softmax, which saturates, or
    another matrix, which turns it.
    """
    seen: dict[str, Tensor] = {}
    order: list[list[str]] = []
    shapes: dict[str, torch.Size] = {}
    probe: dict[str, Tensor] = {}

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if name in seen:
                return
            x = args[0]
            if order and seen[order[-1][0]] is x:
                order[-1].append(name)
            else:
                order.append([name])
            seen[name] = x

        return hook

    def after(name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            shapes[name] = output.shape
            return output + probe[name].reshape(output.shape) if name in probe else None

        return hook

    handles = []
    try:
        for name in names:
            module = block.get_submodule(name)
            handles += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
        plain = first_tensor(block(hidden, *call.args, **call.kwargs))
        groups = []
        for members in order:
            writes = len(members) == 1 and members[0] not in routed and shapes[members[0]].numel() == plain.numel()
            if writes:
                size = _PROBE * float(plain.abs().mean() + hidden.abs().mean())
                direction = torch.randn(plain.shape[-1], generator=torch.Generator().manual_seed(0))
                probe[members[0]] = (size * direction).to(plain).expand_as(plain)
                moved = first_tensor(block(hidden, *call.args, **call.kwargs)).float() - plain.float()
                wanted = probe.pop(members[0]).float()
                writes = bool((moved - wanted).norm() < 0.1 * wanted.norm())
            groups.append(Group(tuple(members), writes, seen[members[0]].numel() * plain.shape[-1] / plain.numel()))
        return groups
    finally:
        for handle in handles:
            handle.remove()
