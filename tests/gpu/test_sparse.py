"""The sparse int8 kernel on a Hopper GPU: bit for bit the CPU program and the dense kernels, graphs, odd addresses."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import sparse_cases
import torch
from torch import Tensor

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from bitwright.kernels import int8_fragments, sparse_fragments
from bitwright.kernels.int8_fragments import MAX_COLUMNS
from bitwright.kernels.int8_ops import int8_linear
from bitwright.kernels.nvrtc import launch
from bitwright.kernels.problem import HOPPER, NVRTC, cuda_features
from bitwright.kernels.sparse_ops import int8_sparse_linear
from gpu import cases, int8_cases
from gpu.int8_cases import Case

if not {HOPPER, NVRTC} <= cuda_features():
    pytest.skip("needs a Hopper GPU and NVRTC", allow_module_level=True)

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
SHAPES = [(1, 64, 128), (65, 200, 516), (128, 1000, 1000), (300, 1003, 2048), (300, 8192, 384), (2048, 200, 4096)]
EXACT = [
    Case(bits, activation_bits, M, N, B, O, bias=(O > 16) == (dtype == BF16), dtype=dtype)
    for M, N, B in SHAPES
    for bits, activation_bits, O, dtype in (
        (4, 4, 0, BF16), (4, 8, 0, FP16), (4, 4, 16, BF16), (4, 8, 40, FP16), (4, 4, 256, BF16), (8, 8, 0, BF16),
        (8, 8, 40, FP16),
    )
]  # fmt: skip
RANDOM = [
    Case(4, 4, M, 1000, 3840, 256, bias=True, dtype=dtype, exact=False) for M in (1, 600) for dtype in (BF16, FP16)
]
# ROWS, TOKENS, CLUSTER, STAGES, BAND
TILES = [
    (256, 64, 1, 2, 16), (256, 64, 2, None, 3), (256, 128, 1, 3, 1), (256, 128, 2, None, 16), (256, 128, 2, 2, 2),
    (256, 160, 2, None, 16), (256, 160, 1, 2, 4), (256, 192, 2, None, 16), (256, 192, 1, 3, 16), (128, 64, 1, None, 16),
    (128, 64, 2, 2, 2), (128, 128, 2, None, 16),
]  # fmt: skip
REPEATED = Case(4, 4, M=700, N=5304, B=4096, O=32, bias=True, exact=False)


def check(linear: Any, case: Case) -> None:
    given = sparse_cases.operands(case)
    moved = int8_cases.on(given, "cuda")
    int8_cases.compare(linear(*moved), int8_sparse_linear(*given), case)
    for a, b in zip(moved, given, strict=True):
        assert not isinstance(b, Tensor) or torch.equal(a.cpu(), b), "an operand changed"


@pytest.mark.parametrize("case", EXACT + RANDOM, ids=str)
def test_against_the_cpu(case: Case, poison: None) -> None:
    check(int8_sparse_linear, case)


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_tile(tiles: tuple[int, int, int, int | None, int], bits: int, poison: None) -> None:
    """Over several rounds of tiles: N, M and the last step ragged; results written through TMA and value by value."""
    ROWS, TOKENS, CLUSTER, STAGES, BAND = tiles
    for M, N, O in ((150, 5300, 40), (700, 5303, 0), (1500, 5304, 16)):
        case = Case(bits, bits, M=M, N=N, B=420, O=O, bias=True)
        c = launch.choose(M, N, -(-O // 16) * 16, bits, case.dtype, case.dtype, 132)
        c = replace(c, ROWS=ROWS, TOKENS=TOKENS, CLUSTER=CLUSTER, STAGES=STAGES, BAND=BAND)
        check(partial(launch.linear, config=c), case)


def test_bias_of_another_dtype() -> None:
    given = list(int8_cases.on(sparse_cases.operands(Case(M=70, N=1000, bias=True)), "cuda"))
    given[8] = torch.randn(1000, device="cuda")
    on_cpu = int8_cases.on(tuple(given), "cpu")
    cases.assert_equal(int8_sparse_linear(*given), int8_sparse_linear(*on_cpu), "float32 bias")


@pytest.mark.parametrize("exact", [True, False])
def test_against_the_dense_kernel(exact: bool) -> None:
    """The same operations in the same order, but for the sums over outliers: these are equal where they are exact."""
    case = Case(4, 4, M=2048, N=8192, B=3840, O=256, exact=exact)
    given = int8_cases.on(sparse_cases.operands(case), "cuda")
    codes = sparse_fragments.unpack(given[4], case.N, case.B, 4)
    dense = int8_linear(*given[:4], int8_fragments.pack(codes), *given[5:])
    int8_cases.compare(int8_sparse_linear(*given), dense.cpu(), case)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_longest_sum(bits: int) -> None:
    """Every kept code the lowest, over the widest input."""
    given = list(sparse_cases.operands(Case(bits, 8, M=1, N=16, B=MAX_COLUMNS)))
    lowest, B = -(1 << (bits - 1)), MAX_COLUMNS
    given[0][:, :B] = -128
    weight = torch.full((16, B), lowest, dtype=torch.int8)
    weight[:, 2::4] = weight[:, 3::4] = 0
    given[4] = sparse_fragments.pack(weight, bits)
    given[1], given[5] = torch.full((1,), 2.0**-16), torch.ones(16)
    y = int8_sparse_linear(*int8_cases.on(tuple(given), "cuda"))
    want = 128.0 * -lowest * int((weight[0] != 0).sum()) / 65536
    cases.assert_equal(y, torch.full((1, 16), want).to(BF16), "longest")


@pytest.mark.parametrize("N", [2000, 2001])
def test_offsets_beyond_32_bits(N: int) -> None:
    """More than 2^31 outputs: the last rows are right."""
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GB")
    case = Case(4, 8, M=1_100_000, N=N, B=100)
    last = sparse_cases.operands(replace(case, M=3))
    given = list(int8_cases.on(last, "cuda"))
    for i in range(4):
        whole = given[i].new_zeros(case.M, *given[i].shape[1:])
        whole[-3:] = given[i]
        given[i] = whole
    y = int8_sparse_linear(*given)
    assert y.numel() > 1 << 31
    cases.assert_equal(y[-3:], int8_sparse_linear(*last), "last rows")
    assert not y[:100].any()


def on_gpu(case: Case, seed: int = 0) -> tuple[Any, ...]:
    return int8_cases.on(sparse_cases.operands(case, seed), "cuda")


@pytest.mark.parametrize("M", [1, 300, 2048])
def test_repeats(M: int) -> None:
    given = on_gpu(replace(REPEATED, M=M))
    first = int8_sparse_linear(*given)
    for _ in range(20):
        assert torch.equal(int8_sparse_linear(*given), first)


@pytest.mark.parametrize("M", [1, 300])
def test_graph(M: int, poison: None) -> None:
    """Captured on some codes and replayed on others."""
    case = replace(REPEATED, M=M)
    _, *rest = on_gpu(case)
    tokens = [on_gpu(case, seed)[0] for seed in range(4)]
    cases.check_graph(lambda codes: int8_sparse_linear(codes, *rest), tokens[0], tokens[1:])


def test_unaligned_operands() -> None:
    """Codes, outliers and weights that start in the middle of a buffer, at addresses that TMA does not take."""
    given = list(on_gpu(REPEATED))
    expected = int8_sparse_linear(*given)
    for i in (0, 3, 4, 7):
        whole = torch.cat((given[i].new_zeros(1), given[i].flatten()))
        given[i] = whole[1:].view(given[i].shape)
    assert torch.equal(int8_sparse_linear(*given), expected)


def test_opcheck() -> None:
    torch.library.opcheck(int8_sparse_linear, on_gpu(Case(M=70, O=16, bias=True)))
