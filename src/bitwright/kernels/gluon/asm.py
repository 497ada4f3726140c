"""PTX that turns words of packed codes into pairs of 16-bit floats.

A field of a word is merged into the mantissa of a 16-bit float by one logic operation (2^7 + u in bf16, 2^10 + u in
fp16), then the offset and the zero point are taken off together. Both are exact: zero points are whole numbers within
the range of the codes, so that offset less zero point has at most 8 significant bits (11 for fp16). (Bytes in bf16 come
otherwise, and the zero point by itself.) The scale is multiplied with one rounding: what `QuantizedTensor.dequantize`
gives in that dtype, bit for bit. Or the scale is left to the accumulator (`late`).
"""

from __future__ import annotations

import struct
from functools import cache

# dtype -> (suffix of pair instructions, bits of the magic number, its value)
_PAIRS = {"bf16": ("bf16x2", 0x4300, 128), "fp16": ("f16x2", 0x6400, 1024)}


def _pair(value: float, dtype: str) -> str:
    """A 32-bit literal with `value` in both halves; it must be exact in the dtype."""
    if dtype == "fp16":
        half = struct.unpack("<H", struct.pack("<e", value))[0]
    else:
        whole = struct.unpack("<I", struct.pack("<f", value))[0]
        assert whole & 0xFFFF == 0, value
        half = whole >> 16
    return f"0x{half:04x}{half:04x}"


class _Writer:
    """PTX of one asm statement: inputs follow the 16-bit outputs, two to a pair."""

    def __init__(self, dtype: str, pairs: int, inputs: int, asymmetric: bool, late: bool) -> None:
        self.suffix, self.magic, self.base = _PAIRS[dtype]
        self.dtype, self.pairs, self.asymmetric, self.late = dtype, pairs, asymmetric, late
        self.lines = ["{", ".reg .b32 t, u, v, p;"]
        self.offsets: dict[tuple[float, int], str] = {}  # (number, its zero point) -> the register of their difference
        self.first = 2 * pairs  # operand number of the first input
        self.constraints = ",".join(["=h"] * (2 * pairs) + ["r"] * inputs)

    def magic_pair(self) -> str:
        return f"0x{self.magic:04x}{self.magic:04x}"

    def take(self, source: str, shift: int, mask: int) -> None:
        """p = the fields under `mask` of both halves of source >> shift, as magic + field."""
        if shift:
            self.lines.append(f"shr.u32 t, {source}, {shift};")
            source = "t"
        self.lines.append(f"lop3.b32 p, {source}, 0x{mask:04x}{mask:04x}, {self.magic_pair()}, 0xea;")

    def center(self, offset: int, zero: int, up: int = 0) -> None:
        """p holds magic + 2^up · field; make it field - offset, less the zero point (input `zero`), exactly."""
        rest = self.rest(-(self.base / (1 << up) + offset), zero)
        if up == 0:
            self.lines.append(f"add.rn.{self.suffix} p, p, {rest};")
        else:
            self.lines.append(f"mov.b32 v, {_pair(2.0**-up, self.dtype)};")
            self.lines.append(f"fma.rn.{self.suffix} p, p, v, {rest};")

    def rest(self, number: float, zero: int) -> str:
        """The register of a pair of `number`, less the zero point: computed once for all pairs that need it."""
        if not self.asymmetric:
            self.lines.append(f"mov.b32 u, {_pair(number, self.dtype)};")
            return "u"
        if (number, zero) not in self.offsets:
            name = self.offsets[number, zero] = f"c{len(self.offsets)}"
            self.lines.append(f".reg .b32 {name};")
            self.lines.append(f"mov.b32 {name}, {_pair(number, self.dtype)};")
            self.lines.append(f"sub.rn.{self.suffix} {name}, {name}, ${self.first + zero};")
        return self.offsets[number, zero]

    def finish(self, pair: int, scale: int) -> None:
        """Multiply by the scale (input `scale`), write out pair `pair`."""
        if not self.late:
            self.lines.append(f"mul.rn.{self.suffix} p, p, ${self.first + scale};")
        self.lines.append(f"mov.b32 {{${2 * pair}, ${2 * pair + 1}}}, p;")

    def text(self) -> str:
        return "\n".join([*self.lines, "}"])


@cache
def dequantize_asm(bits: int, dtype: str, asymmetric: bool, late: bool) -> tuple[str, str]:
    """The PTX statement for one word (three for 3 bits) of `bits`, and its operand constraints.

    Inputs: the words; then, unless the scale comes `late`, that of row g and of row g + 8 (for 3 bits those of both
    halves of a block: four), then as many zero points. Outputs: pair after pair, e = 0 and 1, in the order of f (see
    `kernels.fragments`).
    """
    words, pairs, each = {4: (1, 4, 2), 2: (1, 8, 2), 3: (3, 16, 4), 8: (1, 2, 2)}[bits]
    scales = 0 if late else each
    w = _Writer(dtype, pairs, words + scales + (each if asymmetric else 0), asymmetric, late)
    source = f"${w.first}"
    for f in range(pairs):
        j0 = f % 2
        scale = words + (f // 8 * 2 if bits == 3 else 0) + j0
        zero = scale + scales
        if bits == 4:
            w.take(source, 4 * f, 0x000F)
            w.center(8, zero)
        elif bits == 2:
            up = 2 * (f % 3)  # three fields fit into the mantissa before a shift is needed
            w.take(source, 2 * (f - f % 3), 3 << up)
            w.center(2, zero, up)
        elif bits == 3 and f < 15:
            i, at = divmod(f, 5)
            up = 3 * (at % 2)
            w.take(f"${w.first + i}", 3 * (at - at % 2), 7 << up)
            w.center(4, zero, up)
        elif bits == 3:
            # Code 15 is spread over bit 15 of the three words.
            w.lines.append(f"shr.u32 t, ${w.first}, 15;")
            w.lines.append(f"lop3.b32 p, t, 0x00010001, {w.magic_pair()}, 0xea;")
            w.lines.append(f"shr.u32 t, ${w.first + 1}, 14;")
            w.lines.append("lop3.b32 p, t, 0x00020002, p, 0xea;")
            w.lines.append(f"shr.u32 t, ${w.first + 2}, 13;")
            w.lines.append("lop3.b32 p, t, 0x00040004, p, 0xea;")
            w.center(4, zero)
        elif dtype == "bf16":
            # Two's complement: seven bits in the mantissa, and the sign as the lowest bit of the exponent, which
            # turns 128 into 256; the difference of the two is the code.
            if f:
                w.lines.append(f"shr.u32 t, {source}, 8;")
            word = "t" if f else source
            w.lines.append(f"lop3.b32 u, {word}, 0x00800080, {w.magic_pair()}, 0xea;")
            w.lines.append(f"lop3.b32 p, {word}, 0x007f007f, {w.magic_pair()}, 0xea;")
            w.lines.append(f"sub.rn.{w.suffix} p, p, u;")
            if asymmetric:
                w.lines.append(f"sub.rn.{w.suffix} p, p, ${w.first + zero};")
        else:
            w.lines.append(f"shr.u32 t, {source}, {8 * f};")
            w.lines.append("and.b32 t, t, 0x00ff00ff;")
            w.lines.append(f"lop3.b32 p, t, 0x00800080, {w.magic_pair()}, 0xbe;")  # (t ^ 0x80) | magic
            w.center(128, zero)
        w.finish(f, scale)
    return w.text(), w.constraints
