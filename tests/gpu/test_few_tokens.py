"""The kernel for few tokens on a Hopper GPU: every grid to the last bit, tiles in any number of pieces, stacks of
experts, launches beside each other, and memory for sums that is zero again afterwards."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from bitwright.kernels import workspace
from bitwright.kernels.fragments import Fragments, dequantize, pack, random, stack
from bitwright.kernels.nvrtc import few_tokens
from bitwright.kernels.nvrtc.few_tokens import MOST_SLOTS, Config, choose, divide, slots, takes
from bitwright.kernels.problem import HOPPER, NVRTC, cuda_features
from gpu import cases
from gpu.cases import Case

if not {HOPPER, NVRTC} <= cuda_features():
    pytest.skip("needs a Hopper GPU and NVRTC", allow_module_level=True)

pytestmark = pytest.mark.gpu
PROCESSORS = torch.cuda.get_device_properties(0).multi_processor_count
BF16, FP16 = torch.bfloat16, torch.float16
TOKENS = (1, 5, 8, 9, 16)
MANY_OUTPUTS = 1 << 15  # from which on one team takes all columns


def fits(case: Case) -> bool:
    return not case.float_scales and takes(case.group_size or case.K, case.K)


MATRIX = [replace(c, M=TOKENS[(i + i // 20) % 5]) for i, c in enumerate(filter(fits, cases.matrix()))]
EXACT = [*MATRIX, *(replace(c, M=min(c.M, 16)) for c in cases.shapes() if fits(c))]
# Whole groups at the end of K and ragged ones, rows of tokens that TMA does not take, groups that need a shorter step.
EXACT += [
    Case(bits, group_size, symmetric=False, M=M, N=N, K=K, bias=M % 2 == 1)
    for bits, group_size, M, N, K in (
        (4, 128, 9, 203, 4093), (3, 32, 7, 1003, 1001), (2, 256, 16, 8200, 520), (8, 64, 2, 64, 9),
        (4, 384, 3, 130, 3000), (2, 384, 8, 72, 1152), (8, 640, 12, 72, 2000), (3, 128, 1, 1, 1),
        (4, None, 16, 20000, 512),
    )
]  # fmt: skip
EXACT = list(dict.fromkeys(EXACT))
# The same grids by one team, for as many tokens as the other did not have.
ONE_TEAM = [replace(c, M=TOKENS[(i + i // 20 + 3) % 5], K=840) for i, c in enumerate(MATRIX)]
ONE_TEAM += [replace(c, K=1088, N=129) for c in ONE_TEAM if c.group_size in (128, 256)][::5]
ONE_HOT = [
    Case(bits, 32 if dtype == BF16 else None, False, dtype, M=16, N=130, K=256)
    for bits in cases.BITS
    for dtype in cases.DTYPES
]
STACKS = [
    (Case(bits, group_size, bits in (3, 8), dtype, N=200, K=320), counts)
    for bits, group_size, dtype in ((4, 64, BF16), (8, 64, FP16), (3, 32, BF16), (2, 128, FP16))
    for counts in ((0, 1, 0, 7, 0), (300, 0, 17, 1, 129), (0, 0, 0), (33,), (1, 1, 1, 1), (8, 16, 9))
] + [
    (Case(4, 64, N=200, K=320), (0,) * 60 + (3,) + (0,) * 66 + (17,)),  # more experts than a warp has lanes
    (Case(4, 64, N=200, K=320), tuple(e % 3 for e in range(100))),
    (Case(4, 64, N=200, K=328), (5, 0, 40)),  # a ragged last group: the next row of scales is another expert's
    (Case(4, 64, N=136, K=328), (5, 0, 140)),  # the last tile takes bands of another expert
    (Case(3, 64, N=136, K=328), (700, 0, 800)),
    (Case(4, 64, N=200, K=332), (5, 0, 140)),  # rows of x that TMA cannot take as they are
    (Case(2, 384, False, N=72, K=1100), (2, 0, 11)),
    (Case(8, None, False, FP16, N=72, K=4104), (0, 2, 0, 0, 2)),  # few tiles, in many pieces
]
SETTLED = STACKS[::3]
ACCURACY = [Case(bits, 128, bits != 4, dtype, N=1024, K=4096) for bits in cases.BITS for dtype in cases.DTYPES]
SHARED_K = Case(4, 128, symmetric=False, M=5, N=512, K=4096)  # 8 tiles, in several pieces each
# Three tiles of two teams or two of one, 25 steps each.
LONG = [Case(4, 128, False, M=M, N=190, K=25 * 512 - 70, bias=M > 8) for M in (3, 16)]


def configuration(case: Case, teams: int | None = None, experts: int | None = None, settled: bool = False) -> Config:
    """What `choose` gives, or would for a weight of more or fewer outputs."""
    N = case.N if teams is None else MANY_OUTPUTS if teams == 1 else 1
    M = case.M if experts is None else -(-case.M // experts)
    c = choose(M, case.kind._replace(N=N), experts is not None, settled)
    assert teams in (None, c.TEAMS)
    return c


def of_stack(case: Case, counts: tuple[int, ...], beyond: int = 3) -> Case:
    return replace(case, M=sum(counts) + beyond)


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Every kernel compiled once, on all cores."""
    every = [configuration(case) for case in EXACT + ONE_HOT + [replace(c, M=M) for c in ACCURACY for M in (1, 16)]]
    every += [configuration(case, 1) for case in ONE_TEAM]
    every += [configuration(case, teams) for case in LONG for teams in (1, 2)]
    for case, counts in STACKS:
        every += [configuration(of_stack(case, counts), teams, len(counts)) for teams in (1, 2)]
    every += [
        configuration(of_stack(case, n), None, len(n), settled) for case, n in SETTLED for settled in (False, True)
    ]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(Config.cubin, dict.fromkeys(every)))


