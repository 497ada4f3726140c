"""Whole quantized models on a GPU: quality against the CPU, CUDA graphs against single steps, stacked experts.

Needs the small trained models ($BITWRIGHT_MODELS), and for one test a SmolLM2 folder or GGUF ($BITWRIGHT_SMOLLM).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bitwright as bw
from bitwright.evaluate.perplexity import LogitSource, window_nll
from bitwright.kernels.problem import GLUON, HOPPER, NVRTC, cuda_features
from bitwright.models.source import resolve
from bitwright.nn import experts
from bitwright.nn.anatomy import anatomy
from bitwright.nn.experts import ExpertStack, QuantExperts
from bitwright.nn.fused import Experts
from bitwright.nn.graphs import BUCKET, StaticDecoder, decoder
from bitwright.nn.linear import QuantLinear
from bitwright.nn.load import explain, load
from bitwright.nn.packed import PackedModule

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NAMES = ["opt", "falcon", "mixtral"]
SCHEME = "w4a16-g64"
PROMPT = "The state of the union is"
README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def packed_folder(
    fixture_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """name, scheme -> folder of the quantized model, made once."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, scheme: str = SCHEME) -> Path:
        if (name, scheme) not in made:
            if name == "smollm2":
                where = os.environ.get("BITWRIGHT_SMOLLM")
                if not where:
                    pytest.skip("BITWRIGHT_SMOLLM is not set: it names a folder or GGUF file of SmolLM2-135M")
                source = resolve(where)
            else:
                source = fixture_model(name)
            out = tmp_path_factory.mktemp(name) / scheme
            bw.quantize(source, out, scheme=scheme, algorithm="rtn")
            made[name, scheme] = out
        return made[name, scheme]

    return make


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def perplexity(model: Any, folder: Path, windows: int = 4, seq_len: int = 256) -> float:
    """Of this project's README, which is English enough to compare two runs of one model."""
    ids = torch.tensor(tokenizer_of(folder)(README.read_text(encoding="utf-8"))["input_ids"])
    ids = ids[: windows * seq_len].view(windows, seq_len)
    source = LogitSource(model, ids[0])
    return math.exp(sum(window_nll(source, row) for row in ids) / windows)


def greedy(steps: StaticDecoder, ids: Tensor, count: int) -> list[int]:
    tokens = [steps.prefill(ids).argmax(dim=-1)]
    while len(tokens) < count:
        tokens.append(steps.step(tokens[-1]).argmax(dim=-1))
    return torch.cat(tokens).tolist()


# The small models store float16 scales: activations of that dtype take the Hopper kernels where there are any.
FEATURES = cuda_features() if torch.cuda.is_available() else frozenset()
FASTEST = ("hopper" if NVRTC in FEATURES else "gluon") if {HOPPER, GLUON} <= FEATURES else "triton"


def kernels_of(model: Any) -> set[str]:
    return {m.choice.name for m in model.modules() if isinstance(m, PackedModule)}


@pytest.mark.parametrize("name", [*NAMES, "smollm2"])
def test_perplexity_is_that_of_the_cpu(packed_folder, name: str) -> None:
    """float32 by dequantizing to 0.1 %; bfloat16 and float16 through the packed kernels to 0.5 %."""
    folder = packed_folder(name)
    reference = perplexity(load(folder, dtype=torch.float32), folder)
    exact = load(folder, dtype=torch.float32, device="cuda")
    assert kernels_of(exact) == {"dequantize"}
    assert perplexity(exact, folder) == pytest.approx(reference, rel=1e-3)
    for dtype in (torch.bfloat16, torch.float16):
        packed = load(folder, dtype=dtype, device="cuda")
        assert kernels_of(packed) == {FASTEST}, explain(packed)
        assert perplexity(packed, folder) == pytest.approx(reference, rel=5e-3)


