"""The kernel benchmark on a CPU at tiny sizes: what is right is timed, what is wrong is not, who is absent says why."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from bitwright.bench import experts, kernels, peers, timing
from bitwright.errors import BitwrightError
from bitwright.kernels import dispatch, ops, reference
from bitwright.kernels.dequantize import DequantizedWeight
from bitwright.kernels.problem import GLUON, HOPPER, NVRTC, NVRTC_MISSING, TRITON, Problem
from bitwright.kernels.split_cuda import SplitMma
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import Scheme
from bitwright.split import SplitTensor

CPU = torch.device("cpu")
SCHEMES = [
    "w4a16-g64",
    "w3a16-g32-asym",
    "w2a16",
    "w8a16",
    "w8a8",
    "w4a4-o16",
    "w4a4-o32-rot-24",
    "w8a8-o16",
    "w4a16-o16",
    "w16a16-24",
]


def options(**changes: Any) -> kernels.Options:
    return kernels.Options(**{"shapes": ((48, 128),), "tokens": (1, 5), "device": "cpu", "repeats": 2} | changes)


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    known = timing.Ceilings(1e9, 5e8, 1e10, torch.bfloat16)
    monkeypatch.setattr(timing, "measure_ceilings", lambda device, dtype: known)


class Broken(DequantizedWeight):
    """Right but for one output of the last token."""

    NAME = "one-output-off"

    def __call__(self, x: Tensor) -> Tensor:
        y = super().__call__(x).clone()
        y[-1, 7] += 1
        return y


class Nan(DequantizedWeight):
    NAME = "nan"

    def __call__(self, x: Tensor) -> Tensor:
        y = super().__call__(x).clone()
        y[0, 0] = torch.nan
        return y


class Raising(DequantizedWeight):
    NAME = "raising"

    def __call__(self, x: Tensor) -> Tensor:
        raise RuntimeError("an illegal memory access")


class Unpreparable(DequantizedWeight):
    NAME = "unpreparable"

    @classmethod
    def prepare(cls, qt: QuantizedTensor, problem: Problem) -> Any:
        raise MemoryError("too large")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_ours_and_the_baseline_are_right_and_timed(scheme: str) -> None:
    found = kernels.run(options(schemes=(scheme,)))
    assert {r["tokens"] for r in found} == {1, 5}
    timed = [r for r in found if r["status"] == "ok"]
    assert {"ours", "dense"} <= {r["kind"] for r in timed}
    for M in (1, 5):
        chosen = [r for r in timed if r["chosen"] and r["tokens"] == M]
        assert len(chosen) == 1 and chosen[0]["kind"] == "ours"
    # The baseline keeps the activations that the scheme rounds to 4 bits.
    limits = {"ours": 1e-2, "dense": 0.2 if Scheme.parse(scheme).activation_bits == 4 else 2e-2}
    assert all(0 <= r["relative_error"] < limits[r["kind"]] and r["seconds"] > 0 for r in timed)
    assert all(r["reason"] for r in found if r["status"] != "ok")


def test_what_is_wrong_is_reported_and_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", (Broken, Nan, Raising, Unpreparable, DequantizedWeight))
    found = {r["name"]: r for r in kernels.run(options(tokens=(9,)))}
    assert found["one-output-off"]["status"] == found["nan"]["status"] == "wrong"
    assert (found["raising"]["status"], found["unpreparable"]["status"]) == ("failed", "failed")
    assert "illegal memory" in found["raising"]["reason"] and "too large" in found["unpreparable"]["reason"]
    assert found["dequantize"]["status"] == "ok"
    for name in ("one-output-off", "nan", "raising", "unpreparable"):
        assert "seconds" not in found[name]


def test_what_turns_wrong_while_it_is_timed_is_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tiring(DequantizedWeight):
        """Right when it is checked and when it is made ready, never again."""

        NAME = "tiring"
        calls = 0

        def __call__(self, x: Tensor) -> Tensor:
            Tiring.calls += 1
            return super().__call__(x) * (Tiring.calls <= 2)

    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", (Tiring, DequantizedWeight))
    found = {r["name"]: r for r in kernels.run(options(tokens=(9,)))}
    assert found["tiring"]["status"] == "wrong" and "first of the timed calls" in found["tiring"]["reason"]
    assert "seconds" not in found["tiring"] and found["dequantize"]["status"] == "ok"


def test_figures_follow_from_seconds() -> None:
    for r in kernels.run(options(tokens=(4,))):
        if r["status"] != "ok":
            continue
        N, K, M = r["N"], r["K"], r["tokens"]
        bits = 16 if r["kind"] == "dense" else 4 + 16 / 128
        assert r["bytes"] == N * K * bits / 8 + 2 * M * (N + K)
        floor = max(r["bytes"] / 1e9, 2 * M * N * K / 1e10)
        assert r["roofline_share"] == pytest.approx(floor / r["seconds"])
        assert r["flops_per_second"] == pytest.approx(2 * M * N * K / r["seconds"])


def test_speedups() -> None:
    times = {name: timing.Timing(s, s, s, 1, 1) for name, s in (("a", 1.0), ("d", 4.0), ("p", 3.0), ("q", 2.0))}
    dense, best = kernels.rivals({"a": "ours", "d": "dense", "p": "peer", "q": "peer"}, times)
    assert kernels.speedups(times["a"], "ours", dense, best) == {
        "speedup_over_dense": 4.0,
        "best_peer": "q",
        "speedup_over_best_peer": 2.0,
    }
    assert kernels.speedups(times["p"], "peer", dense, best)["best_peer"] is None
    assert kernels.rivals({"a": "ours"}, {"a": times["a"]}) == (None, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": "int8"}, "int8"),
        ({"tokens": ()}, "tokens"),
        ({"tokens": (0,)}, "tokens"),
        ({"repeats": 0}, "repeats"),
        ({"schemes": ("w5a16",)}, "weight bits 5"),
        ({"peers": ("marlin",)}, "marlin"),
        ({"device": "cuda:99"}, "cuda:99"),
    ],
)
def test_bad_options_are_one_error(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BitwrightError, match=said):
        kernels.run(options(**changes))


@pytest.mark.parametrize("scheme", ["w4a4-o16", "w8a8", "w8a8-o16-rot"])
def test_the_parts_of_a_split_linear_are_timed_beside_it(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's implementation, whose operators have a program for CPUs too."""

    class Anywhere(SplitMma):
        NAME = "anywhere"

        @classmethod
        def refuse(cls, problem: Problem) -> str | None:
            return None

    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", (Anywhere,))
    monkeypatch.setattr(dispatch, "SPLIT_IMPLEMENTATIONS", (Anywhere,))
    found = kernels.run(options(schemes=(scheme,), peers=("dense",)))
    parts = [r for r in found if r["kind"] == "part"]
    assert [r["name"].partition(": ")[2] for r in parts if r["tokens"] == 5] == [
        "quantize",
        "codes ready",
        "product alone",
    ]
    assert all(r["status"] == "ok" and r["seconds"] > 0 and r["speedup_over_dense"] > 0 for r in parts)
    whole = next(r for r in found if r["name"] == "anywhere")
    assert whole["status"] == "ok" and whole["chosen"]
    assert {r["bytes"] for r in parts if "quantize" not in r["name"]} == {
        r["bytes"] for r in found if r["kind"] == "ours"
    }
    kernels.table(found)

    def wrong(self: Anywhere, *given: Any) -> Tensor:
        return SplitMma.multiply(self, *given) + 1

    monkeypatch.setattr(Anywhere, "multiply", wrong)
    found = kernels.run(options(schemes=(scheme,), peers=("dense",)))
    assert {r["status"] for r in found if r["name"] == "anywhere"} == {"wrong"}
    assert not [r for r in found if r["kind"] == "part"]


