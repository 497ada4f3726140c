"""One linear after another: is it right, how long does it take, what would the machine allow, what do others need.

For every shape, scheme and number of tokens, all contenders (`peers`) get the same weight and the same activations.
First each is compared with float64 on a few tokens: one that is wrong is reported as wrong and never timed. Then all of
them take turns (`timing`), and what the timed calls left behind is compared once more. A time is put beside

* the roofline: the longer of moving the bytes the scheme stores (activations once, outputs once) at the machine's own
  bandwidth, the better of a copy and a sum, and doing the operations at its own rate of 16-bit products, all measured
  in this run. Share 1 is what simple kernels reach at their best, no law of nature; a scheme that is padded in memory
  does not look better for it;
* 16-bit weights (torch.mm, cuBLAS on a GPU), and the fastest of the peers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitwright.bench import timing
from bitwright.bench.peers import PEERS, Linear, chosen, contenders, expected, random_weight
from bitwright.bench.records import ABSENT, FAILED, OK, WRONG, Record, failure, stamp
from bitwright.bench.shapes import KERNEL_SHAPES
from bitwright.bench.split import PRODUCT, QUANTIZE, SplitLinear
from bitwright.devices import choose_device
from bitwright.errors import BitwrightError
from bitwright.kernels.problem import Problem
from bitwright.scheme import Scheme

if TYPE_CHECKING:
    from rich.table import Table

Progress = Callable[[str, int, int, str], None]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CHECKED_TOKENS = 4
# An output rounded to 16 bits is off by up to 2^-9 of itself and itself up to 5 times the typical one; one that belongs
# to another row is off by about 1.
_WORST = 12


@dataclass(frozen=True)
class Options:
    """What to measure: every shape (N, K) with every scheme and number of tokens.

    rotated_bytes: of weights that the calls of a round read together; see `timing`.
    """

    shapes: tuple[tuple[int, int], ...] = KERNEL_SHAPES
    tokens: tuple[int, ...] = (1, 16, 64, 256, 2048)
    schemes: tuple[str, ...] = ("w4a16-g128",)
    dtype: str = "bfloat16"
    device: str = "auto"
    peers: tuple[str, ...] = PEERS
    repeats: int = timing.REPEATS
    rotated_bytes: int | None = None
    command: str | None = None

    def resolve(self) -> tuple[torch.device, torch.dtype, tuple[Scheme, ...]]:
        """Device, dtype and schemes, checked; BitwrightError says what is wrong before anything is measured."""
        if self.dtype not in DTYPES:
            raise BitwrightError(f"dtype {self.dtype!r} is not measured; choose one of {', '.join(DTYPES)}")
        if not self.tokens or min(self.tokens) < 1:
            raise BitwrightError(f"tokens {list(self.tokens)}: give one or more numbers from 1 up")
        if self.repeats < 1:
            raise BitwrightError(f"repeats {self.repeats}: at least one round is needed")
        return choose_device(self.device), DTYPES[self.dtype], tuple(map(Scheme.parse, self.schemes))

    def rotated(self, device: torch.device) -> int:
        """Bytes to rotate over: beyond the cache on a GPU; on a CPU one weight, whose benchmark only has to run."""
        if self.rotated_bytes is not None:
            return self.rotated_bytes
        return timing.ROTATED_BYTES if device.type == "cuda" else 1


def run(options: Options, progress: Progress | None = None) -> list[Record]:
    """All records of `measure`."""
    return [record for records in measure(options, progress) for record in records]


def measure(options: Options, progress: Progress | None = None) -> Iterator[list[Record]]:
    """The records of one shape, scheme and number of tokens after the other, so that they can be kept as they come."""
    device, dtype, schemes = options.resolve()
    stamped = stamp(device, options.command)
    ceilings = timing.measure_ceilings(device, dtype)
    points = list(product(options.shapes, schemes))
    for done, ((N, K), scheme) in enumerate(points):
        if progress is not None:
            progress("kernels", done, len(points), f"{N}x{K} {scheme}")
        field = _Field(N, K, scheme, dtype, device, options)
        for M in options.tokens:
            yield [
                stamped | ceiling_fields(ceilings) | record for record in field.measure(M, ceilings, options.repeats)
            ]
        del field
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if progress is not None:
        progress("kernels", len(points), len(points), "")


class _Field:
    """All contenders of one shape and scheme, prepared once for every number of tokens."""

    def __init__(
        self, N: int, K: int, scheme: Scheme, dtype: torch.dtype, device: torch.device, options: Options
    ) -> None:
        self.N, self.K, self.scheme, self.dtype, self.device = N, K, scheme, dtype, device
        self.weight = random_weight(N, K, scheme, dtype, device)
        self.contenders = contenders(self.weight, scheme, dtype, device, options.peers)
        self.linears: dict[str, list[Linear]] = {}
        self.reasons: dict[str, tuple[str, str]] = {c.name: (ABSENT, c.absent) for c in self.contenders if c.absent}
        rotated = options.rotated(device)
        for c in self.contenders:
            if c.name in self.reasons:
                continue
            try:
                count = timing.copies(c.bytes_per_call(N, K, scheme, dtype), rotated)
                self.linears[c.name] = c.copies(self.weight, count)
            except Exception as e:
                # Code of others may raise anything; it is a row with the reason, and the rest goes on.
                self.reasons[c.name] = (FAILED, failure(e))

    def measure(self, M: int, ceilings: timing.Ceilings, repeats: int) -> list[Record]:
        """One record per contender."""
        generator = torch.Generator(self.device).manual_seed(M)
        x = torch.randn(M, self.K, device=self.device, generator=generator).to(self.dtype)
        reasons = dict(self.reasons)
        reasons |= {
            c.name: (ABSENT, f"left out above {c.max_tokens} tokens")
            for c in self.contenders
            if c.name not in reasons and c.max_tokens is not None and c.max_tokens < M
        }
        running = [c for c in self.contenders if c.name not in reasons]
        rows = torch.linspace(0, M - 1, min(M, CHECKED_TOKENS), device=self.device).round().long()
        reference = expected(x[rows], self.weight, self.scheme)
        rounds: dict[str, timing.Round] = {}
        errors: dict[str, float] = {}
        for c in running:
            linears = self.linears[c.name]
            try:
                errors[c.name], worst = compare(linears[0](x)[rows], reference)
                if not acceptable(errors[c.name], worst, c.limit):
                    reasons[c.name] = (WRONG, off(errors[c.name], worst))
                    continue
                rounds[c.name] = self._ready([_call(linear, x) for linear in linears], M)
                rounds |= self._parts(c.name, x)
            except Exception as e:
                reasons[c.name] = (FAILED, failure(e))
        timings = timing.interleaved(rounds, repeats)
        for c in running:
            if c.name in timings:
                reason = timed_wrong(rounds[c.name], rows, reference, c.limit)
                if reason is not None:
                    reasons[c.name] = (WRONG, reason)
                    del timings[c.name]
                    timings = {name: t for name, t in timings.items() if not _is_part(name, c.name)}
        return self._records(M, timings, errors, reasons, ceilings)

    def _parts(self, name: str, x: Tensor) -> dict[str, timing.Round]:
        """Rounds of the parts of a contender's work by (its name, theirs), where it has such."""
        linears = [linear.parts(x) for linear in self.linears[name] if isinstance(linear, SplitLinear)]
        names = linears[0] if linears else ()
        return {_part(name, part): self._ready([calls[part] for calls in linears], x.shape[0]) for part in names}

    def _ready(self, calls: list[timing.Call], M: int) -> timing.Round:
        return timing.ready(timing.enough(calls, 2 * M * self.N * self.K, self.device), self.device)

    def _records(
        self,
        M: int,
        timings: Mapping[str, timing.Timing],
        errors: Mapping[str, float],
        reasons: Mapping[str, tuple[str, str]],
        ceilings: timing.Ceilings,
    ) -> list[Record]:
        N, K = self.N, self.K
        taken = chosen(Problem.of(self.weight, self.scheme, self.dtype, self.device), M)
        dense, best = rivals({c.name: c.kind for c in self.contenders}, timings)
        records = []
        for c in self.contenders:
            record: Record = {
                "benchmark": "kernels",
                "N": N,
                "K": K,
                "tokens": M,
                "scheme": str(self.scheme),
                "dtype": str(self.dtype).removeprefix("torch."),
                "name": c.name,
                "kind": c.kind,
                "chosen": c.name == taken,
                "note": c.note,
                "status": OK,
                "reason": None,
                "relative_error": errors.get(c.name),
            }
            if c.name in timings:
                moved = c.bytes_per_call(N, K, self.scheme, self.dtype) + M * (N + K) * self.dtype.itemsize
                record |= figures(timings[c.name], moved, 2 * M * N * K, ceilings)
                record |= speedups(timings[c.name], c.kind, dense, best)
            else:
                record["status"], record["reason"] = reasons[c.name]
            records.append(record)
            own = {name: t for name, t in timings.items() if _is_part(name, c.name)}
            records += [
                record | self._part_fields(name, t, M, record["bytes"], dense, ceilings) for name, t in own.items()
            ]
        return records

    def _part_fields(
        self, name: str, t: timing.Timing, M: int, moved: float, dense: timing.Timing | None, ceilings: timing.Ceilings
    ) -> Record:
        """What the record of a part has beside that of the whole, which moves `moved` bytes."""
        K, flops = self.K, 2 * M * self.N * self.K
        if name.endswith(_part("", QUANTIZE)):
            moved, flops = M * K * (self.dtype.itemsize + 1), 0
        elif name.endswith(_part("", PRODUCT)) and self.scheme.outliers is not None:
            flops -= 2 * M * self.N * self.scheme.outliers.columns(K)
        shown = {"name": name, "kind": "part", "chosen": False, "relative_error": None}
        return shown | figures(t, moved, flops, ceilings) | speedups(t, "part", dense, None)


