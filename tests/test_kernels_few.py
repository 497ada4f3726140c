"""The kernel for few tokens without a GPU: steps, division of work, when it runs, and what it compiles to."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from importlib import import_module
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bitwright.kernels.fragments import Fragments, Kind, random
from bitwright.kernels.nvrtc import compile as nvrtc

pytest.importorskip("triton")

from bitwright.kernels.nvrtc import few_tokens
from bitwright.kernels.nvrtc.few_tokens import MOST_SLOTS, MOST_TOKENS, Config, choose, divide, slots, takes

BF16, FP16 = torch.bfloat16, torch.float16
BITS, GROUPS = (2, 3, 4, 8), (32, 64, 128, 256, 384, None)
PROCESSOR, BLOCK, RESERVED = 228 << 10, 227 << 10, 1 << 10  # bytes of shared memory: of all blocks, of one, beside each


def chosen(M: int, N: int, K: int, **changes: Any) -> Config:
    asked: dict[str, Any] = {"bits": 4, "group_size": 128, "dtype": BF16, "asymmetric": False, "bias": False} | changes
    asked["group_size"] = K if asked["group_size"] is None else asked["group_size"]
    how = {name: asked.pop(name) for name in ("experts", "settled") if name in asked}
    return choose(M, Kind(N, K, **asked), **how)


# --- choice


@settings(max_examples=400, deadline=None)
@given(
    M=st.integers(1, 300), N=st.integers(1, 70000), K=st.integers(1, 30000), bits=st.sampled_from(BITS),
    group_size=st.one_of(st.sampled_from([32, 64]), st.integers(1, 40).map(lambda n: 128 * n), st.none()),
    dtype=st.sampled_from([BF16, FP16]), asymmetric=st.booleans(), bias=st.booleans(), experts=st.booleans(),
    settled=st.booleans(),
)  # fmt: skip
def test_a_step_cuts_no_group_and_two_blocks_do_not_fit(
    M: int, N: int, K: int, bits: int, group_size: int | None, dtype: torch.dtype, asymmetric: bool, bias: bool,
    experts: bool, settled: bool,
) -> None:  # fmt: skip
    c = chosen(
        M, N, K, bits=bits, group_size=group_size, dtype=dtype, asymmetric=asymmetric, bias=bias, experts=experts,
        settled=settled,
    )  # fmt: skip
    assert takes(K if group_size is None else group_size, K)
    asked = bits, dtype == FP16, asymmetric, bias, experts, settled
    assert asked == (c.BITS, c.FLOAT16, c.ASYM, c.BIAS, c.EXPERTS, c.SETTLED)
    assert min(M, MOST_TOKENS) <= c.TOKENS in (8, 16)
    # What the kernel asserts: see few_tokens.cu.
    assert c.rows % 64 == 0 and c.rows <= 256 and c.COLUMNS % c.TEAMS == 0
    width, share = c.step // c.groups, c.step // c.TEAMS
    assert width * c.groups == c.step and (share % width == 0 or width % share == 0)
    if c.GROUP == 0:
        assert (group_size is None or group_size >= K) and c.groups == 1
    else:
        assert group_size == c.GROUP < K
        for begin in range(0, K, 32):  # the scale that a product of 32 columns gets
            step, column = divmod(begin, c.step)
            first = step * c.groups if c.step >= c.GROUP else step * c.step // c.GROUP
            assert first + column // width == begin // c.GROUP == (begin + 31) // c.GROUP
    assert c.stages >= 2 and c.stage_bytes % 1024 == 0, "the swizzle counts from a multiple of 1 KiB"
    assert c.shared <= few_tokens.SHARED_MEMORY < BLOCK
    assert 2 * (c.shared + RESERVED) > PROCESSOR, "two blocks of a launch would share a processor"


@settings(max_examples=100, deadline=None)
@given(group_size=st.one_of(st.integers(1, 3000), st.integers(1, 90).map(lambda n: 32 * n)), K=st.integers(1, 3000))
def test_groups_that_are_refused_would_be_cut(group_size: int, K: int) -> None:
    """A step holds whole column blocks, one for each of two teams at least."""
    assume(group_size < K)
    shorter = [64 * columns for columns in (2, 4, 8, 16)]
    fits = [s for s in shorter if s % group_size == 0 or group_size % s == 0]
    assert takes(group_size, K) == (group_size % 32 == 0 and bool(fits))


def test_many_outputs_are_for_one_team() -> None:
    assert (chosen(1, 4096, 4096).TEAMS, chosen(1, 57344, 8192).TEAMS) == (2, 1)
    assert (chosen(1, 4096, 4096).rows, chosen(1, 57344, 8192).rows) == (64, 128)
    assert (chosen(8, 4096, 4096).TOKENS, chosen(9, 4096, 4096).TOKENS, chosen(90, 64, 64).TOKENS) == (8, 16, 16)
    assert replace(chosen(1, 4096, 4096), STAGES=2).stages == 2


# --- division


@settings(max_examples=200, deadline=None)
@given(units=st.integers(1, 100_000), processors=st.integers(1, 200))
def test_every_step_is_in_one_run(units: int, processors: int) -> None:
    blocks, per = divide(units, processors)
    runs = [range(b * per, min((b + 1) * per, units)) for b in range(blocks)]
    assert 0 < blocks <= processors
    assert runs[0].start == 0 and runs[-1].stop == units
    assert all(a.stop == b.start for a, b in pairwise(runs))
    assert {len(run) for run in runs[:-1]} <= {per} and 0 < len(runs[-1]) <= per
    assert per == -(-units // processors), "nobody has more to do than must be"


def test_runs_in_numbers() -> None:
    assert divide(64, 132) == (64, 1) and divide(132, 132) == (132, 1) and divide(133, 132) == (67, 2)
    assert divide(64 * 8, 132) == (128, 4) and divide(1, 1) == (1, 1)


@settings(max_examples=200, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=60),
    beyond=st.integers(0, 9),
    tokens=st.sampled_from([8, 16]),
)
def test_there_is_room_for_every_slot(counts: list[int], beyond: int, tokens: int) -> None:
    assert sum(-(-count // tokens) for count in counts) <= slots(sum(counts) + beyond, len(counts))


def test_slots_are_no_more_than_needed() -> None:
    assert slots(4, 128) == 4 and slots(1, 1) == 1, "an expert has a row at least"
    assert slots(8 * 5 + 3, 3) == 5 + 3 == sum(-(-count // 8) for count in (9, 9, 25))


# --- when it runs


def a_weight(group_size: int | None, K: int, experts: int | None = None) -> Fragments:
    return random(64, K, 4, group_size, True, BF16, "cpu", experts)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that `hopper` called, which do nothing."""
    names: list[str] = []
    for name in ("nvrtc.few_tokens", "nvrtc.many_tokens", "gluon.gemm"):
        module = import_module(f"bitwright.kernels.{name}")
        for function in ("linear", "experts"):
            monkeypatch.setattr(module, function, lambda *given, n=name, **more: names.append(n), raising=False)
    return names


