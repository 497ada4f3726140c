"""The Triton kernels on a GPU: the whole matrix to the last bit, errors against cuBLAS's, repeats, graphs, tracing."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from bitwright.kernels import fragments
from bitwright.kernels.fragments import pack, stack
from bitwright.kernels.triton import experts, gemm
from bitwright.kernels.triton.config import Config
from bitwright.kernels.triton.dequantize import dequantize
from gpu import cases
from gpu.cases import Case

pytestmark = pytest.mark.gpu

EXACT = cases.matrix() + cases.shapes()
ONE_HOT = [
    Case(bits, 32 if dtype == torch.bfloat16 else None, False, dtype, N=130, K=256)
    for bits in cases.BITS
    for dtype in cases.DTYPES
] + [Case(4, 64, False, N=130, K=256, float_scales=True), Case(8, 64, False, torch.float16, K=256, float_scales=True)]
STACKS = [
    (Case(bits, group_size, bits in (3, 8), dtype, N=200, K=320), counts)
    for bits, group_size, dtype in (
        (4, 64, torch.bfloat16),
        (3, 32, torch.float16),
        (2, None, torch.bfloat16),
        (8, 128, torch.float16),
    )
    for counts in ((0, 1, 0, 7, 0), (300, 0, 17, 1, 129), (0, 0, 0), (33,))
]
DENSE = [
    Case(bits, group_size, symmetric, dtype, N=200, K=424)
    for bits in cases.BITS
    for group_size, symmetric, dtype in (
        (32, False, torch.bfloat16),
        (128, True, torch.float16),
        (None, False, torch.float16),
        (96, False, torch.bfloat16),
    )
]
ACCURACY = [Case(bits, 128, bits != 4, dtype, N=1024, K=4096) for bits in cases.BITS for dtype in cases.DTYPES]
SHARED_K = replace(ACCURACY[0], N=512)  # few tiles: several programs share the K of each


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Every kernel compiled once, in threads, because one by one takes minutes; what fails here fails again below."""
    work: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [(cases.check_exact, (gemm.linear, c)) for c in EXACT]
    work += [(cases.check_one_hot, (gemm.linear, c)) for c in ONE_HOT]
    work += [(cases.check_experts, (experts.linear, c, counts)) for c, counts in STACKS]
    work += [(check_dense, (c,)) for c in DENSE]
    work += [(cases.check_error, (gemm.linear, replace(c, M=M))) for c in ACCURACY for M in (1, 300)]

    def attempt(job: tuple[Callable[..., Any], tuple[Any, ...]]) -> None:
        with suppress(Exception):
            job[0](*job[1])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # or every one of the pool's threads starts a team of its own
    try:
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(attempt, work))
        torch.cuda.synchronize()
    finally:
        torch.set_num_threads(threads)


def check_dense(case: Case) -> None:
    weights = [cases.on(pack(cases.weight(case, seed=e, powers=False), case.dtype), "cuda") for e in range(3)]
    expected = [fragments.dequantize(w, case.dtype) for w in weights]
    cases.assert_equal(dequantize(weights[0], case.dtype), expected[0].cpu(), str(case))
    cases.assert_equal(dequantize(stack(weights), case.dtype), torch.stack(expected).cpu(), f"stack of {case}")


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_exact(case: Case, poison: None) -> None:
    cases.check_exact(gemm.linear, case)


@pytest.mark.parametrize("M", [16, 64, 256, 2048])
def test_exact_where_products_follow_each_other_fast(M: int) -> None:
    """Many steps on tiles of every size: weights that change while they are multiplied come out wrong only here."""
    cases.check_exact(gemm.linear, Case(4, 128, M=M, N=8192, K=8192))


@pytest.mark.parametrize("case", ONE_HOT, ids=str)
def test_one_hot(case: Case, poison: None) -> None:
    cases.check_one_hot(gemm.linear, case)


@pytest.mark.parametrize(("case", "counts"), STACKS, ids=str)
def test_experts(case: Case, counts: tuple[int, ...], poison: None) -> None:
    cases.check_experts(experts.linear, case, counts, beyond=3)


def test_experts_that_share_k(poison: None) -> None:
    tiles = Config(BN=128, BM=16, BK=128, warps=8, stages=3, split_k=4)
    case = Case(4, 64, symmetric=False, N=200, K=1000)
    cases.check_experts(lambda x, offsets, f: experts.linear(x, offsets, f, tiles), case, (0, 5, 40, 1))


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_dequantize(case: Case, poison: None) -> None:
    check_dense(case)


@pytest.mark.parametrize("M", [1, 300])
@pytest.mark.parametrize("case", ACCURACY, ids=str)
def test_error(case: Case, M: int) -> None:
    cases.check_error(gemm.linear, replace(case, M=M))