@pytest.mark.parametrize("scheme", ["w3a16-g64", "w4a16-g32-asym", "w8a16", "w2a16-g64-asym"])
def test_other_widths(packed_folder, scheme: str) -> None:
    folder = packed_folder("opt", scheme)
    reference = perplexity(load(folder, dtype=torch.float32), folder)
    packed = load(folder, dtype=torch.float16, device="cuda")
    assert kernels_of(packed) == {FASTEST}, explain(packed)
    assert perplexity(packed, folder) == pytest.approx(reference, rel=5e-3)


@pytest.mark.parametrize("name", [*NAMES, "smollm2"])
def test_a_graph_gives_the_tokens_of_single_steps(packed_folder, name: str) -> None:
    """The same kernels in the same order: not one token may differ, over two cache lengths and several prompts."""
    folder = packed_folder(name)
    model, tokenizer = load(folder, dtype=torch.bfloat16, device="cuda"), tokenizer_of(folder)
    long = README.read_text(encoding="utf-8")[:1500]
    for prompt in (PROMPT, long, "It", PROMPT):
        graph = bw.generate(model, tokenizer, prompt, 40)
        assert (graph.mode, graph.reason) == ("cuda-graph", None)
        single = bw.generate(model, tokenizer, prompt, 40, mode="static")
        assert (graph.tokens, graph.text) == (single.tokens, single.text)
    assert bw.generate(model, tokenizer, PROMPT, 40).setup_seconds < 0.05, "the graph is kept"


@pytest.mark.parametrize("name", NAMES)
def test_float32_tokens_are_those_of_transformers(packed_folder, name: str) -> None:
    """Another cache, another attention kernel; in float32 that leaves the greedy choice alone."""
    folder = packed_folder(name)
    model, tokenizer = load(folder, dtype=torch.float32, device="cuda"), tokenizer_of(folder)
    theirs = bw.generate(model, tokenizer, PROMPT, 40, mode="transformers")
    ours = bw.generate(model, tokenizer, PROMPT, 40)
    assert theirs.tokens == ours.tokens
    assert ours.mode == ("static" if name == "mixtral" else "cuda-graph"), "float32 experts run in a loop"


@pytest.mark.parametrize("name", NAMES)
def test_prefill_and_steps_give_the_logits_of_a_forward(packed_folder, name: str) -> None:
    folder = packed_folder(name)
    model = load(folder, dtype=torch.bfloat16, device="cuda")
    ids = torch.tensor([tokenizer_of(folder)(README.read_text(encoding="utf-8"))["input_ids"][:80]], device="cuda")
    with torch.no_grad():
        whole = model(ids).logits[0].float()
    steps = decoder(model, 100)
    assert steps.graphed, steps.reason
    rows = [steps.prefill(ids[:, :64]).float().clone()]
    rows += [steps.step(ids[:, t]).float().clone() for t in range(64, 80)]
    found, expected = torch.cat(rows), whole[63:]
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("name", NAMES)
def test_unquantized_models_decode_in_a_graph(fixture_model, name: str) -> None:
    folder = fixture_model(name)
    model, tokenizer = load(folder, device="cuda"), tokenizer_of(folder)
    graph = bw.generate(model, tokenizer, PROMPT, 30)
    assert graph.tokens == bw.generate(model, tokenizer, PROMPT, 30, mode="static").tokens
    # transformers' own experts ask the device how many tokens each has, in some of its versions.
    assert graph.mode == "cuda-graph" or (name == "mixtral" and "synchroniz" in graph.reason), graph.reason


def test_batches_in_a_graph(packed_folder) -> None:
    folder = packed_folder("opt")
    model = load(folder, dtype=torch.float16, device="cuda")
    ids = torch.randint(4, 8000, (4, 33), generator=torch.Generator().manual_seed(0)).cuda()
    graph, single = decoder(model, 64, batch=4), StaticDecoder(model, BUCKET, batch=4)
    assert graph.graphed and not single.graphed
    assert greedy(graph, ids, 20) == greedy(single, ids, 20)


