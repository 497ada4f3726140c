"""Decoding over a static cache, against transformers' own generation with its growing one (on a CPU, so no graphs)."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import pytest
import torch
from conftest import FAMILIES, VOCAB, build_tiny
from torch import Tensor

from bitwright.errors import BitwrightError
from bitwright.nn import attention, graphs
from bitwright.nn.constants import Constants
from bitwright.nn.graphs import StaticDecoder, Unsupported, decoder, refuse

transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 1,
}


def prompt(T: int, batch: int = 1) -> Tensor:
    return torch.randint(2, VOCAB, (batch, T), generator=torch.Generator().manual_seed(T))


def expected_tokens(model: Any, ids: Tensor, count: int) -> Tensor:
    """Greedy tokens [batch, count] of transformers' loop."""
    config = transformers.GenerationConfig(
        max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=1, bos_token_id=0
    )
    with torch.no_grad():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return output[:, ids.shape[1] :]


def greedy(steps: StaticDecoder, ids: Tensor, count: int) -> Tensor:
    tokens = [steps.prefill(ids).argmax(dim=-1)]
    while len(tokens) < count:
        tokens.append(steps.step(tokens[-1]).argmax(dim=-1))
    return torch.stack(tokens, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [24, 61])
def test_tokens_are_those_of_transformers(tiny_model, family: str, length: int) -> None:
    """Several prompts through one decoder, so that each must forget the one before; up to the last place."""
    model = tiny_model(family)
    steps = StaticDecoder(model, length)
    for T in (1, 7, 19, 2):
        count = min(14, length + 1 - T)
        expected = expected_tokens(model, prompt(T), count)
        assert torch.equal(greedy(steps, prompt(T), count), expected)
    assert len(expected_tokens(model, prompt(19), 14).unique()) > 1


def attend_reference(queries: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """What `decode_attention.attend` gives, sequence by sequence."""
    shared = queries.shape[1] // keys.shape[1]
    results = []
    for q, k, v, n in zip(queries, keys, values, lengths.tolist(), strict=True):
        k, v = (t[:, :n].float().repeat_interleave(shared, dim=0) for t in (k, v))
        p = (k @ q.float()[:, :, None] * scale).softmax(dim=1)
        results.append((p * v).sum(dim=1))
    return torch.stack(results).to(queries.dtype)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "mixtral", "gpt2", "gpt_bigcode"])
@pytest.mark.parametrize("batch", [1, 3])
def test_single_queries_by_a_kernel(tiny_model, monkeypatch: pytest.MonkeyPatch, family: str, batch: int) -> None:
    """As on a GPU, with the kernel's twin: steps alone ask it, with as many keys as there are, and give the same."""
    if family in ("gpt2", "gpt_bigcode"):  # queries are strided parts of a tensor with keys and values
        config = transformers.GPT2Config if family == "gpt2" else transformers.GPTBigCodeConfig
        more = {} if family == "gpt2" else {"multi_query": False}
        model = build_tiny(config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, **more))
    else:
        model = tiny_model(family)
    model = model.to(torch.bfloat16)
    expected, steps = StaticDecoder(model, 24, batch), 5
    asked: list[list[int]] = []

    def attend(queries: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float) -> Tensor:
        asked.append(lengths.tolist())
        assert keys.shape[2] == 24 and all(t.is_contiguous() for t in (queries, keys, values, lengths))
        return attend_reference(queries, keys, values, lengths, scale)

    monkeypatch.setattr(graphs, "counts", lambda model: True)
    monkeypatch.setattr(attention.decode_attention, "takes", lambda *sizes: True)
    monkeypatch.setattr(attention.decode_attention, "attend", attend)
    ours = StaticDecoder(model, 24, batch)
    asked.clear()  # making one tries a step
    torch.testing.assert_close(ours.prefill(prompt(7, batch)), expected.prefill(prompt(7, batch)))
    assert not asked
    for i in range(steps):
        token = prompt(i + 1, batch)[:, -1]
        torch.testing.assert_close(ours.step(token), expected.step(token), rtol=0.02, atol=0.02)
    layers = model.config.num_hidden_layers
    assert asked == [[8 + i] * batch for i in range(steps) for _ in range(layers)]
    assert model.config._attn_implementation == "sdpa"


