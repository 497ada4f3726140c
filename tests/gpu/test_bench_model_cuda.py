"""The models of `bench` on a GPU: kernels against their twins, replay against eager runs, benchmarks end to end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitwright.bench import correctness, decode, fitting, mlp, model, prefill, throughput
from bitwright.bench.correctness import prompts, tiny
from bitwright.bench.linears import DenseExperts, PackedExperts, PackedLinear
from bitwright.bench.model import Decoder, State, make_model, make_state, make_tables
from bitwright.bench.shapes import models
from bitwright.bench.timing import capture
from bitwright.kernels import attention, dependent
from bitwright.kernels.elementwise import rope_tables
from bitwright.scheme import Scheme

sys.path.insert(0, str(Path(__file__).parents[1]))
import bench_kernel_cases

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BF16 = torch.bfloat16
NAMES = ("llama-2-7b", "llama-3-8b", "opt-30b", "mixtral-8x7b")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", bench_kernel_cases.CASES, ids=lambda c: c.__name__)
def test_kernels_equal_their_twins(case: Callable[[torch.dtype, str], None], dtype: torch.dtype) -> None:
    case(dtype, "cuda")


@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 32), (64, 8), (32, 8)])
@pytest.mark.parametrize("batch", [1, 16])
def test_decode_attention_at_real_shapes(heads: int, kv_heads: int, batch: int) -> None:
    qkv = torch.randn(batch, (heads + 2 * kv_heads) * 128, device="cuda").to(BF16)
    keys, values = (torch.randn(batch, kv_heads, 2100, 128, device="cuda").to(BF16) for _ in range(2))
    positions = torch.randint(0, 2100, (batch,), dtype=torch.int32, device="cuda")
    cos, sin = rope_tables(2100, 128, 10000.0, "cuda")
    scratch = attention.workspace(batch, heads, kv_heads, 128, 2100, "cuda")
    caches = (keys.clone(), values.clone())
    first = attention.decode(qkv, cos, sin, positions, keys, values, scratch)
    bench_kernel_cases.close(first, attention.decode_reference(qkv, cos, sin, positions, *caches), 4)
    for ours, theirs in zip((keys, values), caches, strict=True):
        bench_kernel_cases.close(ours, theirs)
    for _ in range(20):  # whoever arrives last merges, always in the same order
        assert torch.equal(attention.decode(qkv, cos, sin, positions, keys, values, scratch), first)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", ["w4a16-g128", "w3a16-g64", "w4a16-g64-asym"])
def test_quantized_models_equal_their_dequantized_twins(name: str, scheme: str) -> None:
    """Logits against the dequantized model, and the replayed step bit for bit against the eager one."""
    with torch.no_grad():
        verdict = correctness.check(models(name), Scheme.parse(scheme), BF16, torch.device("cuda"))
    assert verdict.reason is None, verdict


@pytest.mark.parametrize("scheme", ["w4a4-o256", "w4a4-o256-24", "w8a8"])
def test_models_that_round_activations_equal_their_twins(scheme: str) -> None:
    with torch.no_grad():
        verdict = correctness.check(models("llama-2-7b"), Scheme.parse(scheme), BF16, torch.device("cuda"))
    assert verdict.reason is None, verdict


def test_linears_quantize_in_the_kernels_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of real width against separate launches: another order of the sum of squares, and nothing else."""
    shape = replace(models("llama-2-7b"), layers=1, vocab=512)
    made = make_model(shape, Scheme.parse("w4a4-o256"), make_tables(shape, BF16, "cuda"))

    def logits() -> torch.Tensor:
        return made.prefill(make_state(shape, 1, 1, 300, BF16, "cuda"), prompts(shape, 1, 300, "cuda"))

    with torch.no_grad():
        fused = logits()
        monkeypatch.setattr(PackedLinear, "_fusible", None)
        apart = logits()
    assert _relative(fused, apart) < 2e-2