def test_sampling_on_a_gpu(packed_folder) -> None:
    folder = packed_folder("opt")
    model, tokenizer = load(folder, dtype=torch.bfloat16, device="cuda"), tokenizer_of(folder)
    state = torch.cuda.get_rng_state()
    options = {"temperature": 1.0, "top_p": 0.95}
    one, same, other = (bw.generate(model, tokenizer, PROMPT, 32, seed=s, **options).tokens for s in (1, 1, 2))
    assert one == same != other
    assert torch.equal(state, torch.cuda.get_rng_state())


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mixtral", "opt"])
def test_models_like_llama_or_opt_decode_by_fused_kernels(kind: str, tmp_path: Path) -> None:
    import transformers as tf
    from conftest import save_tokenizer

    sizes = dict(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, bos_token_id=0, eos_token_id=1, pad_token_id=1, initializer_range=0.05,
    )  # fmt: skip
    config = {
        "llama": lambda: tf.LlamaConfig(**sizes, attention_bias=True),
        "qwen3": lambda: tf.Qwen3Config(**sizes),
        "mixtral": lambda: tf.MixtralConfig(**sizes, num_local_experts=4, sliding_window=None),
        "opt": lambda: tf.OPTConfig(
            vocab_size=512,
            hidden_size=512,
            word_embed_proj_dim=512,
            ffn_dim=2048,
            num_hidden_layers=3,
            num_attention_heads=8,
            init_std=0.05,
        ),
    }[kind]()
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    bw.quantize(tmp_path / "source", tmp_path / "packed", scheme="w4a16-g128", algorithm="rtn")
    model = load(tmp_path / "packed", dtype=torch.bfloat16, device="cuda")
    q, k = (
        getattr(model.model, "decoder", model.model).layers[1].self_attn.get_submodule(name)
        for name in ("q_proj", "k_proj")
    )
    for batch in (1, 3):
        ids = torch.randint(4, 500, (batch, 33), generator=torch.Generator().manual_seed(0)).cuda()
        fused = decoder(model, 64, batch=batch)
        plain = StaticDecoder(model, fused.length, batch=batch, graph=True)
        assert fused.fused and fused.graphed and not plain.fused
        assert all(isinstance(b.mlp, Experts) == (kind == "mixtral") for b in anatomy(model).blocks)
        assert q.packed.tensors[0].untyped_storage().data_ptr() == k.packed.tensors[0].untyped_storage().data_ptr()
        assert decoder(model, 64, batch=batch) is fused, "kept, though weights have moved once"
        distances = []
        for length in range(4, 33, 2):
            fused.prefill(ids[:, :length])
            plain.prefill(ids[:, :length])
            for t in (length, length + 1 if length < 32 else length):
                found, expected = fused.step(ids[:, t]).float(), plain.step(ids[:, t]).float()
                distances.append((found - expected).norm(dim=-1) / expected.norm(dim=-1))
        # Of most: in some a rounding sends a token to another expert.
        assert torch.stack(distances).median() < 0.03


def test_stacked_experts_are_the_loop(packed_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = packed_folder("mixtral")
    stacked = load(folder, dtype=torch.bfloat16, device="cuda")
    monkeypatch.setattr(QuantExperts, "stack", lambda self: None)
    loop = load(folder, dtype=torch.bfloat16, device="cuda")
    assert any("ExpertStack" in line for line in explain(stacked))
    assert sum("one expert after the other" in line for line in explain(loop)) == 1
    ours = [m for m in stacked.modules() if isinstance(m, QuantExperts)]
    theirs = [m for m in loop.modules() if isinstance(m, QuantExperts)]
    assert len(ours) == len(theirs) == 6 and not any(isinstance(m, QuantLinear) for e in ours for m in e.modules())
    generator = torch.Generator(device="cuda").manual_seed(0)
    for M in (0, 1, 5, 64, 300):
        x = torch.randn(M, 256, device="cuda", dtype=torch.bfloat16, generator=generator)
        weights, index = torch.rand(M, 8, device="cuda", generator=generator).topk(2, dim=-1)
        if M > 2:
            index[1, 0] = 8  # no expert
        for a, b in zip(ours, theirs, strict=True):
            with torch.no_grad():
                y, expected = a(x, index, weights), b(x, index, weights)
                assert torch.equal(y, a(x, index, weights)), "sums have a fixed order"
            assert (y - expected).float().norm() <= 0.01 * expected.float().norm()
    # Routers in 16 bits: a rounding sends some tokens to other experts, so no closer than to the CPU.
    assert perplexity(stacked, folder) == pytest.approx(perplexity(loop, folder), rel=5e-3)


def test_stacked_experts_do_not_wait(packed_folder) -> None:
    model = load(packed_folder("mixtral"), dtype=torch.bfloat16, device="cuda")
    layer = next(m for m in model.modules() if isinstance(m, QuantExperts))
    x = torch.randn(7, 256, device="cuda", dtype=torch.bfloat16)
    weights, index = torch.rand(7, 8, device="cuda").topk(2, dim=-1)
    with torch.no_grad():
        expected = layer(x, index, weights)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = layer(x, index, weights)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)