def compare(y: Tensor, reference: Tensor) -> tuple[float, float]:
    """Relative Frobenius error, and the largest error of one output in units of a typical one. NaN counts as infinite:
    a NaN is right nowhere."""
    difference = y.double() - reference
    error = difference.norm() / reference.norm()
    worst = difference.abs().max() / reference.square().mean().sqrt()
    return float(error.nan_to_num(nan=torch.inf)), float(worst.nan_to_num(nan=torch.inf))


def acceptable(error: float, worst: float, limit: float) -> bool:
    """Whether what `compare` found is rounding, given the limit of the relative error."""
    return error <= limit and worst <= _WORST * limit


def off(error: float, worst: float) -> str:
    """What `compare` found, in words."""
    return f"relative error {error:.2g}, worst output off by {worst:.2g}"


def timed_wrong(made: timing.Round, rows: Tensor, reference: Tensor, limit: float) -> str | None:
    """Why a round that was timed is wrong after all: `rows` of what its first and last call gave; None if they are
    right."""
    for which, y in zip(("first", "last"), made.outputs, strict=True):
        assert isinstance(y, Tensor)
        error, worst = compare(y[rows], reference)
        if not acceptable(error, worst, limit):
            return f"{which} of the timed calls: {off(error, worst)}"
    return None