@pytest.mark.parametrize("batch", [1, 2, 16])
@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", ["llama-2-7b", "opt-30b", "mixtral-8x7b"])
def test_kernels_that_begin_early_change_nothing(
    name: str, small: bool, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps in one graph, each launch beginning while the one before runs, and the same with nothing beside it."""
    shape = replace(tiny(models(name)), layers=4) if small else replace(models(name), layers=2)
    made = make_model(shape, Scheme.parse("w4a16-g128"), make_tables(shape, BF16, "cuda"))
    steps, context = 6, 50

    def run(state: State) -> list[torch.Tensor]:
        state.positions.fill_(context)
        state.ids.copy_(ids)
        return [made.step(state).clone() for _ in range(steps)]

    ours, theirs = (make_state(shape, shape.layers, batch, context + steps, BF16, "cuda") for _ in range(2))
    ids = ours.ids.clone()
    with torch.no_grad():
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run(ours)
        torch.cuda.synchronize()
        captured: list[list[torch.Tensor]] = []
        capture(lambda: captured.append(run(ours)), graph, stream)
        with monkeypatch.context() as patched:
            _alone(patched)
            expected = run(theirs)
        for _ in range(20):
            for logits in captured[0]:
                logits.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            for logits, alone in zip(captured[0], expected, strict=True):
                assert torch.equal(logits, alone)
            for ours_, theirs_ in zip(ours.keys + ours.values, theirs.keys + theirs.values, strict=True):
                assert torch.equal(ours_, theirs_)


def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain launches of the small kernels, and a synchronization around every part of a step."""

    def alone(f: Callable) -> Callable:
        def call(*args, **kwargs):
            torch.cuda.synchronize()
            y = f(*args, **kwargs)
            torch.cuda.synchronize()
            return y

        return call

    monkeypatch.setattr(dependent, "options", lambda device: {"PDL": False})
    for module, names in (
        (mlp, ("add_norm", "norm_route", "combine_norm", "silu_mul", "relu")),
        (model, ("rope_cache",)),
    ):
        for f in names:
            monkeypatch.setattr(module, f, alone(getattr(module, f)))
    monkeypatch.setattr(attention, "decode", alone(attention.decode))
    for kind in (PackedLinear, PackedExperts):
        monkeypatch.setattr(kind, "__call__", alone(kind.__call__))
    monkeypatch.setattr(Decoder, "_embed", alone(Decoder._embed))


@pytest.mark.parametrize("batch", [1, 2, 16, 40])
@pytest.mark.parametrize("scheme", ["w4a16-g128", None])
def test_experts_read_nothing_of_an_earlier_replay(
    scheme: str | None, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A captured chain of expert layers of real width whose every intermediate is kept, and poisoned before a replay:
    what is read too soon is not what an equal replay left there. Offsets of poison give every row to expert 0."""
    shape = replace(models("mixtral-8x7b"), layers=3)
    parsed = None if scheme is None else Scheme.parse(scheme)
    made = make_model(shape, parsed, make_tables(replace(shape, vocab=64), BF16, "cuda"))
    x, h = (torch.randn(batch, shape.hidden, device="cuda").to(BF16) for _ in range(2))
    kept: list[torch.Tensor] = []

    def keep(value) -> None:
        if isinstance(value, torch.Tensor):
            kept.append(value)
        elif isinstance(value, tuple):
            for part in value:
                keep(part)
        elif isinstance(value, mlp.Routing):
            keep((value.offsets, value.tokens, value.places, value.shares))

    def keeping(f: Callable) -> Callable:
        def call(*args, **kwargs):
            y = f(*args, **kwargs)
            keep(y)
            return y

        return call

    def run() -> torch.Tensor:
        x_, h_ = x + 0, h + 0
        for block in made.blocks:
            x_, h_ = block.mlp(block.mlp_norm, x_, h_)
            x_, h_ = block.norm(x_, h_)
        return x_

    with torch.no_grad():
        with monkeypatch.context() as patched:
            _alone(patched)
            expected = run()
        for f in ("add_norm", "norm_route", "combine_norm", "silu_mul"):
            monkeypatch.setattr(mlp, f, keeping(getattr(mlp, f)))
        for kind in (PackedExperts, DenseExperts):
            monkeypatch.setattr(kind, "__call__", keeping(kind.__call__))
        run()
        torch.cuda.synchronize()
        kept.clear()
        graph = torch.cuda.CUDAGraph()
        capture(lambda: keep(run()), graph, torch.cuda.Stream())
        assert len(kept) > 30
        for _ in range(30):
            for t in kept:
                if t.is_floating_point():
                    t.fill_(float("nan"))
                else:
                    t.fill_(batch * shape.top_k if t.numel() == shape.experts + 1 else 0)
                    t[:1] = 0
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(kept[-1], expected)


@pytest.mark.parametrize("name", ["llama-3-8b", "opt-30b"])
def test_gpu_and_cpu_agree(name: str) -> None:
    """The same 16-bit weights through kernels and through twins."""
    shape = tiny(models(name))
    tables = make_tables(shape, BF16, "cpu")
    model = make_model(shape, None, tables)
    ids = prompts(shape, 2, 20, "cpu")
    here, there = (make_state(shape, 2, 2, 24, BF16, d) for d in ("cpu", "cuda"))
    with torch.no_grad():
        expected, logits = model.prefill(here, ids), _moved(model).prefill(there, ids.cuda())
        assert _relative(logits.cpu(), expected) < 2e-2
        there.ids.copy_(here.ids)
        expected, logits = model.step(here), _moved(model).step(there)
        assert _relative(logits.cpu(), expected) < 2e-2


@pytest.mark.parametrize("name", ["llama-3-8b", "opt-30b", "mixtral-8x7b"])
def test_benchmarks_end_to_end(name: str) -> None:
    small = replace(tiny(models(name)), layers=4)
    for layers in (None, 2):
        records = decode.run(decode.Options(small, batches=(1, 3), context=16, layers=layers, device="cuda", repeats=3))
        assert [r["status"] for r in records] == ["ok"] * 4, records
        if layers is None:  # the difference of two depths may be anything beside other processes
            assert all(r["seconds_per_token"] > 0 for r in records)
    records = prefill.run(prefill.Options(small, prompts=((2, 24),), device="cuda", repeats=3))
    assert [r["status"] for r in records] == ["ok"] * 2, records
    memory = int(fitting.model_bytes(small, None, BF16) * 0.8)
    options = throughput.Options(small, context=16, memory=memory, largest=4, device="cuda", repeats=3)
    records = throughput.run(options)
    assert {r["status"] for r in records} == {"ok"}, records


def _relative(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected.double()).norm() / expected.double().norm())


def _moved(value):
    """The same dataclass with every tensor in it on the GPU."""
    if isinstance(value, torch.Tensor):
        return value.cuda()
    if isinstance(value, tuple):
        return tuple(_moved(v) for v in value)
    if hasattr(value, "__dataclass_fields__") and type(value).__module__.endswith(("model", "mlp", "linears")):
        return replace(value, **{f: _moved(getattr(value, f)) for f in value.__dataclass_fields__})
    return value
