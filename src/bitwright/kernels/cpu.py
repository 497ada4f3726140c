"""Packed linears on a CPU through PyTorch's own integer operators.

Few tokens: the operator reads the packed weight once and unpacks it in registers; at M = 1 that is a matter of memory
traffic, and 4 bits move four to eight times less than 16 or 32. Many tokens: a GEMM on the dequantized weight wins
(above `_int4_gemm_above` and `_int8_gemm_above` tokens, as measured), and the weight is then unpacked a few rows at a
time, so that it stays in cache and never stands in memory whole. Where bf16 products are emulated, that GEMM runs in
float32.

`_weight_int4pack_mm_for_cpu` computes (u - 8) · scale + offset in float32 from 4-bit codes u and bf16 scale and
offset. More than symmetric 4-bit grids fit it exactly:

* fewer bits, or one scale per row: the same codes, the scale repeated for groups the operator takes;
* 8 bits: u = 16 · high + low, two nibbles side by side along K, against the activations twice;
* zero points: -zero_point · scale does not fit bf16. What bf16 leaves (a few bits, exact in bf16 themselves) is
  multiplied with the group sums of the activations and added.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from bitwright.kernels.dequantize import Int8Exact
from bitwright.kernels.layouts import INT4_ROWS, gather_int4, int4_block, pack_int4, unpack_int4
from bitwright.kernels.problem import AVX512, NATIVE_BF16, VNNI, Implementation, Problem
from bitwright.qtensor import QuantizedTensor

_KERNEL_GROUPS = (256, 128, 64, 32)  # what the int4 operator takes
_INT8_COLUMNS = 32  # the int8 operator's step along K; it has no tail and no check
_CHUNK = 1 << 20  # weights dequantized at a time: 2 MB in bf16, small enough to stay in cache

_int4_mm = torch.ops.aten._weight_int4pack_mm_for_cpu.default
_int8_mm = torch.ops.aten._weight_int8pack_mm.default


class Int4Weight(Implementation):
    """Any 2, 3, 4 or 8-bit grid on 4-bit codes in the operator's block order.

    codes: uint8 [N'/B, K', B/2]. scale_offset: bf16 [K'/h, N', 2]. rest: bf16 [K/h, N] or None. N' is N padded to 64,
    K' is K padded to 32, doubled for 8 bits; h is the operator's group.
    """

    NAME = "int4pack"

    def __init__(self, problem: Problem, codes: Tensor, scale_offset: Tensor, rest: Tensor | None, group: int) -> None:
        self.shape, self.dtype = (problem.N, problem.K), problem.dtype
        self._codes, self._scale_offset, self._rest, self._group = codes, scale_offset, rest, group
        self._packed = codes.view(codes.shape[0] * codes.shape[2] * 2, -1)  # the shape the operator expects
        self._nibbles = 2 if problem.scheme.weight.bits == 8 else 1
        self._symmetric = problem.scheme.weight.symmetric
        self._gemm_above = _int4_gemm_above(problem)
        self._gemm_dtype = torch.bfloat16 if NATIVE_BF16 in problem.features else torch.float32
        self._plain = self._packed.shape[0] == problem.N and codes.shape[1] == problem.K and rest is None

    @classmethod
    def refuse(cls, problem: Problem) -> str | None:
        if problem.device != "cpu":
            return "runs on a CPU only"
        if problem.scheme.activation_bits != 16:
            return "takes 16-bit activations"
        if problem.dtype != torch.bfloat16:
            return f"takes bfloat16 activations ({problem.dtype} is 20 to 100 times slower in this operator)"
        if problem.scale_dtype != torch.bfloat16:
            return f"takes bfloat16 scales, not {problem.scale_dtype}; round them first"
        if _kernel_group(problem) is None:
            return f"group size {problem.scheme.weight.group_size} is no multiple of {_KERNEL_GROUPS[-1]}"
        if int4_block() is None:
            return "this build of torch packs 4-bit weights in an order that is not known here"
        return None

    @classmethod
    def describe(cls, problem: Problem) -> str:
        group, w = _kernel_group(problem), problem.scheme.weight
        bits, scale_bits = w.bits, 64 if w.bits == 8 else 32 if w.symmetric else 48
        held = max(bits, 4) + scale_bits / (group or 1)
        above = _int4_gemm_above(problem)
        many = "at any M" if above is None else f"to M = {above}, dequantize + GEMM above"
        widened = f"; {bits}-bit codes take 4 in memory" if bits < 4 else ""
        return f"4-bit operator in groups of {group} {many}; {held:.2f} bits per weight in memory{widened}"

    @classmethod
    def prepare(cls, qt: QuantizedTensor, problem: Problem) -> Self:
        N, K = qt.shape
        block, group = int4_block(), _kernel_group(problem)
        assert block is not None and group is not None, "prepare after refuse"
        bits = qt.scheme.bits
        more_rows, more_columns = -N % INT4_ROWS, -K % group
        columns = K + more_columns
        unsigned = (qt.codes.view(torch.uint8) + (128 if bits == 8 else 8)).contiguous()
        unsigned = pad(unsigned, (0, more_columns, 0, more_rows))
        of_group = torch.arange(columns // group) * group // (qt.scheme.group_size or columns)  # ours -> the operator's
        of_group = of_group.clamp(max=qt.scale.shape[1] - 1)
        scale = pad(qt.scale.float()[:, of_group], (0, 0, 0, more_rows))
        zero = torch.zeros_like(scale)
        if qt.zero_point is not None:
            zero = pad(qt.zero_point.float()[:, of_group], (0, 0, 0, more_rows))
        if bits == 8:
            # (16 high + low - 128 - z) s = (high - 8) 16 s + (low - 8) s + (8 - z) s; the two offsets share the last.
            offset = (8 - zero) * scale
            first = _bf16(offset)
            unsigned = torch.cat((unsigned >> 4, unsigned & 15), dim=1)
            scale, offset = torch.cat((16 * scale, scale), dim=1), torch.cat((first, offset - first), dim=1)
            rest = None
        else:
            exact = -zero * scale
            offset = _bf16(exact)
            rest = (exact - offset)[:N].t()
            rest = rest.to(torch.bfloat16).contiguous() if bool(rest.any()) else None
        scale_offset = torch.stack((scale, offset), dim=-1).to(torch.bfloat16).transpose(0, 1).contiguous()
        return cls(problem, pack_int4(unsigned, block), scale_offset, rest, group)

    def __call__(self, x: Tensor) -> Tensor:
        if self._gemm_above is not None and x.shape[0] > self._gemm_above:
            return self._gemm(x)
        if self._plain:
            return _int4_mm(x, self._packed, self._group, self._scale_offset)
        columns = self._codes.shape[1] // self._nibbles
        if columns != x.shape[1]:
            x = pad(x, (0, columns - x.shape[1]))
        twice = x if self._nibbles == 1 else torch.cat((x, x), dim=1)
        y = _int4_mm(twice, self._packed, self._group, self._scale_offset)[:, : self.shape[0]]
        if self._rest is not None:
            sums = x.view(x.shape[0], self._rest.shape[0], self._group).sum(dim=-1, dtype=torch.float32)
            y = (y.float() + sums @ self._rest.float()).to(y.dtype)
        return y

    def rows(self, index: Tensor) -> Tensor:
        scale_offset = self._scale_offset[:, index].permute(2, 0, 1)
        rest = None if self._rest is None else self._rest[:, index]
        return self._values(gather_int4(self._codes, index).t(), scale_offset, rest, self.dtype).t().contiguous()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._columns(0, self._codes.shape[0], dtype).t().contiguous()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        held = (self._codes, self._scale_offset)
        return held if self._rest is None else (*held, self._rest)

    def _gemm(self, x: Tensor) -> Tensor:
        """x [M, K] against the dequantized weight, a few blocks of rows at a time."""
        blocks, columns, half = self._codes.shape
        step = max(1, _CHUNK // (columns * half * 2))
        x = x.to(self._gemm_dtype)
        pieces = [x @ self._columns(b, min(b + step, blocks), self._gemm_dtype) for b in range(0, blocks, step)]
        y = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        return y.to(self.dtype)

    def _columns(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """[K, rows] of the weight, transposed, for blocks first..last-1."""
        width = self._codes.shape[2] * 2
        low, high = first * width, min(last * width, self.shape[0])
        codes = unpack_int4(self._codes[first:last])[:, : high - low]
        scale_offset = self._scale_offset[:, low:high].permute(2, 0, 1)
        rest = None if self._rest is None else self._rest[:, low:high]
        return self._values(codes, scale_offset, rest, dtype)

    def _values(self, codes: Tensor, scale_offset: Tensor, rest: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Weights [K, n] of uint8 nibbles [K', n], scales and offsets [2, K'/h, n]."""
        n = codes.shape[1]
        scale, offset = scale_offset.contiguous()  # a strided scale makes the products below three times slower
        if self._nibbles == 2:
            high, low = codes.chunk(2)
            signed = (high << 4).bitwise_or_(low).bitwise_xor_(128)  # as int8: 16 high + low - 128
            scale = scale[scale.shape[0] // 2 :]
        else:
            signed = codes - 8
        grouped = signed.view(torch.int8).reshape(-1, self._group, n)
        if self._symmetric and dtype == torch.bfloat16:
            values = grouped * scale[:, None]  # one pass: the product in float32, rounded once
        else:
            # Every term is a small integer times the scale, so these float32 sums are exact.
            scale, offset = scale.float(), offset.float()
            if self._nibbles == 2:
                offset = offset[: len(scale)] + offset[len(scale) :] - 8 * scale
            elif rest is not None:
                offset = offset + rest.float()
            values = torch.addcmul(offset[:, None], grouped.float(), scale[:, None]).to(dtype)
        return values.reshape(-1, n)[: self.shape[1]]


class Int8Weight(Implementation):
    """Symmetric 8 bits, one scale per row: codes int8 [N, K] as they are, scale bf16 [N]."""

    NAME = "int8pack"

    def __init__(self, problem: Problem, codes: Tensor, scale: Tensor) -> None:
        self.shape, self.dtype = (problem.N, problem.K), problem.dtype
        self._codes, self._scale = codes, scale
        self._gemm_above = _int8_gemm_above(problem)
        self._gemm_dtype = torch.bfloat16 if NATIVE_BF16 in problem.features else torch.float32

    @classmethod
    def refuse(cls, problem: Problem) -> str | None:
        w = problem.scheme.weight
        if problem.device != "cpu":
            return "runs on a CPU only"
        if problem.scheme.activation_bits != 16:
            return "takes 16-bit activations"
        if problem.dtype != torch.bfloat16 or problem.scale_dtype != torch.bfloat16:
            return f"takes bfloat16 activations and scales, not {problem.dtype} and {problem.scale_dtype}"
        if w.bits != 8 or not w.symmetric or w.num_groups(problem.K) != 1:
            return "takes symmetric 8-bit codes with one scale per row"
        if problem.K % _INT8_COLUMNS:
            return f"width {problem.K} is no multiple of {_INT8_COLUMNS}: the operator would read past the rows' ends"
        return None

    @classmethod
    def describe(cls, problem: Problem) -> str:
        above = _int8_gemm_above(problem)
        held = 8 + 16 / problem.K
        return f"8-bit operator to M = {above}, dequantize + GEMM above; {held:.2f} bits per weight in memory"

    @classmethod
    def prepare(cls, qt: QuantizedTensor, problem: Problem) -> Self:
        return cls(problem, qt.codes.contiguous(), qt.scale[:, 0].contiguous())

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] <= self._gemm_above:
            return _int8_mm(x, self._codes, self._scale)
        x = x.to(self._gemm_dtype)
        step = max(1, _CHUNK // self.shape[1])
        pieces = [
            linear(x, self._codes[n : n + step] * self._scale[n : n + step, None].to(x.dtype))
            for n in range(0, self.shape[0], step)
        ]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)).to(self.dtype)

    def rows(self, index: Tensor) -> Tensor:
        return self._codes[index] * self._scale[index, None]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self._codes * self._scale[:, None].float()).to(dtype)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self._codes, self._scale