@pytest.fixture
def zero_again() -> Any:
    """Whatever a test launched on its stream, the memory for sums is what it was."""
    yield
    torch.cuda.synchronize()
    held = workspace.zeros(1, torch.device("cuda", torch.cuda.current_device()))
    left = int(held.count_nonzero())
    held.zero_()  # one failure is enough
    assert left == 0, f"{left} numbers are not zero"


# --- one weight


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_exact(case: Case, poison: None, zero_again: None) -> None:
    cases.check_exact(few_tokens.linear, case)


@pytest.mark.parametrize("case", ONE_TEAM, ids=str)
def test_exact_by_one_team(case: Case, poison: None, zero_again: None) -> None:
    cases.check_exact(partial(few_tokens.linear, config=configuration(case, 1)), case)


def test_the_two_kinds_of_tiles_are_both_chosen() -> None:
    assert configuration(replace(SHARED_K, N=MANY_OUTPUTS)).TEAMS == 1 and configuration(SHARED_K).TEAMS == 2
    cases.check_exact(few_tokens.linear, Case(4, 128, M=16, N=MANY_OUTPUTS + 40, K=128))


@pytest.mark.parametrize("teams", [1, 2])
@pytest.mark.parametrize("case", LONG, ids=str)
def test_tiles_in_any_number_of_pieces(
    case: Case, teams: int, poison: None, zero_again: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs that hold several tiles, end where tiles do or anywhere, and are single steps."""
    c = configuration(case, teams)
    steps, tiles = -(-case.K // c.step), -(-case.N // c.rows)
    qt, x = cases.weight(case), cases.integers(case.M, case.K, case.dtype)
    bias = torch.arange(case.N).to(case.dtype) if case.bias else None
    expected, f = cases.exact(x, qt, bias), cases.on(pack(qt, case.dtype), "cuda")
    given = x.cuda(), f, None if bias is None else bias.cuda(), c
    cut = set()
    for blocks in (1, 2, 3, 5, 7, tiles, 3 * tiles, 5 * tiles, 31, 64, 100, PROCESSORS, tiles * steps):
        runs, per = divide(tiles * steps, blocks)
        cut |= {(t * steps + steps - 1) // per - t * steps // per + 1 for t in range(tiles)}
        with monkeypatch.context() as patch:
            patch.setattr(few_tokens, "divide", lambda units, processors, forced=(runs, per): forced)
            cases.assert_equal(few_tokens.linear(*given), expected, f"{runs} runs of {per} steps")
    assert {1, 2, 3, 4, 5, steps} <= cut and steps >= 25, f"tiles were cut into {sorted(cut)} pieces"


def test_a_hundred_pieces(poison: None, zero_again: None) -> None:
    """One tile for a hundred processors, of one step each, and of two with a single last one."""
    assert divide(100, 132) == (100, 1) and divide(199, 132) == (100, 2)
    cases.check_exact(few_tokens.linear, Case(4, 128, M=1, N=64, K=100 * 512))
    cases.check_exact(few_tokens.linear, Case(4, None, False, M=16, N=3, K=199 * 512 - 3))


@pytest.mark.parametrize("M", [1, 16])
def test_sums_of_zero_are_exchanged_too(M: int, poison: None, zero_again: None) -> None:
    """Zeros in memory say that nobody was there: sums that are 0, in all pieces or in some, must not look like that."""
    qt = cases.weight(SHARED_K)
    f, x = cases.on(pack(qt, BF16), "cuda"), cases.integers(M, SHARED_K.K, BF16)
    assert divide(8 * 8, PROCESSORS)[1] < 8, "tiles have pieces"
    for kept in ((), (0,), (SHARED_K.K - 1,), (700, 3000), range(1024, 2048)):
        some = torch.zeros_like(x)
        some[:, list(kept)] = x[:, list(kept)]
        some[1:3] = 0
        for sign in (1, -1):
            cases.assert_equal(few_tokens.linear(sign * some.cuda(), f), cases.exact(sign * some, qt), f"{kept}")


def test_what_is_not_finite_stays_with_its_token(zero_again: None) -> None:
    f, x = a_weight(SHARED_K), an_input(replace(SHARED_K, M=16))
    expected = few_tokens.linear(x, f)
    x[3, 17], x[9, 4000], x[15] = float("nan"), float("inf"), float("nan")
    y, others = few_tokens.linear(x, f), [m for m in range(16) if m not in (3, 9, 15)]
    assert not y[[3, 9, 15]].isfinite().any()
    assert torch.equal(y[others], expected[others])


@pytest.mark.parametrize("case", ONE_HOT, ids=str)
def test_one_hot(case: Case, poison: None) -> None:
    def by_sixteens(x: Tensor, f: Fragments, bias: Tensor | None) -> Tensor:
        return torch.cat([few_tokens.linear(part.contiguous(), f, bias) for part in x.split(16)])

    cases.check_one_hot(by_sixteens, case)


@pytest.mark.parametrize("M", [1, 16])
@pytest.mark.parametrize("case", ACCURACY, ids=str)
def test_error_is_that_of_cublas(case: Case, M: int) -> None:
    cases.check_error(few_tokens.linear, replace(case, M=M))


@pytest.mark.parametrize("M", TOKENS)
@pytest.mark.parametrize("N", [64, 512, 5304])
def test_repeats(M: int, N: int, zero_again: None) -> None:
    cases.check_repeats(few_tokens.linear, replace(SHARED_K, M=M, N=N))


@pytest.mark.parametrize("M", [1, 16])
def test_other_pieces_are_near(M: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They add up in another order, and to nothing else; one order gives the same bits for any order in time."""
    f, x = a_weight(SHARED_K), an_input(replace(SHARED_K, M=M))
    exact = x.double() @ dequantize(f, BF16).double().t()
    for blocks in (1, 8, 13, 64):
        given = divide(64, blocks)
        monkeypatch.setattr(few_tokens, "divide", lambda units, processors, given=given: given)
        y = few_tokens.linear(x, f)
        assert cases.relative(y, exact) < 3e-3
        assert all(torch.equal(few_tokens.linear(x, f), y) for _ in range(5))


@pytest.mark.parametrize("M", [1, 3, 16])
@pytest.mark.parametrize("K", [4096, 4093])
def test_an_odd_address_of_tokens(M: int, K: int) -> None:
    f = a_weight(replace(SHARED_K, K=K))
    whole = torch.randn(M * K + 1, device="cuda").to(BF16)
    x = whole[1:].view(M, K)
    assert torch.equal(few_tokens.linear(x, f), few_tokens.linear(x.clone(), f))


# --- experts


@pytest.mark.parametrize("teams", [1, 2])
@pytest.mark.parametrize(("case", "counts"), STACKS, ids=str)
def test_experts(case: Case, counts: tuple[int, ...], teams: int, poison: None, zero_again: None) -> None:
    whole = of_stack(case, counts)
    assert slots(whole.M, len(counts)) <= MOST_SLOTS, "more than the kernel takes"
    experts = partial(few_tokens.experts, config=configuration(whole, teams, len(counts)))
    cases.check_experts(experts, case, counts, beyond=3)


@pytest.mark.parametrize(("case", "counts"), SETTLED, ids=str)
def test_settled_experts(case: Case, counts: tuple[int, ...], poison: None, zero_again: None) -> None:
    """As they are called: what waits for the offsets, then what need not."""

    def second(x: Tensor, offsets: Tensor, f: Fragments) -> Tensor:
        few_tokens.experts(x, offsets, f)
        return few_tokens.experts(x, offsets, f, settled=True)

    cases.check_experts(second, case, counts, beyond=3)


def test_experts_repeat(zero_again: None) -> None:
    case = replace(SHARED_K, N=200)
    f = cases.on(stack([pack(cases.weight(case, seed=e, powers=False), BF16) for e in range(8)]), "cuda")
    for bounds in ([0, 0, 1, 1, 1, 2, 2, 2, 2], [0, 9, 9, 9, 40, 40, 41, 60, 60]):
        offsets, x = torch.tensor(bounds, dtype=torch.int32, device="cuda"), an_input(replace(case, M=bounds[-1]))
        first = few_tokens.experts(x, offsets, f)
        assert first.isfinite().all()
        assert all(torch.equal(few_tokens.experts(x, offsets, f, settled=s), first) for s in (False, True) * 10)


# --- launches that begin before the one before has ended


@pytest.mark.parametrize("M", [1, 16])
def test_a_graph(M: int, poison: None) -> None:
    f = a_weight(SHARED_K)
    x = [an_input(replace(SHARED_K, M=M)) for _ in range(4)]
    cases.check_graph(partial(few_tokens.linear, fragments=f), x[0], x[1:])


@pytest.mark.parametrize(
    ("M", "N", "K"),
    [(1, 4096, 4096), (16, 22016, 4096), (1, 64, 12288), (8, 5120, 5120), (1, 36864, 4096), (3, 328, 200)],
)
def test_overlapping_launches_write_every_tile(M: int, N: int, K: int, zero_again: None) -> None:
    """A chain of launches in a graph and without one, each fed with the one before, beside which it begins; all results
    are kept, and poisoned before each replay."""
    there, back = ([random(*shape, 4, None, True, BF16, "cuda") for _ in range(2)] for shape in ((N, K), (K, N)))
    x = torch.randn(M, K, device="cuda").to(BF16)
    torch.cuda.synchronize()

    def chain(apart: bool) -> list[Tensor]:
        results = [x]
        for i in range(12):
            results.append(few_tokens.linear(results[-1], (back if i % 2 else there)[i // 2 % 2]))
            if apart:
                torch.cuda.synchronize()
        return results[1:]

    expected = chain(apart=True)
    assert expected[-1].isfinite().all() and expected[-1].abs().max() > 0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = chain(apart=False)
    for _ in range(20):
        for y in results:
            y.fill_(float("nan"))
        graph.replay()
        for i, (y, right) in enumerate(zip(results, expected, strict=True)):
            assert torch.equal(y, right), f"launch {i}: {int(y.isnan().sum())} of {y.numel()} values were not written"
        assert all(map(torch.equal, chain(apart=False), expected))


def test_two_streams() -> None:
    """Launches beside each other on two streams, both with pieces: memory for sums is not shared."""
    f, x = a_weight(SHARED_K), [an_input(SHARED_K) for _ in range(2)]
    expected = [few_tokens.linear(one, f) for one in x]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in x], []
    for _ in range(50):
        for one, stream in zip(x, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(few_tokens.linear(one, f))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected[i % 2]) for i, y in enumerate(found))


@pytest.mark.skipif(torch.cuda.get_device_properties(0).total_memory < 24 << 30, reason="needs 24 GB")
def test_a_weight_beyond_2_gib() -> None:
    cases.check_large_weight(few_tokens.linear, 3)


def test_an_unloaded_kernel_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"not loaded yet.*run the linear once"):
        few_tokens.kernel(replace(configuration(SHARED_K), STAGES=2), 0)


def a_weight(case: Case) -> Fragments:
    return cases.on(pack(cases.weight(case, powers=False), case.dtype), "cuda")


def an_input(case: Case) -> Tensor:
    return torch.randn(case.M, case.K, device="cuda").to(case.dtype)
