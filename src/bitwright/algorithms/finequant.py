"""FineQuant: data-free weight-only quantization whose granularity follows each matrix (after arXiv 2308.09723).

The paper's threshold rule is not public; both rules here are ours.

* `ladder`: walk from one scale per row to finer groups while the gain is worth the scale bits. A coarse grid is spoilt
  by a few large weights that stretch it; R(g), the mean over groups of max|w| relative to the row's max|w|, says by how
  much groups of g relieve that. From g go to the next finer g' while
  log2(R(g) / R(g')) > alpha * (16/g' - 16/g), with 16-bit scales. Every step pays for itself in bits of resolution.
* `allocate`: choose (bits, group size) of every matrix at once so that the summed relative error ||W - Q||^2 / ||W||^2,
  weighted by the number of weights, is least under a budget of average stored bits. (Letting every matrix count alike
  moves bits from the large MLP matrices to the small attention ones, and measured worse.) A knapsack, then the best
  single steps into what the budget leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from math import ceil, inf, log2
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import SchemeError
from bitwright.numerics import choose_grid, encode, grouped, quantized
from bitwright.scheme import WeightScheme

LADDER = (512, 256, 192, 128, 96, 64, 48, 32)
_SCALE_BITS = 16
# Divisions of the budget: with many per matrix, what rounding up to them wastes is small.
_CELLS, _CELLS_PER_UNIT, _MAX_CELLS = 4096, 64, 32768
# Rows whose error stands for the whole matrix; errors of rows of one matrix differ little.
_SAMPLED_ROWS = 32


@dataclass(frozen=True)
class FineQuantOptions:
    """alpha: what a scale bit per weight must earn in bits of range (ladder). budget: average stored bits per weight
    over all matrices of the rule (None: use the ladder). bits: widths the budget may choose from. groups: group sizes
    considered besides the whole row. ragged: also those that do not divide K (native format only). zero_points: the
    budget may also give a matrix asymmetric grids, whose zero points are counted."""

    alpha: float = 1.0
    budget: float | None = None
    bits: tuple[int, ...] = (4, 8)
    groups: tuple[int, ...] = field(default=LADDER)
    ragged: bool = False
    zero_points: bool = False

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> FineQuantOptions:
        """Options by name; an unknown one is a SchemeError that lists the known ones."""
        known = {f.name for f in fields(cls)}
        for name in options:
            if name not in known:
                raise SchemeError(f"unknown finequant option {name!r}; known: {', '.join(sorted(known))}")
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        return cls(**plain)


def group_sizes(K: int, options: FineQuantOptions) -> list[int | None]:
    """Group sizes to consider for width K, coarsest first; None is the whole row."""
    fitting = [g for g in options.groups if g < K and (options.ragged or K % g == 0)]
    return [None, *sorted(set(fitting), reverse=True)]


def range_ratio(W: Tensor, group_size: int | None) -> float:
    """R(g): mean over rows and groups of the group's max|w| relative to its row's max|w|; W [N, K]."""
    tops = grouped(W.float().abs(), group_size).amax(-1)  # [N, G]
    row = tops.amax(1, keepdim=True)
    return float(torch.where(row > 0, tops / row.clamp_min(1e-30), torch.ones_like(tops)).mean())


def common_group_sizes(matrices: Sequence[Tensor], options: FineQuantOptions) -> list[int | None]:
    """`group_sizes` that every width among matrices [N, K] allows."""
    each = [group_sizes(K, options) for K in dict.fromkeys(W.shape[1] for W in matrices)]
    return [g for g in each[0] if all(g in other for other in each[1:])]


def ladder(matrices: Sequence[Tensor], options: FineQuantOptions) -> int | None:
    """Group size for matrices [N, K] that must share it (one matrix, fused ones, or one expert stack)."""
    total = sum(W.shape[0] for W in matrices)
    width = sum(W.numel() for W in matrices) / total  # of a row, on average: what one scale per row is spread over

    def ratio(g: int | None) -> float:
        return sum(range_ratio(W, g) * W.shape[0] for W in matrices) / total

    steps = common_group_sizes(matrices, options)
    chosen, here = steps[0], ratio(steps[0])
    for g in steps[1:]:
        assert g is not None
        there = ratio(g)
        cost = _SCALE_BITS / g - _SCALE_BITS / (chosen or width)
        if log2(max(here, 1e-30) / max(there, 1e-30)) <= options.alpha * cost:
            break
        chosen, here = g, there
    return chosen


@dataclass(frozen=True)
class Choice:
    """One way to store one unit: its scheme, bits stored in all, and relative error times weights."""

    scheme: WeightScheme
    bits: float
    error: float


def choices(matrices: Sequence[Tensor], symmetric: bool, options: FineQuantOptions) -> list[Choice]:
    """Every (bits, group size) for matrices that must share a scheme, with the error of an MSE-searched grid measured
    on evenly spaced rows."""
    found = []
    samples = [W[:: max(1, W.shape[0] // _SAMPLED_ROWS)].float() for W in matrices]
    kinds = (True, False) if options.zero_points else (symmetric,)
    for bits, kind in product(options.bits, kinds):
        for g in common_group_sizes(matrices, options):
            scheme = WeightScheme(bits, g, kind)
            error = 0.0
            for full, W in zip(matrices, samples, strict=True):
                grid = choose_grid(W, scheme)
                Q = quantized(encode(W, grid), grid, torch.bfloat16).dequantize()
                error += full.numel() * float((Q - W).square().sum() / W.square().sum().clamp_min(1e-30))
            stored = sum(scheme.bits_per_weight(W.shape[1]) * W.numel() for W in matrices)
            found.append(Choice(scheme, stored, error))
    return found


def allocate(units: Mapping[str, Sequence[Choice]], budget_bits: float) -> dict[str, Choice]:
    """One choice per unit with least summed error and at most `budget_bits` stored bits in all.

    SchemeError if even the cheapest choices need more.
    """
    cheapest = {name: min(options, key=lambda c: (c.bits, c.error)) for name, options in units.items()}
    least = sum(c.bits for c in cheapest.values())
    if least > budget_bits:
        raise SchemeError(
            f"a budget of {budget_bits:.0f} bits cannot be met: the cheapest choices need {least:.0f}; "
            "raise the budget, or allow fewer bits or coarser groups"
        )

    chosen = _knapsack(units, cheapest, budget_bits - least)
    room = budget_bits - sum(c.bits for c in chosen.values())
    while True:
        best_gain, best = 0.0, None
        for name, options in units.items():
            now = chosen[name]
            for c in options:
                extra = c.bits - now.bits
                gain = (now.error - c.error) / extra if extra > 0 else (inf if c.error < now.error else 0.0)
                if extra <= room and gain > best_gain:
                    best_gain, best = gain, (name, c)
        if best is None:
            return chosen
        room -= best[1].bits - chosen[best[0]].bits
        chosen[best[0]] = best[1]


def _knapsack(units: Mapping[str, Sequence[Choice]], cheapest: Mapping[str, Choice], room: float) -> dict[str, Choice]:
    """Least summed error with at most `room` bits beyond the cheapest choices, each extra rounded up to whole cells."""
    cells = min(_MAX_CELLS, _CELLS + _CELLS_PER_UNIT * len(units))
    errors = torch.zeros(cells + 1, dtype=torch.float64)  # least error so far with at most i cells spent
    tables: list[tuple[str, list[tuple[int, Choice]], Tensor]] = []
    for name, options in units.items():
        extra = [(c.bits - cheapest[name].bits, c) for c in sorted(options, key=lambda c: (c.bits, c.error))]
        steps = [(ceil(e / room * cells) if e > 0 else 0, c) for e, c in extra if e <= room]
        total = torch.full_like(errors, inf)
        pick = torch.zeros(cells + 1, dtype=torch.int16)
        for index, (n, c) in enumerate(steps):
            candidate = errors[: cells + 1 - n] + c.error
            better = candidate < total[n:]
            total[n:][better] = candidate[better]
            pick[n:][better] = index
        errors = total
        tables.append((name, steps, pick))
    chosen: dict[str, Choice] = {}
    left = cells
    for name, steps, pick in reversed(tables):
        n, chosen[name] = steps[int(pick[left])]
        left -= n
    return {name: chosen[name] for name in units}
