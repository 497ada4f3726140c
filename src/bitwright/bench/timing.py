"""How long a kernel takes, measured so that two of them can be compared.

Three things falsify short timings on a GPU, and each is dealt with here:

* *Launch overhead.* Calls are recorded once in a CUDA graph and replayed, so that Python is out of the way; rounds are
  queued without waiting in between, so the GPU never idles between an event and the work it marks.
* *The cache.* A weight that was just read comes from L2 (50 MB on an H100) the second time, and a linear of a model
  never finds it there. So a variant is a list of calls over different copies, together at least `ROTATED_BYTES`.
* *Drift.* Clocks fall as a chip warms up. Variants take turns, one round each, and what is reported is the median over
  rounds with its quartiles.

On a CPU the same interface times plain loops by the wall clock.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

ROTATED_BYTES = 250_000_000  # five times the largest L2 in use
REPEATS = 20
_CALLS = 12  # of a round at least: the start of a graph takes some microseconds, as do the events around it
_ROUND_FLOPS = 1e12  # beyond which a round is long enough beside these

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Of one call: the median in seconds, its quartiles over `rounds` rounds of `calls` calls."""

    seconds: float
    low: float
    high: float
    rounds: int
    calls: int


@dataclass(frozen=True)
class Round:
    """Calls made ready to be run one after the other by `run`; kept, because a graph holds only their addresses.

    outputs: what the first and the last call gave when they were run last.
    """

    run: Call
    calls: tuple[Call, ...]
    device: torch.device
    outputs: list[object]


@dataclass(frozen=True)
class Ceilings:
    """What the machine itself reaches: bytes per second of a copy (read and write both counted) and of a sum that only
    reads, and operations per second (two per multiply-add) of a large matrix product in `dtype`.

    Reading alone may be faster than copying, and a linear of few tokens does hardly anything else. Both are plain
    kernels of torch, so a very good kernel can come out a little above what they reach.
    """

    copy_bytes_per_second: float
    read_bytes_per_second: float
    flops_per_second: float
    dtype: torch.dtype

    @property
    def bytes_per_second(self) -> float:
        """The bandwidth: the larger of the two."""
        return max(self.copy_bytes_per_second, self.read_bytes_per_second)

    def floor(self, bytes_moved: float, flops: float) -> float:
        """Seconds at these rates: the longer of moving the bytes and doing the operations."""
        return max(bytes_moved / self.bytes_per_second, flops / self.flops_per_second)


def copies(bytes_per_call: float, rotated: int = ROTATED_BYTES) -> int:
    """Copies of what a call reads that together hold `rotated` bytes."""
    return max(1, math.ceil(rotated / bytes_per_call))


def enough(calls: Sequence[Call], flops: float, device: torch.device) -> list[Call]:
    """`calls` of `flops` operations each, on a GPU over and over until a round of them is long beside its start."""
    if device.type != "cuda":
        return list(calls)
    most = max(1, int(_ROUND_FLOPS / (flops * len(calls))))
    return list(calls) * min(-(-_CALLS // len(calls)), most)


def ready(calls: Sequence[Call], device: torch.device | str) -> Round:
    """A round of `calls`, each made once already (compilation, workspaces) and, on a GPU, captured in a graph.

    Whatever a call raises, in eager mode or while it is captured, goes on to the caller.
    """
    device = torch.device(device)
    kept = tuple(calls)
    outputs: list[object] = []

    def loop() -> None:
        for i, call in enumerate(kept):
            y = call()
            if i == 0:
                outputs[:] = [y, y]
            outputs[1] = y

    if device.type != "cuda":
        loop()
        return Round(loop, kept, device, outputs)
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):  # some libraries choose an algorithm at the first call and allocate at the second
            for call in kept:
                call()
    torch.cuda.synchronize(device)
    capture(loop, graph, stream)
    torch.cuda.synchronize(device)
    return Round(graph.replay, kept, device, outputs)


def capture(call: Call, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
    """Capture `call` in `graph` on `stream`; if that fails, torch is left as it was before.

    After a failure torch would go on with `stream` as the current one and with a random generator that still records; a
    capture that succeeds ends the latter.
    """
    with torch.cuda.device(stream.device):
        before = torch.cuda.current_stream()
        spare = torch.zeros(1, device=stream.device)
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph, stream=stream):
                call()
        except BaseException:
            torch.cuda.set_stream(before)
            with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
                spare.add_(1)
            torch.cuda.set_stream(before)
            raise


def interleaved(
    variants: Mapping[str, Sequence[Call] | Round], repeats: int = REPEATS, device: torch.device | str = "cuda"
) -> dict[str, Timing]:
    """Seconds of one call of every variant, the variants taking turns, `repeats` rounds each.

    A variant is a list of calls over different copies (see the module), or what `ready` made of one. device: of
    variants given as lists.
    """
    rounds = {name: v if isinstance(v, Round) else ready(v, device) for name, v in variants.items()}
    if not rounds:
        return {}
    kinds = {r.device for r in rounds.values()}
    assert len(kinds) == 1, f"variants on several devices: {kinds}"
    where = kinds.pop()
    spent = _gpu_rounds(rounds, repeats) if where.type == "cuda" else _cpu_rounds(rounds, repeats)
    return {name: _timing(seconds, len(rounds[name].calls)) for name, seconds in spent.items()}


def measure_ceilings(device: torch.device | str, dtype: torch.dtype, repeats: int = 10) -> Ceilings:
    """Bandwidths and matrix rate of this machine, measured now: what shares of the roofline are shares of."""
    device = torch.device(device)
    large = device.type == "cuda"
    count, n = (1 << 29, 8192) if large else (1 << 24, 384)
    source = torch.randint(256, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    numbers = torch.randn(count // 2, device=device)  # twice the bytes of `source`
    calls: dict[str, Sequence[Call]] = {
        "copy": [lambda: target.copy_(source)],
        "read": [lambda: numbers.sum()],
        "gemm": [lambda: torch.mm(a, b)],
    }
    timed = interleaved(calls, repeats, device)
    return Ceilings(
        2 * count / timed["copy"].seconds,
        numbers.nbytes / timed["read"].seconds,
        2 * n**3 / timed["gemm"].seconds,
        dtype,
    )


def _gpu_rounds(rounds: Mapping[str, Round], repeats: int) -> dict[str, list[float]]:
    device = next(iter(rounds.values())).device
    with torch.cuda.device(device):
        marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in rounds}
        for r in rounds.values():  # untimed: fills the queue and wakes the clocks
            r.run()
        names = list(rounds)
        for i in range(repeats):
            # Nobody always comes after the one that heats most.
            for name in names[i % len(names) :] + names[: i % len(names)]:
                before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                before.record()
                rounds[name].run()
                after.record()
                marks[name].append((before, after))
        torch.cuda.synchronize(device)
        return {name: [a.elapsed_time(b) / 1e3 for a, b in pairs] for name, pairs in marks.items()}


def _cpu_rounds(rounds: Mapping[str, Round], repeats: int) -> dict[str, list[float]]:
    spent: dict[str, list[float]] = {name: [] for name in rounds}
    for _ in range(repeats):
        for name, r in rounds.items():
            started = time.perf_counter()
            r.run()
            spent[name].append(time.perf_counter() - started)
    return spent


def _timing(seconds: Sequence[float], calls: int) -> Timing:
    each = [s / calls for s in seconds]
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
    return Timing(middle, low, high, len(each), calls)