def test_who_is_counted(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models on a Hopper GPU with torch's attention that see every key, no others."""
    monkeypatch.setattr(attention, "cuda_features", lambda device: attention.decode_attention.FEATURES)

    def on_gpu(model: Any, **changes: Any) -> Any:
        for name, value in changes.items():
            setattr(model.config, name, value)
        monkeypatch.setattr(type(model), "device", torch.device("cuda"))
        return model

    assert not attention.counts(tiny_model("llama"))
    assert attention.counts(on_gpu(tiny_model("llama"))) and attention.counts(on_gpu(tiny_model("mixtral")))
    assert not attention.counts(on_gpu(tiny_model("mixtral"), sliding_window=16))
    assert not attention.counts(on_gpu(tiny_model("llama"), _attn_implementation="eager"))
    assert not attention.counts(on_gpu(tiny_model("falcon"))), "it does not ask for attention by name"
    assert not attention.counts(on_gpu(tiny_model("llama"), layer_types=["full_attention", "sliding_attention"]))


@pytest.mark.parametrize("kind", ["Mistral", "Gemma3Text", "alibi"])
def test_windows_and_position_biases(tiny_model, kind: str) -> None:
    """Windows shorter than prompt and cache, in all layers or some; a bias made from the mask."""
    if kind == "alibi":
        model = tiny_model("falcon", alibi=True)
    else:
        config = getattr(transformers, f"{kind}Config")
        model = build_tiny(config(**TINY, num_hidden_layers=6, sliding_window=8, head_dim=8))
    steps = StaticDecoder(model, 48)
    for T in (3, 21):
        assert torch.equal(greedy(steps, prompt(T), 20), expected_tokens(model, prompt(T), 20))


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_eager_attention_and_batches(tiny_model, family: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    ids = prompt(9, batch=3)
    tokens = greedy(StaticDecoder(model, 32, batch=3), ids, 12)
    for row in range(3):
        assert torch.equal(tokens[row : row + 1], expected_tokens(model, ids[row : row + 1], 12))


def test_nan_of_one_prompt_does_not_reach_the_next(tiny_model) -> None:
    model = tiny_model("llama")
    steps = StaticDecoder(model, 32)
    before = steps.prefill(prompt(5)).clone()
    for layer in steps._cache.layers:
        layer.keys.fill_(torch.nan)
        layer.values.fill_(torch.nan)
    assert torch.equal(steps.prefill(prompt(5)), before)
    assert torch.isfinite(steps.step(torch.tensor([3]))).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_reads_nothing_on_the_host(tiny_model, family: str) -> None:
    """What cannot be recorded: values or shapes that depend on data."""
    from torch.utils._python_dispatch import TorchDispatchMode

    called: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    model = tiny_model(family)
    steps = StaticDecoder(model, 32)
    steps.prefill(prompt(5))
    with Watch():
        steps.step(torch.tensor([3]))
    assert not {"_local_scalar_dense", "nonzero", "_unique2", "bincount", "masked_select"} & set(called)
    assert "index_copy_" in called


def test_full_caches_say_so(tiny_model) -> None:
    model = tiny_model("llama")
    steps = StaticDecoder(model, 4)
    with pytest.raises(BitwrightError, match="5 tokens do not fit a cache of 4"):
        steps.prefill(prompt(5))
    steps.prefill(prompt(3))
    steps.step(torch.tensor([3]))
    with pytest.raises(BitwrightError, match="the cache is full with 4 tokens"):
        steps.step(torch.tensor([3]))
    assert steps.prefill(prompt(4)).shape == (1, VOCAB)


def test_what_cannot_decode_says_why(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    assert refuse(model) is None
    model.config._attn_implementation_internal = "flash_attention_2"
    assert refuse(model) == "attention 'flash_attention_2' is none of sdpa, eager, bitwright_cpu"
    bloom = build_tiny(transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4))
    assert refuse(bloom) == "its forward takes no position_ids"
    chunked = transformers.Llama4TextConfig(**TINY, num_hidden_layers=4, head_dim=8, num_local_experts=2)
    chunked._attn_implementation_internal = "sdpa"
    model = tiny_model("llama")
    monkeypatch.setattr(model, "config", chunked)
    assert refuse(model) == "it has layers of type chunked_attention"
    with pytest.raises(Unsupported, match="layers of type chunked_attention"):
        StaticDecoder(model, 16)


def test_a_model_that_ignores_the_cache_is_found_out(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    inner = model.model.forward

    def forgetful(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", forgetful)
    with pytest.raises(Unsupported, match="does not fill the cache"):
        StaticDecoder(model, 16)
    monkeypatch.setattr(model.model, "forward", lambda **_: [][0])
    with pytest.raises(Unsupported, match="fails with a static cache: list index out of range"):
        StaticDecoder(model, 16)


def test_decoders_are_kept_with_their_model(tiny_model) -> None:
    model = tiny_model("llama")
    first = decoder(model, 20)
    assert (first.length, first.graphed, first.reason) == (graphs.BUCKET, False, None)
    assert decoder(model, graphs.BUCKET) is first
    longer = decoder(model, graphs.BUCKET + 1)
    assert longer.length == 2 * graphs.BUCKET
    assert decoder(model, 1) is first
    pair = decoder(model, 20, batch=2)  # the third: what was used longest ago goes
    assert pair.batch == 2 and decoder(model, 1) is first
    assert decoder(model, graphs.BUCKET + 1) is not longer
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 0.5)
    changed = decoder(model, 20)
    assert changed is not first, "a recorded step would read the old weights"
    assert torch.equal(greedy(changed, prompt(5), 9), expected_tokens(model, prompt(5), 9))
    gone = weakref.ref(model), weakref.ref(changed)
    del model, first, longer, pair, changed
    gc.collect()
    assert gone[0]() is None and gone[1]() is None


def test_reasons_are_logged_once(tiny_model, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger=graphs.logger.name)
    model = tiny_model("llama")
    for tokens in (20, 20, 300):
        assert decoder(model, tokens, graph=True).reason == "CUDA graphs need a CUDA device, and the model is on cpu"
    assert [r.getMessage() for r in caplog.records] == [
        "LlamaForCausalLM decodes without a CUDA graph: CUDA graphs need a CUDA device, and the model is on cpu"
    ]
    caplog.clear()
    bloom = build_tiny(transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4))
    for _ in range(2):
        with pytest.raises(Unsupported, match="no position_ids"):
            decoder(bloom, 20)
    assert len(caplog.records) == 1


def test_inference_mode_leaves_no_trace(tiny_model) -> None:
    """A cache made in inference mode could not be written to outside of it."""
    model = tiny_model("llama")
    with torch.inference_mode():
        steps = StaticDecoder(model, 32)
        inside = greedy(steps, prompt(5), 6)
    assert torch.equal(greedy(steps, prompt(5), 6), inside)


@pytest.mark.parametrize("new", [False, True])
def test_constants_are_made_once(tiny_model, new: bool) -> None:
    """Falcon indexes with lists, which would be copied to the device at every step."""
    from torch.utils._python_dispatch import TorchDispatchMode

    called: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    model = tiny_model("falcon", new_decoder_architecture=new, num_kv_heads=2)
    steps, token, constants = StaticDecoder(model, 32), torch.tensor([3]), Constants()
    made = []
    for _ in range(2):
        steps.prefill(prompt(5))
        called.clear()
        with constants, Watch():
            logits = steps.step(token)
        made.append(called.count("lift_fresh"))
    assert made == [2, 0], "[-2] and [-1], whatever the number of layers"
    steps.prefill(prompt(5))
    assert torch.equal(steps.step(token), logits)


def test_constants_mean_what_they_did() -> None:
    x = torch.arange(24.0).view(2, 3, 4)
    with Constants():
        for _ in range(2):
            assert torch.equal(x[[1, 0]], x.flip(0)) and torch.equal(x[..., [-2], :], x[:, 1:2])
            assert torch.equal(x[[True, False]], x[:1]) and torch.equal(x[:, 1, 2], torch.tensor([6.0, 18.0]))
            counter = torch.tensor(0)
            counter += 1
            assert counter.item() == 1, "a caller's own"
            assert torch.tensor(1).dtype == torch.int64 and torch.tensor(1, dtype=torch.float16).dtype == torch.float16
            assert torch.tensor(True).dtype == torch.bool and torch.tensor(1.0).item() == 1.0