# -------------------------------------------------------------------------------------------------------------- peers


@pytest.mark.parametrize("scheme", SCHEMES)
def test_expected_is_the_reference(scheme: str) -> None:
    parsed = Scheme.parse(scheme)
    qt = peers.random_weight(48, 128, parsed, torch.float32, CPU)
    x = torch.randn(3, 128)
    found, want = peers.expected(x, qt, parsed), reference.linear(x, qt, parsed)
    assert found.dtype == torch.float64
    assert torch.allclose(found.float(), want, rtol=1e-5, atol=1e-6)


def test_random_weights_use_the_whole_grid_and_come_again() -> None:
    scheme = Scheme.parse("w4a16-g64-asym")
    one, two, other = (peers.random_weight(64, 256, scheme, torch.bfloat16, CPU, seed) for seed in (3, 3, 4))
    assert (int(one.codes.min()), int(one.codes.max())) == (-8, 7)
    assert torch.equal(one.codes, two.codes) and torch.equal(one.scale, two.scale)
    assert not torch.equal(one.codes, other.codes)
    assert bool((one.scale > 0).any()) and bool((one.scale < 0).any())
    y = torch.randn(8, 256) @ one.dequantize().t()
    assert 0.1 < float(y.std()) < 10


@pytest.mark.parametrize("scheme", ["w4a4-o16-rot-24", "w8a8-o32"])
def test_random_split_weights_are_of_their_scheme(scheme: str) -> None:
    parsed = Scheme.parse(scheme)
    one, two = (peers.random_weight(64, 256, parsed, torch.bfloat16, CPU, seed) for seed in (3, 4))
    assert isinstance(one, SplitTensor) and one.scheme == parsed
    assert torch.equal(one.split.order, two.split.order) and not torch.equal(one.base.codes, two.base.codes)
    zeros = (one.base.codes.view(64, -1, 4) == 0).sum(-1)
    assert bool((zeros >= 2).all()) == parsed.sparse
    y = torch.randn(8, 256) @ one.dequantize().t()
    assert 0.1 < float(y.std()) < 10


