"""What a quantized linear looks like, as frozen values: `Scheme.parse("w4a16-g128")` and back with `str`.

A scheme says how numbers are stored, never how they were found: the algorithm (rtn, gptq, quik, ...) stands beside
it in a recipe.

Grammar: ``w<bits>a<bits>[-g<group_size>][-asym][-o<count>|-o<share>%][-rot][-24]``

====================  =========================================================================
``w4a16-g128``        4-bit weights, one scale per 128 inputs, 16-bit activations
``w4a16-g64-asym``    the same with a zero point per group
``w3a16``             3-bit weights, one scale per output row
``w8a8``              8-bit weights per row, activations quantized per token to int8 at run time
``w4a4-o256``         4-bit weights and activations; 256 input columns (outliers) stay at 16 bits
``w4a4-o5%``          the same with 5 % of the columns
``w4a4-o256-rot``     the other columns are rotated (Hadamard) before they are quantized
``w4a4-o256-24``      of every four weights in a row outside the outlier columns, two are zero and not stored
``w16a16-24``         16-bit weights, half of them zero in that pattern
====================  =========================================================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from bitwright.errors import SchemeError

WEIGHT_BITS = (2, 3, 4, 8)
ACTIVATION_BITS = (4, 8, 16)
UNQUANTIZED_BITS = 16
MIN_GROUP_SIZE = 8
# Outlier columns come in multiples of this where the count follows from a share or a width: what GPU tiles take.
OUTLIER_STEP = 16
# What a linear that reads the output of the activation function gets where others have 4-bit activations, unless told
# otherwise: single values there dwarf their token (QUIK keeps such layers at 8 bits).
BEHIND_ACTIVATION = "w8a8"
_INDEX_BITS = 32

_PATTERN = re.compile(
    r"w(?P<w>\d+)a(?P<a>\d+)(?:-g(?P<g>\d+))?(?P<asym>-asym)?"
    r"(?:-o(?:(?P<share>\d+(?:\.\d+)?)%|(?P<count>\d+)))?(?P<rot>-rot)?(?P<sparse>-24)?"
)
_HELP = (
    "expected w<bits>a<bits>[-g<group_size>][-asym][-o<outliers>][-rot][-24], for example w4a16-g128, w3a16-g64-asym, "
    "w8a8, w4a4-o256 or w4a16-g128-24"
)


@dataclass(frozen=True)
class WeightScheme:
    """Integer grid of a weight [N, K]: w = (q - zero_point) * scale.

    bits: 2, 3, 4 or 8 (16: no grid, values as they are). group_size: inputs per scale, None = the whole row.
    symmetric: zero_point is 0 and not stored.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (*WEIGHT_BITS, UNQUANTIZED_BITS):
            raise SchemeError(f"weight bits {self.bits} are not supported; choose one of {WEIGHT_BITS}")
        if self.bits == UNQUANTIZED_BITS and not (self.group_size is None and self.symmetric):
            raise SchemeError("16-bit weights have no grid, so neither groups nor zero points; leave out -g and -asym")
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
        if self.bits == UNQUANTIZED_BITS:
            return UNQUANTIZED_BITS
        per_group = 16 + (0 if self.symmetric else self.bits)
        return self.bits + self.num_groups(K) * per_group / K


