"""The models of `bench`: against transformers, kernels against their twins, and the benchmarks end to end, tiny."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitwright.bench import correctness, decode, fitting, prefill, throughput
from bitwright.bench.correctness import tiny
from bitwright.bench.fitting import fewest_gpus
from bitwright.bench.linears import DenseExperts, DenseLinear, PackedLinear
from bitwright.bench.mlp import Mlp, MoE, Norm
from bitwright.bench.model import Block, Decoder, Tables, make_model, make_state, make_tables
from bitwright.bench.schemes import linear_scheme
from bitwright.bench.shapes import ModelShape, models
from bitwright.errors import BitwrightError
from bitwright.scheme import Scheme

BF16 = torch.bfloat16
CPU = torch.device("cpu")
LLAMA, OPT, MIXTRAL = models("llama-3-8b"), models("opt-30b"), models("mixtral-8x7b")

# The interpreter of Triton 3.6 takes a loop bound to be a number of no dimensions; NumPy 2.4 insists on one.
_INTERPRETED = """
import sys
sys.path.insert(0, sys.argv[1])
from triton.runtime import interpreter
plain = interpreter._LangPatchScope.set_attr
def set_attr(self, obj, name, value):
    plain(self, obj, name, (lambda t: int(t.handle.data.item())) if name == "__index__" else value)
interpreter._LangPatchScope.set_attr = set_attr
import torch, bench_kernel_cases as cases
for case in cases.CASES:
    case(torch.float16, "cpu")
    print(case.__name__)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_equal_their_twins_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _INTERPRETED, str(Path(__file__).parent)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "add_norm",
        "rope_cache",
        "silu_mul",
        "relu",
        "experts",
        "norm_route",
        "decode_attention",
    ]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(("heads", "kv", "splits"), [(32, 32, 1), (64, 8, 17)])
