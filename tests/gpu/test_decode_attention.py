"""Attention of one new token on a Hopper GPU: every cut of the keys, repeats, a graph, launches beside each other."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import attention_cases
import pytest
import torch
from attention_cases import Case

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from bitwright.kernels.nvrtc import decode_attention
from bitwright.kernels.problem import HOPPER, NVRTC, cuda_features

if not {HOPPER, NVRTC} <= cuda_features():
    pytest.skip("needs a Hopper GPU and NVRTC", allow_module_level=True)

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
CASES = [
    Case(heads, kv_heads, D, S, rope, dtype)
    for heads, kv_heads, D, S in (
        (32, 32, 128, 544), (32, 8, 128, 2100), (64, 8, 128, 600), (12, 2, 64, 300), (7, 1, 128, 90), (5, 5, 64, 40),
    )
    for rope, dtype in ((True, BF16), (False, FP16))
]  # fmt: skip


def configuration(case: Case, splits: int | None = None) -> decode_attention.Config:
    c = decode_attention.choose(
        len(case.positions), case.heads, case.kv_heads, case.D, case.S, case.dtype, 132, rope=case.rope
    )
    return c if splits is None else replace(c, SPLITS=splits)


@pytest.mark.parametrize("splits", [None, 1, 2, 4, 8])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_its_twin(case: Case, splits: int | None, poison: None) -> None:
    attention_cases.check(partial(decode_attention.decode, config=configuration(case, splits)), case, "cuda")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_over_a_cache_that_has_all_keys(case: Case, poison: None) -> None:
    attention_cases.check_attend(decode_attention.attend, case, "cuda")


@pytest.mark.parametrize("splits", [1, 8])
def test_repeats_and_replays(splits: int, poison: None) -> None:
    """The same bits every time; in a graph several calls, each of which begins beside the one before."""
    case = Case(32, 8, S=2100)
    given, c = attention_cases.operands(case, "cuda"), configuration(case, splits)
    first = decode_attention.decode(*given, c)
    assert all(torch.equal(decode_attention.decode(*given, c), first) for _ in range(20))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [decode_attention.decode(*given, c) for _ in range(4)]
    for _ in range(10):
        for y in results:
            y.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(y, first) for y in results)
