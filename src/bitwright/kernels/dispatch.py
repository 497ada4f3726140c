"""The table of implementations, and the choice among them, made once when a weight is prepared.

The order of the table is the order of preference, from measurements (`dev/LOG.md`): the first that does not refuse is
chosen. `explain` gives every entry its reason, the chosen one and the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bitwright.errors import SchemeError
from bitwright.kernels.cpu import Int4Weight, Int8Dynamic, Int8Weight
from bitwright.kernels.cuda import GluonWeight, HopperWeight, TritonWeight
from bitwright.kernels.dequantize import DequantizedWeight, Int8Exact
from bitwright.kernels.permuted import Permuted
from bitwright.kernels.problem import GLUON, HOPPER, Implementation, PackedWeight, Problem
from bitwright.kernels.sparse_mma import SparseMma
from bitwright.kernels.split import SplitDequantized, SplitInteger, SplitVNNI
from bitwright.kernels.split_cuda import SplitMma
from bitwright.kernels.split_sparse import SparseValues, SplitSparse
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import Scheme
from bitwright.split import SplitTensor

IMPLEMENTATIONS: tuple[type[Implementation], ...] = (
    Int8Dynamic,
    SplitMma,
    Int8Exact,
    Int8Weight,
    Int4Weight,
    HopperWeight,
    GluonWeight,
    TritonWeight,
    DequantizedWeight,
)
# For schemes that are not plain: what QuantizedTensor cannot say is a SplitTensor.
SPLIT_IMPLEMENTATIONS: tuple[type[Implementation], ...] = (
    SparseMma,  # of few tokens it is faster for large weights only: 57344 x 8192 at one token 85 us, dense 110
    SplitSparse,
    SplitMma,
    SparseValues,
    SplitVNNI,
    SplitInteger,
    SplitDequantized,
)


@dataclass(frozen=True)
class Choice:
    """An implementation and why it was chosen (or, in `explain`, refused: usable is False)."""

    implementation: type[Implementation]
    reason: str
    usable: bool = True

    @property
    def name(self) -> str:
        """Its name in tables."""
        return self.implementation.NAME


def choose(problem: Problem) -> Choice:
    """The first implementation of the table that can run the problem; SchemeError if none can."""
    for candidate in explain(problem):
        if candidate.usable:
            return candidate
    raise SchemeError(f"nothing here runs {problem.scheme} with {problem.dtype} activations on {problem.device}")


def _in_order(problem: Problem) -> tuple[type[Implementation], ...]:
    """The table for the problem, the preferred first."""
    if problem.scheme.plain:
        return IMPLEMENTATIONS
    if problem.scheme.weight.bits == 4 and {HOPPER, GLUON} <= problem.features:
        # Without NVRTC: the dense Hopper kernel multiplies the zeros of 2:4 as fast as cuSPARSELt skips them, and reads
        # 4 bits a weight, not 5.
        first = (SparseMma, SplitMma)
        return *first, *(i for i in SPLIT_IMPLEMENTATIONS if i not in first)
    return SPLIT_IMPLEMENTATIONS


def explain(problem: Problem) -> list[Choice]:
    """Every implementation in order of preference, with what it would do or why it refuses."""
    result = []
    for implementation in _in_order(problem):
        refusal = implementation.refuse(problem)
        reason = implementation.describe(problem) if refusal is None else refusal
        result.append(Choice(implementation, reason, refusal is None))
    return result


def prepare(
    qt: QuantizedTensor | SplitTensor,
    scheme: Scheme,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    features: frozenset[str] | None = None,
) -> tuple[PackedWeight, Choice]:
    """Pack `qt` for activations of `dtype` on `device` with the implementation that suits best.

    features: of the machine; None = this one's. A weight with an `order` is packed as it is stored, behind one
    permutation of the activations, whatever the implementation. Raises SchemeError if `qt` is not on the scheme's grid
    or not of the kind that the scheme needs, BitwrightError if there is no such device.
    """
    if isinstance(qt, SplitTensor) == scheme.plain:
        needed = QuantizedTensor if scheme.plain else SplitTensor
        raise SchemeError(f"a weight at {scheme} is a {needed.__name__}, not a {type(qt).__name__} at {qt.scheme}")
    if isinstance(qt, SplitTensor):
        if qt.scheme != scheme:
            raise SchemeError(f"the weight is quantized at {qt.scheme}, the scheme says {scheme}")
        choice = choose(problem := Problem.of(qt, scheme, dtype, device, features))
        return choice.implementation.prepare(qt.to(device), problem), choice
    if qt.scheme != scheme.weight:
        raise SchemeError(f"the weight is quantized at {qt.scheme}, the scheme says {scheme}")
    choice = choose(problem := Problem.of(qt, scheme, dtype, device, features))
    zero_point = None if qt.zero_point is None else qt.zero_point.to(device)
    moved = QuantizedTensor(qt.codes.to(device), qt.scale.to(device), zero_point, qt.scheme)
    packed = choice.implementation.prepare(moved, problem)
    if qt.order is None:
        return packed, choice
    reordered = replace(choice, reason=f"{choice.reason}; activations are put into the order of its columns first")
    return Permuted(packed, qt.order.to(device)), reordered
