"""What a quantized linear looks like, as frozen values: `Scheme.parse("w4a16-g128")` and back with `str`.

A scheme says how numbers are stored, never how they were found: the algorithm (rtn, gptq, finequant) stands beside
it in a recipe.

Grammar: ``w<bits>a<bits>[-g<group_size>][-asym]``

====================  =========================================================================
``w4a16-g128``        4-bit weights, one scale per 128 inputs, 16-bit activations
``w4a16-g64-asym``    the same with a zero point per group
``w3a16``             3-bit weights, one scale per output row
``w8a8``              8-bit weights per row, activations quantized per token to int8 at run time
====================  =========================================================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bitwright.errors import SchemeError

WEIGHT_BITS = (2, 3, 4, 8)
ACTIVATION_BITS = (8, 16)
MIN_GROUP_SIZE = 8

_PATTERN = re.compile(r"w(?P<w>\d+)a(?P<a>\d+)(?:-g(?P<g>\d+))?(?P<asym>-asym)?")
_HELP = "expected w<bits>a<bits>[-g<group_size>][-asym], for example w4a16-g128, w3a16-g64-asym or w8a8"


@dataclass(frozen=True)
class WeightScheme:
    """Integer grid of a weight [N, K]: w = (q - zero_point) * scale.

    bits: 2, 3, 4 or 8. group_size: inputs per scale, None = the whole row. symmetric: zero_point is 0 and not stored.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in WEIGHT_BITS:
            raise SchemeError(f"weight bits {self.bits} are not supported; choose one of {WEIGHT_BITS}")
        if self.group_size is not None and self.group_size < MIN_GROUP_SIZE:
            raise SchemeError(
                f"group size {self.group_size} is below {MIN_GROUP_SIZE}: 16-bit scales would outweigh the codes; "
                "use a larger group"
            )

    @property
    def qmin(self) -> int:
        """Smallest signed code, -2^(bits-1)."""
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest signed code, 2^(bits-1) - 1."""
        return (1 << (self.bits - 1)) - 1

    def num_groups(self, K: int) -> int:
        """Scales per row of a width-K weight; the last group may be ragged."""
        return 1 if self.group_size is None else -(-K // self.group_size)

    def bits_per_weight(self, K: int) -> float:
        """Stored bits per weight of a width-K row: codes, 16-bit scales and zero points of `bits` bits."""
        per_group = 16 + (0 if self.symmetric else self.bits)
        return self.bits + self.num_groups(K) * per_group / K


@dataclass(frozen=True)
class Scheme:
    """A weight grid plus the bits of the activations it meets at run time (16 = not quantized, 8 = int8 per token)."""

    weight: WeightScheme
    activation_bits: int = 16

    def __post_init__(self) -> None:
        if self.activation_bits not in ACTIVATION_BITS:
            raise SchemeError(
                f"activation bits {self.activation_bits} are not supported; choose one of {ACTIVATION_BITS}"
            )
        w = self.weight
        if self.activation_bits == 8 and not (w.bits == 8 and w.symmetric and w.group_size is None):
            raise SchemeError(
                f"8-bit activations need 8-bit symmetric weights with one scale per row (w8a8), not {self}; "
                "use w8a8, or 16-bit activations"
            )

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Scheme of a string such as ``w4a16-g128``; SchemeError names what was expected."""
        m = _PATTERN.fullmatch(text.strip().lower())
        if m is None:
            raise SchemeError(f"unknown scheme {text!r}: {_HELP}")
        group = int(m["g"]) if m["g"] else None
        return cls(WeightScheme(int(m["w"]), group, symmetric=m["asym"] is None), int(m["a"]))

    def __str__(self) -> str:
        w = self.weight
        group = "" if w.group_size is None else f"-g{w.group_size}"
        return f"w{w.bits}a{self.activation_bits}{group}{'' if w.symmetric else '-asym'}"
