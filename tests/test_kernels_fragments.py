"""The fragment layout against an oracle that places one code at a time, by the table in the module's docstring."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from bitwright.errors import SchemeError
from bitwright.kernels import fragments
from bitwright.kernels.fragments import WORDS, Fragments, dequantize, dequantize_rows, pack, random, stack, unpack
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import WEIGHT_BITS, WeightScheme

SHAPES = ((1, 1), (16, 64), (15, 63), (40, 200), (64, 128), (72, 65), (200, 192))
GROUPS = (None, 32, 64, 96)


def random_weight(
    N: int, K: int, bits: int, group_size: int | None, symmetric: bool, scale_dtype: torch.dtype = torch.bfloat16
) -> QuantizedTensor:
    scheme = WeightScheme(bits, group_size, symmetric)
    generator = torch.Generator().manual_seed(1000 * N + K + bits)
    grid = (N, scheme.num_groups(K))
    codes = torch.randint(scheme.qmin, scheme.qmax + 1, (N, K), generator=generator).to(torch.int8)
    zero = torch.randint(scheme.qmin, scheme.qmax + 1, grid, generator=generator).to(torch.int8)
    scale = (torch.randn(grid, generator=generator) * 0.02).to(scale_dtype)
    return QuantizedTensor(codes, scale, None if symmetric else zero, scheme)


def weight(qt: QuantizedTensor) -> Tensor:
    """float64 [N, K], from the formula in the docstring of QuantizedTensor."""
    group = torch.arange(qt.shape[1]) // (qt.scheme.group_size or qt.shape[1])
    codes = qt.codes.double() - (0 if qt.zero_point is None else qt.zero_point.double()[:, group])
    return codes * qt.scale.double()[:, group]


def placed(codes: Tensor, bits: int) -> list[list[list[list[list[int]]]]]:
    """words[plane][band][column block][row block][index], one code after another into Python integers."""
    N, K = codes.shape
    values = codes.tolist()
    N64, K64 = (N + 63) // 64, (K + 63) // 64
    planes = [[[[[0] * width for _ in range(4)] for _ in range(K64)] for _ in range(N64)] for width in WORDS[bits]]

    def put(plane: int, R: int, C: int, index: int, bit: int, value: int) -> None:
        planes[plane][R // 4][C][R % 4][index] |= value << bit

    for R, C, g, t in product(range(4 * N64), range(K64), range(8), range(4)):
        lane = 4 * g + t
        for w1, j2, j1, j0, e in product(range(2), repeat=5):
            row, column = 16 * R + 8 * j0 + g, 64 * C + 32 * w1 + 16 * j2 + 8 * j1 + 2 * t + e
            code = values[row][column] if row < N and column < K else 0
            u = code + 2 ** (bits - 1)
            f = 8 * w1 + 4 * j2 + 2 * j1 + j0
            if bits == 4:
                put(0, R, C, lane * 4 + w1 * 2 + j2, 4 * (2 * j1 + j0 + 4 * e), u)
            elif bits == 2:
                put(0, R, C, lane * 2 + w1, 16 * e + 2 * (4 * j2 + 2 * j1 + j0), u)
            elif bits == 8:
                put(0, R, C, w1 * 128 + lane * 4 + j2 * 2 + j1, 8 * (j0 + 2 * e), code % 256)
            else:
                for i in range(3):
                    plane, index = (0, lane * 2 + i) if i < 2 else (1, lane)
                    if 5 * i <= f < 5 * i + 5:
                        put(plane, R, C, index, 16 * e + 3 * (f - 5 * i), u)
                    elif f == 15:
                        put(plane, R, C, index, 16 * e + 15, (u >> i) & 1)
    return planes


def as_unsigned(words: Tensor) -> list:
    return (words.to(torch.int64) % 2**32).tolist()


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_code_lies_where_the_table_says(bits: int, shape: tuple[int, int]) -> None:
    qt = random_weight(*shape, bits, None, True)
    packed = pack(qt, torch.bfloat16)
    assert [as_unsigned(w) for w in packed.words] == placed(qt.codes, bits)


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("group_size", GROUPS, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_round_trip(bits: int, shape: tuple[int, int], group_size: int | None, symmetric: bool) -> None:
    N, K = shape
    qt = random_weight(N, K, bits, group_size, symmetric)
    packed = pack(qt, torch.bfloat16)
    N64, K64 = -(-N // 64), -(-K // 64)
    assert [tuple(w.shape) for w in packed.words] == [(N64, K64, 4, width) for width in WORDS[bits]]
    assert all(w.dtype == torch.int32 and w.is_contiguous() for w in packed.words)
    assert torch.equal(unpack(packed), qt.codes)
    index = torch.tensor([N - 1, 0, N // 2, 0])
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(dequantize(packed, dtype), weight(qt).to(dtype))
        assert torch.equal(dequantize_rows(packed, index, dtype), weight(qt)[index].to(dtype))
    assert dequantize_rows(packed, index[:0], torch.float32).shape == (0, K)
    groups = 1 if group_size is None or group_size >= K else -(-K // group_size)
    assert packed.group_size == (K if groups == 1 else group_size)
    assert tuple(packed.scale.shape) == (groups, 64 * N64)
    assert torch.equal(packed.scale[:, :N], qt.scale.t()) and not packed.scale[:, N:].any()
    assert (packed.zero is None) == symmetric
    if packed.zero is not None:
        assert packed.zero.dtype == packed.scale.dtype
        assert torch.equal(packed.zero[:, :N], qt.zero_point.t().to(torch.bfloat16)) and not packed.zero[:, N:].any()
    assert packed.nbytes == sum(t.nbytes for t in packed.tensors)


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_padding_is_the_value_zero(bits: int) -> None:
    packed = pack(random_weight(17, 65, bits, None, True), torch.bfloat16)
    whole = unpack(replace(packed, N=64, K=128))
    assert not whole[17:].any() and not whole[:, 65:].any() and bool(whole[:17, :65].any())


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("N", [16, 40, 64, 72, 200])
@pytest.mark.parametrize("experts", [None, 2])
def test_a_step_is_one_run_in_memory(bits: int, N: int, experts: int | None) -> None:
    """Codes of 64 rows x 128 columns change the words of one run, and no other word; runs follow each other."""
    zero = QuantizedTensor(torch.zeros(N, 384, dtype=torch.int8), torch.ones(N, 1), None, WeightScheme(bits, None))
    plain = pack(zero, torch.float32)
    for band, step in product(range(-(-N // 64)), range(3)):
        codes = torch.zeros(N, 384, dtype=torch.int8)
        codes[64 * band : 64 * band + 64, 128 * step : 128 * step + 128] = -1
        changed = pack(replace(zero, codes=codes), torch.float32)
        pair = plain, changed
        if experts is not None:
            pair = stack([plain] * experts), stack([plain, changed])
        for before, after, width in zip(*(f.words for f in pair), WORDS[bits], strict=True):
            at = (before != after).view(-1).nonzero().view(-1)
            run = 2 * 4 * width
            first = ((experts or 1) - 1) * plain.words[0].shape[0] * 3 * run + (3 * band + step) * run
            rows = min(4, -(-(N - 64 * band) // 16))  # the blocks that have rows
            inside = torch.arange(first, first + run).view(2, 4, width)[:, :rows].reshape(-1)
            assert set(at.tolist()) <= set(inside.tolist()) and len(at) > 0
            assert N % 16 or torch.equal(at, inside)


@pytest.mark.parametrize(
    ("scale_dtype", "dtype", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16, torch.float16),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_scales_keep_their_value(scale_dtype: torch.dtype, dtype: torch.dtype, expected: torch.dtype) -> None:
    qt = random_weight(20, 96, 4, 32, False, scale_dtype)
    packed = pack(qt, dtype)
    assert packed.scale.dtype == expected
    assert packed.zero is not None and packed.zero.dtype == expected
    assert torch.equal(packed.scale[:, :20].t().double(), qt.scale.double())


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_only_values_count(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    """Strides, offsets and the size of pieces leave no trace, and the argument stays as it was."""
    qt = random_weight(70, 130, bits, 32, False)
    expected = pack(qt, torch.bfloat16)

    def strided(t: Tensor) -> Tensor:
        wide = torch.full((t.shape[1] * 2 + 1, t.shape[0] + 3), 5, dtype=t.dtype)
        view = wide[1::2, 3:].t()
        view.copy_(t)
        return view

    assert qt.zero_point is not None
    other = replace(qt, codes=strided(qt.codes), scale=strided(qt.scale), zero_point=strided(qt.zero_point))
    kept = [t.clone() for t in (qt.codes, qt.scale, qt.zero_point)]
    for chunk in (1, 3000, 1 << 24):
        monkeypatch.setattr(fragments, "_CHUNK", chunk)
        for given in (qt, other):
            again = pack(given, torch.bfloat16)
            assert all(map(torch.equal, again.tensors, expected.tensors))
            assert torch.equal(unpack(again), qt.codes)
    assert all(map(torch.equal, kept, (qt.codes, qt.scale, qt.zero_point)))


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_stack(bits: int, symmetric: bool) -> None:
    weights = [random_weight(20, 96, bits, 32, symmetric) for _ in range(3)]
    weights = [replace(w, codes=w.codes.roll(e, 1), scale=w.scale * (e + 1)) for e, w in enumerate(weights)]
    packed = [pack(w, torch.bfloat16) for w in weights]
    whole = stack(packed)
    assert whole.experts == 3 and packed[0].experts is None
    for e, one in enumerate(packed):
        assert all(torch.equal(a[e], b) for a, b in zip(whole.tensors, one.tensors, strict=True))
    assert torch.equal(unpack(whole), torch.stack([w.codes for w in weights]))
    assert torch.equal(dequantize(whole, torch.float32), torch.stack([weight(w).float() for w in weights]))


def test_a_stack_holds_one_kind() -> None:
    one = pack(random_weight(16, 64, 4, 32, True), torch.bfloat16)
    for other in (
        pack(random_weight(16, 64, 4, 32, False), torch.bfloat16),
        pack(random_weight(16, 64, 4, None, True), torch.bfloat16),
        pack(random_weight(16, 64, 3, 32, True), torch.bfloat16),
        pack(random_weight(17, 64, 4, 32, True), torch.bfloat16),
        pack(random_weight(16, 64, 4, 32, True), torch.float16),
    ):
        with pytest.raises(SchemeError, match=r"^expert 1 is \[1[67], 64\] at"):
            stack([one, other])
    with pytest.raises(SchemeError, match="at least one"):
        stack([])


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize(("N", "K"), [(128, 128), (48, 128), (20, 100)])
@pytest.mark.parametrize("experts", [None, 3])
def test_random(bits: int, N: int, K: int, experts: int | None) -> None:
    """The shapes of a packed weight, the whole range of codes, padding 0."""
    generator = torch.Generator().manual_seed(0)
    made = random(N, K, bits, 32, False, torch.float16, "cpu", experts, generator)
    like = pack(random_weight(N, K, bits, 32, False, torch.float16), torch.float16)
    like = like if experts is None else stack([like] * experts)
    assert [(t.shape, t.dtype) for t in made.tensors] == [(t.shape, t.dtype) for t in like.tensors]
    codes = unpack(made)
    low, high = codes.min().item(), codes.max().item()
    assert (low, high) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if bits < 8 else (low < -110 and high > 110)
    padding = unpack(replace(made, N=-(-N // 64) * 64, K=-(-K // 64) * 64))
    assert not padding[..., N:, :].any() and not padding[..., K:].any()
    assert made.scale.isfinite().all() and bool((made.scale < 0).any()) and bool((made.scale > 0).any())
    whole_row = random(N, K, bits, None, True, torch.bfloat16, "cpu")
    assert isinstance(whole_row, Fragments) and whole_row.zero is None
    assert (whole_row.group_size, whole_row.scale.shape[0]) == (K, 1)