@dataclass(frozen=True)
class OutlierScheme:
    """How many input columns stay at 16 bits: a count, or a share in percent of the width (exactly one of the two)."""

    count: int | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        if (self.count is None) == (self.share is None):
            raise SchemeError("outliers are either a count (-o64) or a share (-o5%)")
        if self.count is not None and self.count < 1:
            raise SchemeError("-o0 keeps no column; leave -o out")
        if self.share is not None and not 0 < self.share < 100:
            raise SchemeError(f"outliers of {self.share:g} % are not possible; the share lies between 0 and 100")

    def columns(self, K: int, width: int | None = None) -> int:
        """Outlier columns of a width-K input. width: a count is meant for inputs of this width and grows in proportion
        for wider ones (None: it is meant as it is). What follows from a share or a proportion is rounded to
        `OUTLIER_STEP` columns: at least one step, and where K is wider than a step, fewer than K."""
        if self.count is not None and (width is None or width >= K):
            return self.count
        wanted = K * (self.share / 100 if self.share is not None else (self.count or 0) / (width or K))
        return max(1, min(round(wanted / OUTLIER_STEP), (K - 1) // OUTLIER_STEP)) * OUTLIER_STEP

    def __str__(self) -> str:
        return f"o{self.count}" if self.count is not None else f"o{self.share:g}%"


@dataclass(frozen=True)
class Scheme:
    """A weight grid, the bits of the activations it meets at run time, and what is exempt from both.

    activation_bits: 16 = not quantized; 8 = symmetric per token; 4 = asymmetric per token (`activations` has the
    definitions). outliers: input columns that stay at 16 bits in weights and activations. rotated: the other columns
    are rotated by a blockwise Hadamard transform before they are quantized. sparse: 2:4, of every four stored base
    columns each row keeps two.
    """

    weight: WeightScheme
    activation_bits: int = 16
    outliers: OutlierScheme | None = None
    rotated: bool = False
    sparse: bool = False

    def __post_init__(self) -> None:
        if self.activation_bits not in ACTIVATION_BITS:
            raise SchemeError(
                f"activation bits {self.activation_bits} are not supported; choose one of {ACTIVATION_BITS}"
            )
        w = self.weight
        if w.bits == UNQUANTIZED_BITS and (self.activation_bits != 16 or self.outliers or self.rotated):
            raise SchemeError(f"16-bit weights are only pruned (w16a16-24), not {self}; use w4, w8 or w16a16-24")
        if w.bits == UNQUANTIZED_BITS and not self.sparse:
            raise SchemeError("w16a16 changes nothing; use w16a16-24 to prune, or keep the layer (keep = true)")
        if self.activation_bits < 16 and not (w.bits in (4, 8) and w.symmetric and w.group_size is None):
            raise SchemeError(
                f"{self.activation_bits}-bit activations need 4- or 8-bit symmetric weights with one scale per row "
                f"(w4a4, w4a8, w8a8), not {self}; leave out -g and -asym, or use 16-bit activations"
            )
        if self.activation_bits == 4 and w.bits == 8:
            raise SchemeError("w8a4 spends bits where they bring least; use w8a8 or w4a4")
        if (self.outliers or self.sparse) and not w.symmetric:
            raise SchemeError(f"outlier columns and 2:4 need symmetric weights, not {self}; leave out -asym")
        if self.rotated and self.activation_bits == 16:
            raise SchemeError(f"-rot serves quantized activations, and {self} has none; leave it out")

    @property
    def plain(self) -> bool:
        """Whether a `QuantizedTensor` says everything: weights on a grid, activations at 16 bits, or w8a8."""
        return (
            self.weight.bits != UNQUANTIZED_BITS
            and not (self.outliers or self.rotated or self.sparse)
            and (self.activation_bits == 16 or (self.activation_bits, self.weight.bits) == (8, 8))
        )

    def resolved(self, K: int, width: int | None = None) -> Scheme:
        """The same with the outliers of a width-K input counted; see `OutlierScheme.columns`."""
        if self.outliers is None:
            return self
        return replace(self, outliers=OutlierScheme(count=self.outliers.columns(K, width)))

    def behind_activation(self, asked: Scheme) -> Scheme:
        """The scheme of a linear behind the activation function, where `asked` is wanted of such: that, with the
        outliers, rotation and 2:4 of this one where it asks for w8a8 or the like and says nothing itself. Weight-only
        schemes stay as they are: what is hard to round there are activations."""
        if self.activation_bits == UNQUANTIZED_BITS:
            return self
        if not asked.plain:
            return asked
        if self.weight.bits >= asked.weight.bits and self.activation_bits >= asked.activation_bits:
            return self
        rotated = self.rotated and asked.activation_bits < UNQUANTIZED_BITS
        return replace(asked, outliers=self.outliers, rotated=rotated, sparse=self.sparse)

    def bits_per_weight(self, N: int, K: int) -> float:
        """Stored bits per weight of an [N, K] matrix: codes, scales, zero points, outlier columns at 16 bits and their
        indices, and for 2:4 two bits a kept value that say which of the four it is."""
        O = 0 if self.outliers is None else self.outliers.columns(K)
        B, w = K - O, self.weight
        kept = B / 2 if self.sparse else B
        bits = kept * (w.bits + (2 if self.sparse else 0)) + O * 16 + O * _INDEX_BITS / N
        if w.bits != UNQUANTIZED_BITS:
            bits += w.num_groups(B) * (16 + (0 if w.symmetric else w.bits))
        return bits / K

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Scheme of a string such as ``w4a16-g128``; SchemeError names what was expected."""
        m = _PATTERN.fullmatch(text.strip().lower())
        if m is None:
            raise SchemeError(f"unknown scheme {text!r}: {_HELP}")
        group = int(m["g"]) if m["g"] else None
        outliers = None
        if m["count"] or m["share"]:
            outliers = OutlierScheme(int(m["count"]) if m["count"] else None, float(m["share"]) if m["share"] else None)
        return cls(
            WeightScheme(int(m["w"]), group, symmetric=m["asym"] is None),
            int(m["a"]),
            outliers,
            rotated=m["rot"] is not None,
            sparse=m["sparse"] is not None,
        )

    def __str__(self) -> str:
        w = self.weight
        group = "" if w.group_size is None else f"-g{w.group_size}"
        outliers = "" if self.outliers is None else f"-{self.outliers}"
        ends = ("-rot" if self.rotated else "") + ("-24" if self.sparse else "")
        return f"w{w.bits}a{self.activation_bits}{group}{'' if w.symmetric else '-asym'}{outliers}{ends}"