class Int8Dynamic(Int8Exact):
    """w8a8 on int8 dot products: exact int32 sums at once."""

    NAME = "int8-vnni"

    @classmethod
    def refuse(cls, problem: Problem) -> str | None:
        if problem.device != "cpu":
            return "runs on a CPU only"
        if problem.scheme.activation_bits != 8:
            return "takes 8-bit activations"
        if VNNI not in problem.features:
            return "needs int8 dot products in hardware (VNNI): without them torch._int_mm saturates in silence"
        return None

    @classmethod
    def describe(cls, problem: Problem) -> str:
        return f"int8 × int8 with int32 sums at any M; {8 + 32 / problem.K:.2f} bits per weight in memory"

    def _sums(self, codes: Tensor) -> Tensor:
        return torch._int_mm(codes, self._codes.t())


def _bf16(values: Tensor) -> Tensor:
    """Rounded to bf16, in float32."""
    return values.to(torch.bfloat16).to(torch.float32)


def _kernel_group(problem: Problem) -> int | None:
    """The largest group the int4 operator takes that splits ours evenly; None if there is none."""
    K, g = problem.K, problem.scheme.weight.group_size
    if g is None or g >= K:
        padded = -(-K // _KERNEL_GROUPS[-1]) * _KERNEL_GROUPS[-1]
        return next(h for h in _KERNEL_GROUPS if padded % h == 0)
    padded = -(-K // _KERNEL_GROUPS[-1]) * _KERNEL_GROUPS[-1]
    return next((h for h in _KERNEL_GROUPS if g % h == 0 and padded % h == 0), None)


def _int4_gemm_above(problem: Problem) -> int | None:
    """Tokens above which dequantize + GEMM is faster; None where the operator always is."""
    if NATIVE_BF16 in problem.features:
        return 64 if problem.scheme.weight.bits == 8 else 96
    return None if AVX512 in problem.features else 128


def _int8_gemm_above(problem: Problem) -> int:
    """Tokens above which dequantize + GEMM is faster."""
    return 48 if NATIVE_BF16 in problem.features else 128