def ceiling_fields(ceilings: timing.Ceilings) -> Record:
    """The machine's own rates as they stand in a record."""
    return {
        "ceiling_bytes_per_second": ceilings.bytes_per_second,
        "copy_bytes_per_second": ceilings.copy_bytes_per_second,
        "read_bytes_per_second": ceilings.read_bytes_per_second,
        "ceiling_flops_per_second": ceilings.flops_per_second,
    }


def figures(t: timing.Timing, bytes_moved: float, flops: float, ceilings: timing.Ceilings) -> Record:
    """Seconds and rates of one timing, and its share of the roofline."""
    return {
        "seconds": t.seconds,
        "seconds_low": t.low,
        "seconds_high": t.high,
        "rounds": t.rounds,
        "calls": t.calls,
        "bytes": bytes_moved,
        "bytes_per_second": bytes_moved / t.seconds,
        "flops_per_second": flops / t.seconds,
        "roofline_share": ceilings.floor(bytes_moved, flops) / t.seconds,
    }


def rivals(
    kinds: Mapping[str, str], timings: Mapping[str, timing.Timing]
) -> tuple[timing.Timing | None, tuple[str, timing.Timing] | None]:
    """The baseline in 16 bits, and the fastest peer with its name, of those that were timed."""
    dense = next((t for name, t in timings.items() if kinds.get(name) == "dense"), None)
    peers = [(name, t) for name, t in timings.items() if kinds.get(name) == "peer"]
    return dense, min(peers, key=lambda pair: pair[1].seconds, default=None)