def test_copies_lie_in_different_memory() -> None:
    scheme = Scheme.parse("w4a16-g64")
    qt = peers.random_weight(48, 128, scheme, torch.bfloat16, CPU)
    for c in peers.contenders(qt, scheme, torch.bfloat16, CPU):
        if c.absent:
            continue
        first, second = c.copies(qt, 2)
        x = torch.randn(2, 128).bfloat16()
        assert torch.equal(first(x), second(x))
        held = [{t.data_ptr() for t in vars(linear).values() if isinstance(t, Tensor)} for linear in (first, second)]
        assert held[0] and not held[0] & held[1], c.name


def test_a_linear_that_cannot_be_copied_is_prepared_again() -> None:
    made = []

    def prepare(qt: QuantizedTensor) -> peers.Linear:
        def generator() -> Any:
            yield

        class Handle:
            handle = None

            def __init__(self) -> None:
                self.handle = generator()  # which copy refuses

            def __call__(self, x: Tensor) -> Tensor:
                return x

        made.append(qt)
        return Handle()

    qt = peers.random_weight(16, 64, Scheme.parse("w4a16"), torch.bfloat16, CPU)
    contender = peers.Contender("handle", "peer", "", None, prepare, 1.0)
    assert len(contender.copies(qt, 3)) == 3 and len(made) == 3


def cuda_problem(*features: str, scheme: str = "w4a16-g128", dtype: torch.dtype = torch.bfloat16) -> Problem:
    return Problem(256, 256, Scheme.parse(scheme), dtype, dtype, "cuda", frozenset(features))


def test_on_a_gpu_kernels_stand_by_themselves_beside_dequantize_and_gemm() -> None:
    ours = {c.name: c.absent for c in peers._ours(cuda_problem(TRITON, GLUON, HOPPER))}
    assert ours["triton"] is None and ours["gluon"] is None and ours[peers.DEQUANTIZED] is None
    assert ours["hopper"] == NVRTC_MISSING and "last resort" in str(ours["dequantize"])
    with_compiler = {c.name: c.absent for c in peers._ours(cuda_problem(TRITON, GLUON, HOPPER, NVRTC))}
    assert with_compiler == ours | {"hopper": None}
    none = {c.name: c.absent for c in peers._ours(cuda_problem())}
    assert (
        none["triton"]
        and none["gluon"]
        and none["hopper"]
        and none["dequantize"] is None
        and peers.DEQUANTIZED not in none
    )