def test_attention_compiles_for_hopper(heads: int, kv: int, splits: int) -> None:
    """The interpreter takes programs that the compiler refuses."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bitwright.kernels.triton.attention import _decode

    pointers = dict.fromkeys(("qkv", "keys", "values", "out"), "*bf16")
    pointers |= dict.fromkeys(("cos", "sin", "partial", "stats"), "*fp32")
    signature = pointers | {"positions": "*i32", "counters": "*i32", "scale_log2": "fp32", "S": "i32"}
    group = heads // kv
    values = dict(
        KV=kv, R=group, D=128, ROPE=True, SPLITS=splits, ROWS=16, KEYS=32, MERGE_ROWS=group, CHUNK=8, PDL=False
    )
    names = _decode.arg_names
    source = ASTSource(
        fn=_decode,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in values.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, "positions", "counters")},
    )
    ptx = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 3}).asm["ptx"]
    assert "mma.sync" in ptx and "cp.async" in ptx  # products on tensor cores, keys and values fetched ahead
    assert ("atom" in ptx) == (splits > 1)


def test_importing_the_benchmarks_loads_no_triton() -> None:
    code = (
        "import sys, bitwright.bench.decode, bitwright.bench.prefill, bitwright.bench.throughput; "
        "print('triton' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "False"], done.stderr


def adopt(hf: Any, family: str) -> Decoder:
    """Our model with the weights of a tiny one of transformers."""
    w: dict[str, Tensor] = {name: t.detach() for name, t in hf.state_dict().items()}
    c = hf.config
    opt = family == "opt"
    root = "model.decoder" if opt else "model"
    shape = ModelShape(
        family,
        c.hidden_size,
        c.ffn_dim if opt else c.intermediate_size,
        c.num_attention_heads,
        getattr(c, "num_key_value_heads", c.num_attention_heads),
        c.num_hidden_layers,
        c.vocab_size,
        c.max_position_embeddings,
        head_dim=c.hidden_size // c.num_attention_heads,
        experts=4 if family == "mixtral" else 0,
        top_k=2 if family == "mixtral" else 0,
        norm="layernorm" if opt else "rmsnorm",
        activation="relu" if opt else "silu",
        bias=opt,
        positions=c.max_position_embeddings + 2 if opt else 0,
    )

    def linear(*names: str) -> DenseLinear:
        bias = torch.cat([w[f"{n}.bias"] for n in names]) if opt else None
        return DenseLinear(torch.cat([w[f"{n}.weight"] for n in names]), bias)

    def norm(name: str) -> Norm:
        return Norm(w[f"{name}.weight"], w.get(f"{name}.bias"))

    blocks = []
    for i in range(shape.layers):
        at = f"{root}.layers.{i}"
        mlp: Mlp | MoE
        if opt:
            mlp = Mlp(linear(f"{at}.fc1"), linear(f"{at}.fc2"), gated=False)
        elif shape.experts:
            up, down = w[f"{at}.mlp.experts.gate_up_proj"], w[f"{at}.mlp.experts.down_proj"]
            mlp = MoE(w[f"{at}.mlp.gate.weight"], DenseExperts(up), DenseExperts(down), gated=True, top_k=2)
        else:
            mlp = Mlp(linear(f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"), linear(f"{at}.mlp.down_proj"), gated=True)
        attend = f"{at}.self_attn"
        blocks.append(
            Block(
                norm(f"{at}.self_attn_layer_norm" if opt else f"{at}.input_layernorm"),
                linear(*(f"{attend}.{x}_proj" for x in "qkv")),
                linear(f"{attend}.out_proj" if opt else f"{attend}.o_proj"),
                norm(f"{at}.final_layer_norm" if opt else f"{at}.post_attention_layernorm"),
                mlp,
            )
        )
    positions = w[f"{root}.embed_positions.weight"] if opt else None
    last = norm(f"{root}.final_layer_norm" if opt else f"{root}.norm")
    return Decoder(shape, Tables(w[f"{root}.embed_tokens.weight"], w["lm_head.weight"], positions, last), tuple(blocks))


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_prefill_and_steps_equal_transformers(family: str, tiny_model: Callable[..., Any]) -> None:
    same = {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    hf = tiny_model(family, **({} if family == "opt" else same))
    model = adopt(hf, family)
    ids = torch.randint(2, 320, (2, 7), generator=torch.Generator().manual_seed(3))
    state = make_state(model.shape, 2, 2, 12, torch.float32, "cpu")
    with torch.no_grad():
        logits = [model.prefill(state, ids)]
        for _ in range(3):
            ids = torch.cat((ids, state.ids[:, None]), dim=1)
            logits.append(model.step(state))
        expected = hf(ids).logits[:, -4:]
    torch.testing.assert_close(torch.stack(logits, dim=1), expected, rtol=1e-4, atol=1e-4)
    assert state.positions.tolist() == [10, 10]
    assert torch.equal(state.ids, logits[-1].argmax(dim=-1))


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-8b", "opt-30b", "mixtral-8x7b"])
@pytest.mark.parametrize("scheme", ["w4a16-g128", "w3a16-g64-asym"])
def test_quantized_models_equal_their_dequantized_twins(name: str, scheme: str) -> None:
    verdict = correctness.check(models(name), Scheme.parse(scheme), BF16, CPU)
    assert verdict.reason is None and 0 < verdict.error < verdict.limit


@pytest.mark.parametrize("scheme", ["w4a4-o256", "w4a4-o256-24"])
def test_as_many_outliers_as_the_tiny_model_is_wide(scheme: str) -> None:
    """256 columns of 4096 are 16 of its 256."""
    verdict = correctness.check(LLAMA, Scheme.parse(scheme), BF16, CPU)
    assert verdict.reason is None and verdict.limit == 0.25


def test_the_check_fails_on_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PackedLinear.__call__
    monkeypatch.setattr(PackedLinear, "__call__", lambda self, x: right(self, x.roll(1, dims=-1)))
    verdict = correctness.check(LLAMA, Scheme.parse("w4a16-g128"), BF16, CPU)
    assert verdict.reason is not None and "logits are off" in verdict.reason
    shape = replace(tiny(LLAMA), layers=2)
    records = decode.run(decode.Options(shape, batches=(1,), context=4, tokens=1, device="cpu", repeats=1))
    assert [(r["scheme"], r["status"]) for r in records] == [("bfloat16", "ok"), ("w4a16-g128", "wrong")]
    assert "seconds_per_token" not in records[1]
    assert decode.table(records).row_count == 2


def test_quantized_and_dense_models_differ_in_linears_alone() -> None:
    shape = tiny(LLAMA)
    tables = make_tables(shape, BF16, CPU)
    dense, quantized = (make_model(shape, s, tables) for s in (None, Scheme.parse("w4a16-g128")))
    assert dense.tables is quantized.tables
    for a, b in zip(dense.blocks, quantized.blocks, strict=True):
        assert type(a) is type(b) and type(a.mlp) is type(b.mlp)
        assert isinstance(a.qkv, DenseLinear) and isinstance(b.qkv, PackedLinear)
        assert tuple(a.qkv.weight.shape) == b.qkv.weight.shape
    assert quantized.block_bytes < dense.block_bytes / 3
    assert dense.block_bytes == fitting.block_bytes(shape, None, BF16)


@pytest.mark.parametrize("shape", [LLAMA, OPT, MIXTRAL], ids=lambda s: s.name)
def test_decode_end_to_end(shape: ModelShape) -> None:
    small = replace(tiny(shape), layers=4)
    options = decode.Options(small, batches=(1, 3), context=12, tokens=2, layers=2, device="cpu", repeats=2)
    records = decode.run(options)
    assert [(r["scheme"], r["batch"]) for r in records] == [
        ("bfloat16", 1),
        ("w4a16-g128", 1),
        ("bfloat16", 3),
        ("w4a16-g128", 3),
    ]
    for r in records:
        json.dumps(r)
        assert r["status"] == "ok" and r["method"] == "(2 blocks - 1 blocks) / 1 x 4 + the rest"
        assert r["tokens_per_second"] == pytest.approx(r["batch"] / r["seconds_per_token"])
        assert r["cache_bytes"] == 2 * 4 * small.kv_heads * 64 * r["batch"] * 14 * 2
    assert records[0]["speedup_over_dense"] == 1
    dense, quantized = records[:2]
    assert quantized["speedup_over_dense"] == pytest.approx(dense["seconds_per_token"] / quantized["seconds_per_token"])
    assert decode.table(records).row_count == 4


def test_decode_of_a_whole_model_without_baseline() -> None:
    options = decode.Options(tiny(OPT), context=8, tokens=1, baseline=False, device="cpu", repeats=1)
    (record,) = decode.run(options)
    assert record["method"] == "whole model" and record["speedup_over_dense"] is None


def test_prefill_end_to_end() -> None:
    small = replace(tiny(MIXTRAL), layers=4)
    records = prefill.run(prefill.Options(small, prompts=((1, 8), (2, 5)), layers=2, device="cpu", repeats=2))
    assert [(r["scheme"], r["batch"], r["length"]) for r in records] == [
        ("bfloat16", 1, 8),
        ("w4a16-g128", 1, 8),
        ("bfloat16", 2, 5),
        ("w4a16-g128", 2, 5),
    ]
    qkv_o, expert = 256 * 512 + 256 * 256, 3 * 256 * 384
    for r in records:
        assert r["status"] == "ok"
        work = 2 * 4 * (qkv_o + 2 * expert) * r["batch"] * r["length"]  # two of eight experts each
        assert r["flops_per_second"] * r["seconds"] == pytest.approx(work)
        assert r["activation_peak_bytes"] is None
    dense, quantized = (r["weight_bytes_per_block"] for r in records[:2])
    assert dense == 2 * (qkv_o + 8 * expert) and records[0]["weight_share"] == 1
    assert 0.25 < records[1]["weight_share"] == quantized / dense < 0.3
    assert prefill.table(records).row_count == 4


@pytest.mark.parametrize("shape", [LLAMA, MIXTRAL], ids=lambda s: s.name)
def test_linears_alone_have_inputs_of_their_own(shape: ModelShape) -> None:
    """Linears that share a split would quantize a common one once, and one in all would be timed."""
    small = tiny(shape)
    calls = make_model(small, Scheme.parse("w4a16-g64"), make_tables(small, BF16, "cpu")).linear_calls(3)
    assert len(calls) == 8 and len({call.args[0].data_ptr() for call in calls}) == 8


def test_prefill_with_quantized_activations() -> None:
    """The linears behind the activation function at 8 bits, the others at 4."""
    small = replace(tiny(LLAMA), layers=2)
    asked = prefill.Options(small, ("w4a4-o16",), prompts=((1, 8),), device="cpu", repeats=1)
    dense, quantized = prefill.run(asked)
    assert (dense["status"], quantized["status"]) == ("ok", "ok")
    assert 4 / 16 < quantized["weight_share"] < 9 / 16
    up, down = (x for x in small.linears if x.name in ("gate_up", "down"))
    scheme = Scheme.parse("w4a4-o16")
    assert str(linear_scheme(up, small, scheme)) == "w4a4-o16"
    assert str(linear_scheme(down, small, scheme)) == "w8a8-o32"  # 16 of 256 inputs, 24 of 384, in steps of 16
    assert linear_scheme(down, small, None) is None


def test_throughput_sweeps_until_memory_is_full() -> None:
    small = replace(tiny(OPT), layers=4)
    sixteen = fitting.model_bytes(small, None, BF16)
    options = throughput.Options(
        small, context=12, memory=int(sixteen * 0.8), layers=2, largest=5, device="cpu", repeats=1
    )
    records = throughput.run(options)
    swept = [r for r in records if r["benchmark"] == "throughput"]
    assert [(r["scheme"], r["gpus"], r["batch"]) for r in swept] == [
        (scheme, gpus, batch)
        for scheme, spreads in (("bfloat16", (2, 4)), ("w4a16-g128", (1, 2)))
        for gpus in spreads
        for batch in (1, 2, 4, 5)
    ]
    assert "communication between ranks is not counted" in swept[0]["note"]
    assert all("computed to fit" in r["note"] and ("ranks" in r["note"]) == (r["gpus"] > 1) for r in swept)
    best = {r["scheme"]: r for r in records if r["benchmark"] == "throughput-best"}
    for name, r in best.items():
        assert r["tokens_per_second_per_gpu"] == max(
            s["tokens_per_second_per_gpu"] for s in swept if s["scheme"] == name
        )
    gain = best["w4a16-g128"]["tokens_per_second_per_gpu"] / best["bfloat16"]["tokens_per_second_per_gpu"]
    assert best["w4a16-g128"]["speedup_over_dense"] == pytest.approx(gain)
    assert throughput.table(records).row_count == 18
    tight = replace(options, memory=int(fitting.model_bytes(small, Scheme.parse("w4a16-g128"), BF16)))
    assert {r["gpus"] for r in throughput.run(tight) if r["scheme"] == "w4a16-g128"} == {2, 4}
    with pytest.raises(BitwrightError, match="does not fit 64 GPUs"):
        throughput.run(replace(options, memory=1000))


@pytest.mark.parametrize(("most", "expected"), [(1, [1]), (4, [1, 2, 4]), (7, [1, 2, 4, 7])])
def test_batches_double(most: int, expected: list[int]) -> None:
    assert throughput.batches(most) == expected


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(BitwrightError, match="head_dim 80"):
        make_model(replace(LLAMA, head_dim=80), None, make_tables(tiny(LLAMA), BF16, CPU), 1)
    with pytest.raises(BitwrightError, match="62 positions"):
        make_state(tiny(OPT), 1, 1, 63, BF16, CPU)
    with pytest.raises(BitwrightError, match="float32"):
        decode.run(decode.Options(tiny(LLAMA), dtype="float32", device="cpu"))
    with pytest.raises(BitwrightError, match="context 0"):
        decode.run(decode.Options(tiny(LLAMA), context=0, device="cpu"))
    with pytest.raises(BitwrightError, match=r"prompts \[\(1, 0\)\]"):
        prefill.run(prefill.Options(tiny(LLAMA), prompts=((1, 0),), device="cpu"))
    with pytest.raises(BitwrightError, match="64 GPUs"):
        fewest_gpus(models("opt-175b"), None, BF16, 512, 1_000_000_000)


@pytest.mark.parametrize("scheme", ["w4a4-o16", "w4a8-o16", "w4a4-o16-24"])
def test_linears_quantize_behind_norms_and_gates_to_the_same_bits(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block whose linears get their inputs quantized by the kernels before them, and one of separate launches."""
    small = tiny(LLAMA)
    model = make_model(small, Scheme.parse(scheme), make_tables(small, BF16, CPU))
    ids, states = correctness.prompts(small, 2, 9, CPU), [make_state(small, 2, 2, 12, BF16, CPU) for _ in range(2)]
    taken: list[str] = []

    def spied(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            result = run(*arguments)
            taken.append("none" if result is None else name)
            return result

        return call

    for name in ("behind_norm", "behind_silu"):
        monkeypatch.setattr(PackedLinear, name, spied(name, getattr(PackedLinear, name)))
    fused = [model.prefill(states[0], ids), model.step(states[0])]
    assert taken == ["behind_norm", "behind_norm", "behind_silu"] * 4
    monkeypatch.setattr(PackedLinear, "_fusible", None)
    apart = [model.prefill(states[1], ids), model.step(states[1])]
    assert taken[12:] == ["none"] * 12
    assert all(map(torch.equal, fused, apart))


@pytest.mark.parametrize(("shape", "scheme"), [(OPT, "w4a4-o16"), (LLAMA, "w4a16-g64"), (LLAMA, "w4a4-o16-rot")])
def test_other_linears_take_their_inputs_as_they_are(shape: ModelShape, scheme: str) -> None:
    small = tiny(shape)
    model = make_model(small, Scheme.parse(scheme), make_tables(small, BF16, CPU))
    x = torch.randn(3, 256).to(BF16)
    for block in model.blocks:
        assert isinstance(block.qkv, PackedLinear)
        (y, total), (normed, summed) = block.norm.into(block.qkv, x, x), block.norm(x, x)
        assert torch.equal(y, block.qkv(normed)) and torch.equal(total, summed)
        if shape is LLAMA:
            assert block.qkv.behind_norm(x, x, block.norm.weight, 1e-5) is None