def speedups(
    t: timing.Timing, kind: str, dense: timing.Timing | None, best: tuple[str, timing.Timing] | None
) -> Record:
    """How many times faster than the baseline, and, of ours, than the best peer."""
    against_peer = best is not None and kind == "ours"
    return {
        "speedup_over_dense": None if dense is None else dense.seconds / t.seconds,
        "best_peer": best[0] if best is not None and against_peer else None,
        "speedup_over_best_peer": best[1].seconds / t.seconds if best is not None and against_peer else None,
    }


def _part(name: str, part: str) -> str:
    return f"{name}: {part}"


def _is_part(name: str, whole: str) -> bool:
    return name.startswith(_part(whole, ""))


def _call(linear: Linear, x: Tensor) -> timing.Call:
    return lambda: linear(x)


def table(records: Sequence[Mapping[str, Any]]) -> Table:
    """The records for people: a row for all that was measured or should have been; who is absent stands below."""
    from rich import box
    from rich.table import Table

    absent = dict.fromkeys(f"{r['name']} ({r['reason']})" for r in records if r["status"] == ABSENT)
    caption = "* what would be chosen" + (f"; not there: {', '.join(absent)}" if absent else "")
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")
    for title in ("N x K", "scheme", "M", ""):
        shown.add_column(title)
    for title in ("µs", "±", "TB/s", "TFLOP/s", "of roofline", "x 16-bit", "x best peer", "error"):
        shown.add_column(title, justify="right")
    shown.add_column("")
    before: tuple[Any, ...] | None = None
    for r in records:
        if r["status"] == ABSENT:
            continue
        point = (r["N"], r["K"], r["scheme"], r["tokens"])
        experts = f", top {r['top_k']} of {r['experts']}" if r.get("experts") else ""
        head = (f"{r['N']}x{r['K']}{experts}", r["scheme"], str(r["tokens"])) if point != before else ("", "", "")
        if before is not None and point != before:
            shown.add_section()
        before = point
        name = f"{r['name']} *" if r.get("chosen") else r["name"]
        shown.add_row(*head, name, *_cells(r), "" if r["status"] == OK else f"{r['status']}: {r['reason']}")
    return shown


def _cells(r: Mapping[str, Any]) -> list[str]:
    def form(value: float | None, spec: str, factor: float = 1.0) -> str:
        return "" if value is None else format(value * factor, spec)

    spread = None if r.get("seconds") is None else (r["seconds_high"] - r["seconds_low"]) / 2
    return [
        form(r.get("seconds"), ".1f", 1e6),
        form(spread, ".1f", 1e6),
        form(r.get("bytes_per_second"), ".3g", 1e-12),
        form(r.get("flops_per_second"), ".3g", 1e-12),
        form(r.get("roofline_share"), ".0%"),
        form(r.get("speedup_over_dense"), ".2f"),
        form(r.get("speedup_over_best_peer"), ".2f"),
        form(r.get("relative_error"), ".1e"),
    ]