def test_chosen_is_what_a_call_runs() -> None:
    problem = cuda_problem(TRITON)
    assert peers.chosen(problem, 1) == "triton"
    assert peers.chosen(problem, 1 << 20) == peers.DEQUANTIZED
    assert peers.chosen(cuda_problem(TRITON, GLUON, HOPPER), 1) == "gluon"
    assert {peers.chosen(cuda_problem(TRITON, GLUON, HOPPER, NVRTC), M) for M in (1, 1 << 20)} == {"hopper"}
    assert peers.chosen(cuda_problem(), 1) == "dequantize"


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (cuda_problem(scheme="w3a16-g128"), "4-bit"),
        (cuda_problem(dtype=torch.float16), "bfloat16"),
        (cuda_problem(scheme="w4a16-g16"), "32, 64, 128 or 256"),
        (
            Problem(250, 256, Scheme.parse("w4a16-g128"), torch.bfloat16, torch.bfloat16, "cuda", frozenset()),
            "8 divides",
        ),
    ],
)
def test_tinygemm_says_what_it_takes(problem: Problem, said: str) -> None:
    assert said in str(peers._tinygemm(problem).absent)


def test_packages_that_are_not_there_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert peers._humming(cuda_problem()).absent == "humming-kernels is not installed"
    assert peers._gemlite(cuda_problem()).absent == "gemlite is not installed"
    assert peers._tinygemm(cuda_problem()).absent is None


# ------------------------------------------------------------------------------------------------------------ experts


def test_every_token_goes_to_different_experts() -> None:
    routing = experts.Routing.random(50, 8, 3, CPU)
    counts = [b - a for a, b in zip(routing.bounds, routing.bounds[1:], strict=False)]
    assert sum(counts) == 150 and max(counts) <= 50 and routing.offsets.tolist() == list(routing.bounds)
    one = experts.Routing.random(1, 8, 3, CPU)
    assert [s.stop - s.start for _, s in one.spans] == [1, 1, 1]


@pytest.mark.parametrize("scheme", ["w4a16-g64", "w3a16-g32-asym"])
def test_experts_are_right_and_timed(scheme: str) -> None:
    found = experts.run(options(schemes=(scheme,)), experts=4, top_k=2)
    assert {r["tokens"] for r in found} == {1, 5}
    assert all(r["status"] == "ok" for r in found if r["name"] != experts.GROUPED)
    ours = next(r for r in found if r["kind"] == "ours" and r["tokens"] == 1)
    assert ours["experts_used"] == 2 and ours["speedup_over_dense"] > 0


def test_experts_that_are_mixed_up_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.fragment_experts

    def shifted(x: Tensor, offsets: Tensor, words: list[Tensor], scale: Tensor, *rest: Any) -> Tensor:
        return right(x, offsets, [w.roll(1, 0) for w in words], scale, *rest)

    monkeypatch.setattr(ops, "fragment_experts", shifted)
    found = experts.run(options(), experts=4, top_k=2)
    ours = [r for r in found if r["kind"] == "ours"]
    assert ours and all(r["status"] == "wrong" and "seconds" not in r for r in ours)


def test_experts_refuse_what_they_are_not_measured_with() -> None:
    with pytest.raises(BitwrightError, match="top_k 5 of 4"):
        experts.run(options(), experts=4, top_k=5)
    with pytest.raises(BitwrightError, match="w8a8"):
        experts.run(options(schemes=("w8a8",)), experts=4, top_k=2)


def test_tables_show_what_was_measured() -> None:
    from rich.console import Console

    def text(records: list[dict[str, Any]]) -> str:
        console = Console(width=220, record=True, file=io.StringIO())
        console.print(kernels.table(records))
        return " ".join(console.export_text().split())

    shown = text(kernels.run(options()))
    assert "48x128" in shown and "tinygemm (runs on CUDA only)" in shown
    wrong = {"N": 1, "K": 2, "tokens": 3, "scheme": "w4a16", "name": "x", "kind": "ours", "status": "wrong"}
    assert "wrong: off by 9" in text([wrong | {"reason": "off by 9"}])
    assert "top 2 of 4" in text(experts.run(options(), experts=4, top_k=2))
