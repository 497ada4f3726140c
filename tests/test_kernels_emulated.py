"""The kernels in CUDA C++, thread by thread on the CPU: to the last bit, in any order of threads and copies, and what
happens when a kernel forgets something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import attention_cases
import pytest
import sparse_cases
import torch
from emulation import emulator
from gpu import cases, int8_cases
from gpu.cases import Case
from torch import Tensor

pytest.importorskip("triton")
if reason := emulator.missing():
    pytest.skip(reason, allow_module_level=True)

from bitwright.kernels.fragments import Fragments
from bitwright.kernels.nvrtc import decode_attention, few_tokens, launch, many_tokens
from bitwright.kernels.nvrtc.many_config import choose, divide, tile
from bitwright.kernels.sparse_ops import int8_sparse_linear

BF16, FP16 = torch.bfloat16, torch.float16
PROCESSORS = 8
GRIDS = [c for i, c in enumerate(cases.matrix()) if i % 3 == i // 20 % 3]
# ROWS, TOKENS, CLUSTER, STAGES, BAND, pieces
TILES = [
    (128, 64, 1, None, 16, 1), (128, 64, 2, 2, 3, 2), (128, 80, 2, None, 1, 3), (128, 128, 4, 3, 2, 4),
    (128, 256, 2, 2, 2, 1), (256, 64, 2, 2, 1, 2), (256, 112, 1, 2, 16, 1), (256, 160, 2, 2, 16, 3),
]  # fmt: skip
STACKS = [
    (Case(4, 64, N=200, K=320), (0, 1, 0, 7, 0), 1, False),
    (Case(8, 64, dtype=FP16, N=200, K=320), (30, 0, 17, 1, 12), 2, False),
    (Case(3, 32, False, N=136, K=328), (5, 0, 40), 2, True),
    (Case(2, 384, False, N=72, K=1100), (2, 0, 11), 1, True),
    (Case(4, 64, N=72, K=100), (0,) * 60 + (3,) + (0,) * 66 + (17,), 2, False),
]
# ROWS, TOKENS, CLUSTER, STAGES, BAND; bits, activation bits, outliers, dtype
SPARSE = [
    ((256, 64, 1, 2, 16), 4, 4, 0, BF16), ((256, 128, 2, None, 2), 4, 8, 40, FP16),
    ((128, 64, 2, 2, 2), 8, 8, 40, BF16), ((256, 160, 2, 3, 16), 4, 4, 16, BF16),
    ((128, 64, 1, None, 1), 8, 8, 0, FP16),
]  # fmt: skip


def on_emulator(
    run: Callable[..., Tensor], launcher: Any = few_tokens, settled: bool = False, **how: Any
) -> Callable[..., Tensor]:
    """`run(x, ..., fragments, ...)` as it would run on a GPU, memory from torch.empty poisoned, and so offsets (unless
    they are settled) and bias until a thread has waited for them; what is zeroed for sums is zero again."""

    def linear(*given: Any) -> Tensor:
        f = next(g for g in given if isinstance(g, Fragments))
        held: list[Tensor] = []

        def zeros(count: int, device: torch.device) -> Tensor:
            held.append(torch.zeros(count, dtype=torch.int32))
            return held[-1]

        with pytest.MonkeyPatch.context() as patch, cases.poisoned():
            patch.setattr(launcher, "zeros", zeros)
            late = [g for g in given[1:] if isinstance(g, Tensor) and not settled]
            with emulator.emulated(launcher, f.tensors, processors=PROCESSORS, late=late, **how):
                y = run(*given)
        assert held and not any(t.count_nonzero() for t in held), "memory for sums is not zero again"
        return y

    return linear


# --- few tokens


@pytest.mark.parametrize("case", GRIDS, ids=str)
def test_few_tokens(case: Case) -> None:
    i = GRIDS.index(case)
    cases.check_exact(on_emulator(few_tokens.linear, seed=i), replace(case, M=(1, 5, 8, 9, 16)[i % 5]), "cpu")


@pytest.mark.parametrize(("M", "teams"), [(3, 1), (16, 2)])
def test_few_tokens_in_any_number_of_pieces(M: int, teams: int) -> None:
    case = Case(4, 128, False, M=M, N=190, K=9 * 512 - 70, bias=M > 8)
    N = 1 << 15 if teams == 1 else 1
    c = few_tokens.choose(M, case.kind._replace(N=N))
    assert teams == c.TEAMS
    steps, tiles = -(-case.K // c.step), -(-case.N // c.rows)
    for blocks in (1, 2, 3, 5, 7, 11, tiles * steps):
        with pytest.MonkeyPatch.context() as patch:
            forced = few_tokens.divide(tiles * steps, blocks)
            patch.setattr(few_tokens, "divide", lambda units, processors, forced=forced: forced)
            cases.check_exact(on_emulator(partial(few_tokens.linear, config=c), seed=blocks), case, "cpu")


@pytest.mark.parametrize(("case", "counts", "teams", "settled"), STACKS, ids=str)
def test_experts(case: Case, counts: tuple[int, ...], teams: int, settled: bool) -> None:
    N, even = 1 << 15 if teams == 1 else 1, -(-(sum(counts) + 3) // len(counts))
    c = few_tokens.choose(even, case.kind._replace(N=N), experts=True, settled=settled)
    experts = partial(few_tokens.experts, settled=settled, config=c)
    for seed in range(3):
        cases.check_experts(on_emulator(experts, settled=settled, seed=seed), case, counts, beyond=3, device="cpu")


def test_sums_of_zero_are_exchanged_too() -> None:
    """Zeros in memory say that nobody was there: sums that are 0 must not look like that."""
    case = Case(4, 128, N=130, K=4096)
    qt, x = cases.weight(case), cases.integers(5, case.K, BF16)
    x[1:3] = 0
    x[:, 700:3500] = 0
    f = cases.pack(qt, BF16)
    for seed in range(4):
        cases.assert_equal(on_emulator(few_tokens.linear, seed=seed)(x, f), cases.exact(x, qt), f"seed {seed}")


# --- many tokens


@pytest.mark.parametrize("case", GRIDS[1::2], ids=str)
def test_many_tokens(case: Case) -> None:
    """Groups that cut no step; rows of results that TMA does not take, too."""
    if case.group_size not in (None, 32) and case.group_size % 64:
        pytest.skip("groups that it does not take")
    i = GRIDS.index(case)
    linear = on_emulator(many_tokens.linear, many_tokens, seed=i)
    cases.check_exact(linear, replace(case, M=(70, 17, 130)[i % 3], N=(200, 203)[i % 4 == 1]), "cpu")


@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_every_tile_of_many_tokens(tiles: tuple[int, int, int, int | None, int, int]) -> None:
    ROWS, TOKENS, CLUSTER, STAGES, BAND, cuts = tiles
    case = Case(4, 64, False, M=2 * TOKENS + 7, N=3 * ROWS + 40, K=500, bias=True)
    c = choose(case.M, case.kind, PROCESSORS)
    c = replace(tile(c, ROWS, TOKENS, CLUSTER), STAGES=STAGES, BAND=BAND)
    if cuts > 1:
        assert divide(case.M, case.N, case.K, c, PROCESSORS, cuts).cuts == cuts, "nothing is in pieces"
    for seed in range(2):
        linear = partial(many_tokens.linear, config=c, cuts=cuts)
        cases.check_exact(on_emulator(linear, many_tokens, seed=seed), case, "cpu")


# --- 2:4 codes


@pytest.mark.parametrize(("tiles", "bits", "activation_bits", "O", "dtype"), SPARSE, ids=str)
def test_sparse(
    tiles: tuple[int, int, int, int | None, int], bits: int, activation_bits: int, O: int, dtype: torch.dtype
) -> None:
    ROWS, TOKENS, CLUSTER, STAGES, BAND = tiles
    for M, N in ((TOKENS + 30, 2 * ROWS + 44), (9, 203)):
        case = int8_cases.Case(bits, activation_bits, M=M, N=N, B=420, O=O, bias=O > 0, dtype=dtype)
        given = sparse_cases.operands(case)
        c = launch.choose(M, N, -(-O // 16) * 16, bits, dtype if case.bias else None, dtype, PROCESSORS)
        c = replace(c, ROWS=ROWS, TOKENS=TOKENS, CLUSTER=CLUSTER, STAGES=STAGES, BAND=BAND)
        for seed in range(2):
            with cases.poisoned(), emulator.emulated(launch, (), processors=PROCESSORS, seed=seed):
                y = launch.linear(*given, config=c)
            int8_cases.compare(y, int8_sparse_linear(*given), case)


# --- attention


ATTENTION = [
    (attention_cases.Case(2, 2, S=100), 1), (attention_cases.Case(8, 2, dtype=FP16), 4),
    (attention_cases.Case(16, 2, S=520), 8), (attention_cases.Case(8, 1, D=64, S=600, rope=False), 2),
    (attention_cases.Case(7, 1, S=90), 8), (attention_cases.Case(12, 2, D=64, S=400, dtype=FP16), 2),
]  # fmt: skip


def attend(case: attention_cases.Case, splits: int, seed: int, **how: Any) -> Callable[..., Tensor]:
    """On the emulator: the caches, positions and tables were there before."""
    c = decode_attention.choose(
        len(case.positions), case.heads, case.kv_heads, case.D, case.S, case.dtype, PROCESSORS, rope=case.rope
    )

    def decode(qkv: Tensor, *given: Tensor | None) -> Tensor:
        early = [t for t in given if t is not None]
        with cases.poisoned(), emulator.emulated(decode_attention, early, PROCESSORS, seed, **how):
            return decode_attention.decode(qkv, *given, replace(c, SPLITS=splits))

    return decode


@pytest.mark.parametrize(("case", "splits"), ATTENTION, ids=str)
def test_decode_attention(case: attention_cases.Case, splits: int) -> None:
    for seed in range(3):
        attention_cases.check(attend(case, splits, seed), case)


@pytest.mark.parametrize(("case", "splits"), ATTENTION[1::2], ids=str)
def test_attention_over_a_cache_that_has_all_keys(case: attention_cases.Case, splits: int) -> None:
    def attend(queries: Tensor, keys: Tensor, *given: Any) -> Tensor:
        c = decode_attention.choose(
            *queries.shape[:2], *keys.shape[1:2], case.D, case.S, case.dtype, PROCESSORS, fresh=False, rope=False
        )
        with cases.poisoned(), emulator.emulated(decode_attention, (), PROCESSORS):
            return decode_attention.attend(queries, keys, *given, replace(c, SPLITS=splits))

    attention_cases.check_attend(attend, case)


@pytest.mark.parametrize(
    ("old", "new", "seen"),
    [
        ("barrier_wait(own_full + 8 * ring.stage, ring.parity);", "", "not close|NaN|more arrive"),
        ("barrier_wait(own_empty + 8 * ring.stage, ring.parity);", "", "not close|more arrive|deadlock"),
        ("    cluster_wait();", "", "may not have begun|initialized"),
        ("barrier_wait(sent, 0);", "", "not close|NaN|has ended"),
        ("r.sum.v[i] *= fade;", "", "not close"),
        ("if (first + 4 * i + quarter >= end) continue;", "", "NaN|not close"),
    ],
)
def test_faults_of_attention_are_seen(old: str, new: str, seen: str) -> None:
    case, splits = attention_cases.Case(8, 1, S=700), 2
    with pytest.raises(AssertionError, match=f"(?i){seen}"):
        for seed in range(12):
            attention_cases.check(attend(case, splits, seed, change=(old, new)), case)


# --- faults


FEW = Case(4, 128, False, M=9, N=190, K=2100, bias=True)
MANY = Case(4, 64, False, M=300, N=304, K=500, bias=True)
PIECES = Case(4, 64, False, M=60, N=100, K=300, bias=True)  # one tile
FAULTS = [
    ("few", "* grid.scale[i / 2]", "", "differ"),
    ("few", "low, right[0], right[1], part[0][e]", "low, right[1], right[0], part[0][e]", "differ"),
    ("few", "barrier_wait(full + 8 * ring.stage, ring.parity);", "", "differ|has ended"),
    ("few", "barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);", "", "differ|more arrive"),
    ("few", "    wait_for_launches();\n    allow", "    allow", "without waiting"),
    ("few", "bits == 0 ? 0x80000000u : bits", "bits", "differ|not zero"),
    ("few", "at[32 * f] = {0, 0, 0, 0};", "", "not zero"),
    ("few", "named_sync(1, 32 * WARPS);", "", "differ"),
    ("few", "barrier_arrive(empty", "(void)(empty", "deadlock"),
    ("few", "TOKEN_BYTES + BANDS * (bytes", "16 + TOKEN_BYTES + BANDS * (bytes", "deadlock"),
    ("few", "min(c.tile * BANDS + b, p.bands - 1)", "c.tile * BANDS + b", "what is no weight"),
    ("many", "multiply_pairs(a[i], step.scale[b][group][i % 2])", "a[i]", "differ"),
    ("many", "products_wait<0>();", "", "differ|sums that are gone|before its products"),
    ("many", "read_block<0>(step, own, next.stage);", "", "differ"),
    ("many", "if (++c.phase == p.group_steps)", "if (false)", "differ"),
    ("many", "if (part == 0 && !begins) give_back(m.empty, ring.before());", "", "deadlock"),
    ("many", "if (last) *counter = 0;", "", "not zero"),
    ("many", "if (CLUSTER > 1) cluster_sync_barriers();", "", "initialized"),
    ("many", "if (threadIdx.x % 128 == 0) wait_taken();\n        named_sync", "named_sync", "differ"),
    ("many", "    if (CLUSTER > 1) cluster_sync();", "", "has ended"),
    ("pieces", "fence_gpu();\n    named_sync(1 + group, 128);", "", "differ"),
    ("experts", "if (!SETTLED) wait_for_launches();", "", "differ|number|deadlock"),
    ("sparse", "barrier_wait(full + 8 * ring.stage, ring.parity);", "", "differ|more arrive"),
    ("sparse", "if (k > 0) give_back(empty, ring.before());", "", "deadlock"),
    ("sparse", "products_wait<0>();", "", "differ|sums that are gone|before its products"),
    ("sparse", "- zero * row_sum", "", "differ"),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "old", "new", "seen"), FAULTS, ids=[f"{k}-{old}" for k, old, _, _ in FAULTS])
def test_faults_are_seen(kernel: str, old: str, new: str, seen: str) -> None:
    """What a line is there for: without it the result differs for some order of threads, or none comes."""
    with pytest.raises(AssertionError, match=seen):
        for seed in range(80):
            check_in_two_stages(kernel, seed, (old, new))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kernel", ["few", "experts", "many", "pieces", "sparse"])
def test_what_faults_are_taken_from_is_right(kernel: str, seed: int) -> None:
    check_in_two_stages(kernel, seed)


def check_in_two_stages(kernel: str, seed: int, change: tuple[str, str] | None = None) -> None:
    """What comes round often, and in pieces."""
    how: dict[str, Any] = {"seed": seed, "change": change}
    if kernel == "many":
        c = replace(tile(choose(MANY.M, MANY.kind, PROCESSORS), 128, 128, 2), STAGES=2)
        linear = partial(many_tokens.linear, config=c, cuts=2)
        cases.check_exact(on_emulator(linear, many_tokens, **how), MANY, "cpu")
    elif kernel == "pieces":
        c = replace(tile(choose(PIECES.M, PIECES.kind, PROCESSORS), 128, 64, 1), STAGES=2)
        linear = partial(many_tokens.linear, config=c, cuts=2)
        cases.check_exact(on_emulator(linear, many_tokens, **how), PIECES, "cpu")
    elif kernel == "sparse":
        case = int8_cases.Case(4, 4, M=150, N=600, B=1000, O=40, bias=True)
        given = sparse_cases.operands(case)
        tiles = launch.choose(case.M, case.N, 48, 4, case.dtype, case.dtype, PROCESSORS)
        c = replace(tiles, ROWS=256, TOKENS=64, CLUSTER=2, STAGES=2)
        with cases.poisoned(), emulator.emulated(launch, (), PROCESSORS, **how):
            y = launch.linear(*given, config=c)
        int8_cases.compare(y, int8_sparse_linear(*given), case)
    elif kernel == "experts":
        case, counts, *_ = STACKS[0]
        cases.check_experts(on_emulator(few_tokens.experts, **how), case, counts, beyond=3, device="cpu")
    else:
        of_teams = [few_tokens.choose(FEW.M, FEW.kind._replace(N=N)) for N in (1, 1 << 15)]
        assert [c.TEAMS for c in of_teams] == [2, 1]
        for c in of_teams:
            run = partial(few_tokens.linear, config=replace(c, STAGES=2))
            cases.check_exact(on_emulator(run, **how), FEW, "cpu")
