"""Calibration activations on their way through the blocks, and the statistics that the solvers need on the way.

Two streams run side by side when a solver wants the asymmetric target: the *quantized* one, through blocks whose
linears have been replaced, and the *reference* one, through the original blocks. A stream is a list of micro-batches
[B, L, D].

`run_block` takes one block: group by group (linears that share an input), it gathers H (and the correction D, see
algorithms/gptq) over all micro-batches, lets `solve` replace the weights, and goes on. With `one_pass` every
micro-batch's forward waits in the middle of the block (one forward per block, memory for the waiting activations);
without, each group starts the forwards anew (more arithmetic, memory of one micro-batch). The numbers are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from bitwright.algorithms.hessian import Gram
from bitwright.calibrate.capture import Call, Forward, Group, Stop, stopping
from bitwright.errors import NumericsError, StructureError
from bitwright.split import InputSplit


@dataclass
class Streams:
    """quantized, reference: micro-batches [B, L, D] that enter the next block (reference None when not needed)."""

    quantized: list[Tensor]
    reference: list[Tensor] | None = None


@dataclass(frozen=True)
class Needs:
    """What the solver of one group asks for: sink_weight of each sequence's first token in H; whether a correction;
    split: statistics of the arranged input as the integer product sees it (bitwright.split), not of the input."""

    sink_weight: float = 1.0
    correction: bool = False
    split: InputSplit | None = None


@dataclass
class Statistics:
    """What was gathered at one group's input: H [K, K] mean x^T x, fp32; tokens; a correction D [N, K] per linear;
    split: that of `Needs`, in whose arranged form H and D are; dead: with a split, bool [K] of the arranged columns
    that were zero at every token before they were rounded (H has the rounded ones)."""

    H: Tensor
    tokens: int
    corrections: dict[str, Tensor] = field(default_factory=dict)
    split: InputSplit | None = None
    dead: Tensor | None = None


class _Gathering:
    """Sums over micro-batches for one group. weights: the group's original weights [N, K] by name. routed: rows of the
    input are some of the tokens, in the router's order, so that none is known to be a sequence's first."""

    def __init__(self, group: Group, weights: dict[str, Tensor], needs: Needs, routed: bool) -> None:
        first = next(iter(weights.values()))
        N, K = first.shape
        self.group, self.weights, self.split = group, weights, needs.split
        if needs.split is not None and needs.correction:
            self.weights = {name: needs.split.arrange_weight(weight) for name, weight in weights.items()}
        self.root = 1.0 if routed else needs.sink_weight**0.5
        self.gram = Gram(K, first.device)
        self.dead = torch.ones(K, dtype=torch.bool, device=first.device)
        # A writer's correction is summed in output space [N, K]; shared inputs sum (y - x)^T x [K, K] once for all.
        self.cross = torch.zeros(N if group.writes else K, K, device=first.device) if needs.correction else None

    def add(self, shape: torch.Size, x: Tensor, y: Tensor | None, drift: Tensor | None) -> None:
        """x, y: the group's input in both streams, made from hidden states of `shape` [B, L, D]; drift [B, L, D]:
        reference minus quantized residual stream there."""
        L, K = shape[1], x.shape[-1]
        x = x.reshape(-1, K)
        if self.split is None:
            x = x.float()
        else:
            self.dead &= (x == 0).all(0)
            x = self.split.seen(x)
        scaled = _scale_first(x, L, self.root)
        self.gram.add(scaled)
        if self.cross is None or y is None:
            return
        y = y.reshape(-1, K).float() if self.split is None else self.split.arrange(y.reshape(-1, K))
        d = y - x
        if self.group.writes:
            weight = self.weights[self.group.names[0]]
            d = d @ weight.float().T
            if drift is not None:
                d += drift.reshape(-1, d.shape[-1])
        self.cross.addmm_(_scale_first(d, L, self.root).T, scaled)

    def finish(self, block_name: str) -> Statistics:
        """The means; NumericsError naming the linears if activations held NaN or Inf."""
        H = self.gram.mean()
        names = ", ".join(f"{block_name}.{name}" for name in self.group.names)
        if not bool(torch.isfinite(H.sum())):
            raise NumericsError(
                f"activations entering {names} hold NaN or Inf (or overflow float32 when squared); "
                "the source model itself produces them on this text: try dtype float32 or other calibration text"
            )
        dead = None if self.split is None else self.split.arrange_mask(self.dead)
        stats = Statistics(H, self.gram.tokens, split=self.split, dead=dead)
        if self.cross is not None:
            mean = self.cross / max(1, self.gram.tokens)
            for name, weight in self.weights.items():
                stats.corrections[name] = mean if self.group.writes else weight.float() @ mean
        return stats


def _scale_first(x: Tensor, L: int, factor: float) -> Tensor:
    """Rows x [B * L, K] with every L-th row, a sequence's first token, multiplied by factor."""
    if factor == 1.0:
        return x
    x = x.clone()
    x[::L] *= factor
    return x