def test_few_tokens_are_the_business_of_this_kernel(called: list[str]) -> None:
    from bitwright.kernels import hopper

    few = "nvrtc.few_tokens"
    for group_size, K, M, own in (
        (128, 512, 1, True), (128, 512, 16, True), (128, 512, 17, False), (None, 512, 16, True), (192, 576, 1, False),
        (192, 576, 16, False), (192, 128, 16, True), (384, 1152, 3, True), (320, 640, 3, False), (32, 64, 8, True),
    ):  # fmt: skip
        hopper.linear(torch.zeros(M, K, dtype=BF16), a_weight(group_size, K))
        assert (called.pop() == few) == own and not called, (group_size, K, M)
    for N, bits, own in ((57344, 4, True), (65536, 4, False), (65536, 3, True)):  # of 8192 columns
        huge = replace(a_weight(128, 512), N=N, K=8192, bits=bits)
        hopper.linear(torch.zeros(1, 8192, dtype=BF16), huge)
        assert (called.pop() == few) == own, (N, bits)
    stack = a_weight(64, 128, 5)
    for T, f, own in ((1, stack, True), (4, stack, True), (64, stack, False), (1, a_weight(192, 384, 5), False)):
        for settled in (False, True):
            offsets = torch.zeros(6, dtype=torch.int32)
            hopper.experts(torch.zeros(T, f.K, dtype=BF16), offsets, f, settled=settled)
            assert (called.pop() == few) == own and not called, (T, f.group_size)
            assert not own or slots(T, 5) <= MOST_SLOTS


# --- the kernel


def compiled() -> list[Config]:
    """Every width of codes with every group, in turn with and without zero points, for either dtype, few and fewer
    tokens, either kind of tile, a weight and a stack; and the hot ones of both kinds."""
    found = []
    for i, (bits, group_size) in enumerate((bits, group_size) for bits in BITS for group_size in GROUPS):
        for teams in (1, 2):
            turn = i + i // len(GROUPS) + (teams == 1)
            found.append(
                chosen(
                    16 if turn % 3 else 8,
                    4096 if teams == 2 else 1 << 16,
                    6144,
                    bits=bits,
                    group_size=group_size,
                    dtype=FP16 if turn % 4 > 1 else BF16,
                    asymmetric=turn % 2 == 1,
                    bias=turn % 5 < 2,
                    experts=turn % 5 > 2,
                    settled=turn % 5 == 4,
                )
            )
    hot = [chosen(M, N, 4096, asymmetric=asymmetric) for M in (1, 16) for N in (4096, 1 << 16) for asymmetric in (0, 1)]
    # What needs the most registers and room.
    wide = [
        chosen(16, N, 4096, bits=b, group_size=32, asymmetric=True, experts=True) for b in (2, 3) for N in (1, 1 << 16)
    ]
    return list(dict.fromkeys([*found, *hot, *wide]))