def test_loading_holds_no_second_copy(packed_folder) -> None:
    """What is allocated after loading is what the modules hold, the stacks once."""
    folder = packed_folder("mixtral")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model = load(folder, dtype=torch.bfloat16, device="cuda")
    held = torch.cuda.memory_allocated() - before
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers()) if t.is_cuda}
    packed = sum(m.nbytes for m in {id(m.packed): m for m in model.modules() if isinstance(m, PackedModule)}.values())
    assert held < 1.1 * (sum(tensors.values()) + packed) + (1 << 20)
    assert sum(isinstance(m, ExpertStack) for m in model.modules()) == 12


def test_what_cannot_be_recorded_runs_step_by_step(packed_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts in a loop wait for the device: the reason says so, the tokens are right, and CUDA is as it was."""
    folder = packed_folder("mixtral")
    tokenizer = tokenizer_of(folder)
    stacked = load(folder, dtype=torch.bfloat16, device="cuda")
    monkeypatch.setattr(QuantExperts, "stack", lambda self: None)
    loop = load(folder, dtype=torch.bfloat16, device="cuda")
    result = bw.generate(loop, tokenizer, PROMPT, 20)
    assert result.mode == "static" and "synchroniz" in (result.reason or "")
    assert result.tokens == bw.generate(loop, tokenizer, PROMPT, 20, mode="static").tokens
    with pytest.raises(bw.errors.BitwrightError, match="mode 'cuda-graph' is not for this model"):
        bw.generate(loop, tokenizer, PROMPT, 20, mode="cuda-graph")
    assert torch.cuda.get_sync_debug_mode() == 0
    torch.randn(3, device="cuda").sum().item()
    assert bw.generate(stacked, tokenizer, PROMPT, 20).mode == "cuda-graph"


def test_a_failed_recording_leaves_cuda_usable(packed_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait that the rehearsal misses is met while recording."""
    from contextlib import nullcontext

    from bitwright.nn import graphs

    folder = packed_folder("mixtral")
    monkeypatch.setattr(QuantExperts, "stack", lambda self: None)
    monkeypatch.setattr(graphs, "_waiting_is_an_error", nullcontext)
    loop = load(folder, dtype=torch.bfloat16, device="cuda")
    result = bw.generate(loop, tokenizer_of(folder), PROMPT, 20)
    assert result.mode == "static" and result.reason
    assert result.tokens == bw.generate(loop, tokenizer_of(folder), PROMPT, 20, mode="static").tokens
    assert math.isfinite(torch.randn(3, device="cuda").sum().item())


def test_kernel_of_experts_is_named(packed_folder) -> None:
    model = load(packed_folder("mixtral"), dtype=torch.float16, device="cuda")
    stacks = [m for m in model.modules() if isinstance(m, ExpertStack)]
    assert {m.packed.kernel for m in stacks} == {FASTEST}
    assert {name for name, _ in model.model.layers[0].mlp.experts.named_children()} == {experts.GATE_UP, experts.DOWN}