class _Pair:
    """The quantized and the reference forward of one micro-batch, kept at the same stop."""

    def __init__(self, block: nn.Module, reference: nn.Module | None, i: int, run: _Run) -> None:
        h = run.streams.quantized[i]
        self.shape = h.shape
        self.quantized = Forward(block, h, run.calls[i], run.leaders, run.writers if reference is not None else ())
        self.reference: Forward | None = None
        self.drift: Tensor | None = None
        if reference is not None and run.streams.reference is not None:
            r = run.streams.reference[i]
            self.reference = Forward(reference, r, run.calls[i], run.leaders, run.writers)
            self.drift = r.float() - h.float()

    def advance(self, expected: str | None) -> tuple[Stop | None, Stop | None]:
        stop = self.quantized.advance()
        other = self.reference.advance() if self.reference is not None else None
        for got in (stop, other) if self.reference is not None else (stop,):
            name = got.name if got is not None else None
            if name != expected:
                raise StructureError(
                    f"the block called {name or 'nothing more'} where {expected or 'its end'} was expected; "
                    "blocks whose order of calls depends on the data cannot be calibrated"
                )
        if self.reference is not None and self.drift is not None:
            for name in list(self.quantized.outputs):
                ours, theirs = self.quantized.outputs.pop(name), self.reference.outputs.pop(name)
                self.drift += (theirs.float() - ours.float()).reshape(self.drift.shape)
        return stop, other

    def close(self) -> None:
        self.quantized.close()
        if self.reference is not None:
            self.reference.close()


@dataclass(frozen=True)
class _Run:
    streams: Streams
    calls: Sequence[Call]
    leaders: tuple[str, ...]
    writers: tuple[str, ...]


@torch.no_grad()
def run_block(
    block_name: str,
    block: nn.Module,
    reference: nn.Module | None,
    streams: Streams,
    calls: Sequence[Call],
    groups: Sequence[Group],
    needs: Callable[[Group], Needs],
    solve: Callable[[Group, Statistics], None],
    *,
    one_pass: bool,
    true_sequential: bool = True,
    routed: Collection[str] = (),
    writers: Collection[str] | None = None,
) -> None:
    """Take `streams` through one block (in place: the lists then hold the block's outputs).

    calls: one per micro-batch. groups: in call order, as `trace` gives them. solve replaces the weights of a group's
    linears in `block`. true_sequential False: all groups are gathered before any is solved. routed: linears that see
    a subset of the tokens, which the two streams may choose differently, so that no correction can be formed.
    writers: every linear that writes to the residual stream, those solved elsewhere included (None: the writers among
    groups).
    """
    if writers is None:
        writers = [g.names[0] for g in groups if g.writes]
    run = _Run(streams, calls, tuple(g.names[0] for g in groups), tuple(writers))
    originals = reference if reference is not None else block
    indices = range(len(streams.quantized))

    def gathering(group: Group) -> _Gathering:
        asked = needs(group)
        apart = group.names[0] in routed
        possible = asked.correction and reference is not None and not apart
        weights = {name: originals.get_submodule(name).weight.detach() for name in group.names}
        return _Gathering(group, weights, replace(asked, correction=possible), apart)

    def gather(into: _Gathering, pair: _Pair, stops: tuple[Stop | None, Stop | None]) -> None:
        stop, other = stops
        assert stop is not None
        into.add(pair.shape, stop.x, None if other is None else other.x, pair.drift)

    def start(i: int) -> _Pair:
        return _Pair(block, reference, i, run)

    def waiting() -> None:
        """One forward a micro-batch; all of them wait while a group is solved, and go on with its new weights."""
        pairs = [start(i) for i in indices]
        try:
            for group in groups:
                sums = gathering(group)
                for pair in pairs:
                    gather(sums, pair, pair.advance(group.names[0]))
                solve(group, sums.finish(block_name))
            for i in indices:
                _finish(pairs[i], streams, i)
        finally:
            for pair in pairs:
                pair.close()

    def restarting() -> None:
        """The same with a fresh forward for every group."""
        for position, group in enumerate(groups):
            sums = gathering(group)
            for i in indices:
                pair = start(i)
                for earlier in groups[:position]:
                    pair.advance(earlier.names[0])
                gather(sums, pair, pair.advance(group.names[0]))
                pair.close()
            solve(group, sums.finish(block_name))
        finishing()

    def at_once() -> None:
        """Not sequential: every group is gathered in one forward of the block as it is, then all are solved."""
        every = [gathering(group) for group in groups]
        for i in indices:
            pair = start(i)
            for group, sums in zip(groups, every, strict=True):
                gather(sums, pair, pair.advance(group.names[0]))
            pair.close()
        for group, sums in zip(groups, every, strict=True):
            solve(group, sums.finish(block_name))
        finishing()

    def finishing() -> None:
        for i in indices:
            pair = start(i)
            for group in groups:
                pair.advance(group.names[0])
            _finish(pair, streams, i)

    both = [block] if reference is None else [block, reference]
    names = [name for name in {*run.leaders, *run.writers}]
    with stopping(both[0], names), stopping(both[-1], names if len(both) > 1 else []):
        if not true_sequential:
            at_once()
        elif one_pass:
            waiting()
        else:
            restarting()


def _finish(pair: _Pair, streams: Streams, i: int) -> None:
    pair.advance(None)
    assert pair.quantized.output is not None
    streams.quantized[i] = pair.quantized.output
    if pair.reference is not None and streams.reference is not None:
        assert pair.reference.output is not None
        streams.reference[i] = pair.reference.output


def waiting_bytes(groups: Sequence[Group], routed: Collection[str], tokens: int, hidden: int, streams: int) -> int:
    """Bytes of one_pass at its widest stop: each stream's group input (of experts, all of them at once: none is let go
    before the last has run) and about four hidden states, fp32."""
    widest = max((g.values for g in groups), default=0.0)
    experts = sum(g.values for g in groups if g.names[0] in routed)
    return int(4 * tokens * streams * (max(widest, experts) + 4 * hidden))