def test_what_is_compiled_here_covers_each_side() -> None:
    for name in ("FLOAT16", "ASYM", "BIAS", "EXPERTS", "TOKENS", "TEAMS"):
        seen = Counter((c.BITS, getattr(c, name)) for c in compiled())
        assert len(seen) == 2 * len(BITS), f"{name}: {seen}"
    assert {c.SETTLED for c in compiled()} == {0, 1}
    assert {(c.BITS, c.GROUP) for c in compiled()} >= {(b, g or 0) for b in BITS for g in GROUPS}


needs_nvrtc = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))


@needs_nvrtc
@pytest.mark.parametrize("c", compiled(), ids=str)
def test_compiles_for_hopper(c: Config, tmp_path: Path) -> None:
    sass = pytest.importorskip("sass")
    cubin, said = c.cubin("--ptxas-options=-v")
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said, said
    assert "warning" not in said.lower(), said
    assert "Loss" not in said and "serialized" not in said, said
    check_code(sass.disassembled(cubin, tmp_path), c)


def check_code(code: str, c: Config) -> None:
    """What a step costs, and what it must not."""
    kind = "" if c.FLOAT16 else r"\.BF16"
    products = len(re.findall(rf"HMMA\.16816\.F32{kind} ", code))
    assert products == code.count("HMMA.") == 4 * c.COLUMNS // c.TEAMS * c.TOKENS // 8, "a step is unrolled, and once"
    assert not re.search(r"\b(LDL|STL)\b", code)
    # Weights: two ways to ask for them, ahead and in turn; tokens, scales and zero points by boxes.
    assert "UBLKCP" in code and "UTMALDG.2D" in code
    # A loop over threads stands around each of these where the compiler does not know that only one asks.
    assert "BRA.U.ANY" not in code, "what TMA is given is not in uniform registers"
    assert not re.search(r"MEMBAR\.\w+\.(GPU|SYS)", code) and "CCTL.IVALL" not in code, "a fence of all memory"
    exchanges = re.findall(r"\bATOMG\.E\.EXCH\.128", code)
    assert len(exchanges) == len(re.findall(r"\bATOM", code)) == c.TOKENS // 8
    # The launches before this one are waited for once, behind the first weights; and for experts' offsets.
    assert code.count("ACQBULK") == (2 if c.EXPERTS and not c.SETTLED else 1) and "PREEXIT" in code
    assert code.index("UBLKCP") < code.rindex("ACQBULK")


@needs_nvrtc
def test_a_thread_that_is_not_known_to_be_alone_is_found(tmp_path: Path) -> None:
    """The check above on code that is as slow as it looks for."""
    sass = pytest.importorskip("sass")
    c = chosen(16, 4096, 4096)
    source = text("few_tokens.cu").replace("elected()", "(threadIdx.x % 32 == 0)")
    source = source.replace("warp_number() == WARPS", "threadIdx.x / 32 == WARPS")
    code = sass.disassembled(built(source, c), tmp_path)
    assert "UBLKCP" in code
    with pytest.raises(AssertionError, match="not in uniform registers"):
        check_code(code, c)


@needs_nvrtc
@pytest.mark.parametrize("c", compiled()[::6], ids=str)
def test_the_launcher_and_the_kernel_count_the_same_bytes(c: Config) -> None:
    counted = {
        "ROWS": c.rows, "STEP": c.step, "GROUPS": c.groups, "STAGE_BYTES": c.stage_bytes, "TOKENS": c.TOKENS,
        "sizeof(Slot)": few_tokens._SLOT_BYTES,
    }  # fmt: skip
    claims = [f"{name} == {value}" for name, value in counted.items()]
    room = "1024 + STAGES * (STAGE_BYTES + 16) + GIVEN_BYTES + (EXPERTS ? MOST_SLOTS * (int)sizeof(Slot) : 0)"
    claims.append(f"{room} <= {c.shared}")
    source = text("few_tokens.cu") + "".join(f'\nstatic_assert({claim}, "");' for claim in claims)
    built(source, c)
    with pytest.raises(nvrtc.CompileError, match="static assertion failed"):
        built(f'{source}\nstatic_assert(STAGE_BYTES != {c.stage_bytes}, "");', c)


def text(name: str) -> str:
    return (files("bitwright.kernels.nvrtc") / name).read_text(encoding="utf-8")


def built(source: str, c: Config) -> bytes:
    """Machine code of another text for `few_tokens.cu`."""
    library, _ = nvrtc._load()
    assert library is not None
    beside = (f.name for f in files("bitwright.kernels.nvrtc").iterdir() if f.name.endswith(".cuh"))
    headers = tuple((name, text(name)) for name in beside)
    return nvrtc._compile(library, "few_tokens.cu", source, headers, c.options)[0]
