"""Generation against the slow loop without a cache."""

from __future__ import annotations

import pytest
import torch

import bitwright as bw
from bitwright.errors import BitwrightError, CheckpointError

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return transformers.AutoTokenizer.from_pretrained(tiny_folder("llama"))


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama", tie_word_embeddings=False)


def slow_greedy(model, ids: list[int], count: int, stop: int) -> list[int]:
    """The whole sequence again for every token, no cache."""
    new: list[int] = []
    while len(new) < count and (not new or new[-1] != stop):
        with torch.no_grad():
            new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


def test_greedy_is_the_slow_loop(model, tokenizer) -> None:
    ids = tokenizer("The state of")["input_ids"]
    expected = slow_greedy(model, ids, 24, 1)
    result = bw.generate(model, tokenizer, "The state of", 24)
    assert list(result.tokens) == expected
    assert result.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert (result.prompt, result.prompt_tokens) == ("The state of", len(ids))
    assert result.seconds >= result.prefill_seconds > 0
    decode_seconds = result.seconds - result.prefill_seconds
    assert result.tokens_per_second == pytest.approx((len(expected) - 1) / decode_seconds)


def test_stops_at_the_end_token(model, tokenizer) -> None:
    ids = tokenizer("The state of")["input_ids"]
    stop = slow_greedy(model, ids, 24, -1)[5]
    config = model.generation_config
    before = config.eos_token_id
    try:
        config.eos_token_id = stop
        result = bw.generate(model, tokenizer, "The state of", 24)
    finally:
        config.eos_token_id = before
    assert list(result.tokens) == slow_greedy(model, ids, 24, stop)
    assert len(result.tokens) <= 6


def test_one_token_has_no_decode_speed(model, tokenizer) -> None:
    result = bw.generate(model, tokenizer, "a", 1)
    assert len(result.tokens) == 1
    assert result.tokens_per_second is None


def test_sampling_follows_its_seed_and_leaves_the_callers_alone(model, tokenizer) -> None:
    state = torch.get_rng_state()
    one, same, other = (bw.generate(model, tokenizer, "a", 32, temperature=1.0, seed=s).tokens for s in (1, 1, 2))
    assert one == same != other
    assert torch.equal(state, torch.get_rng_state())
    nearly_greedy = bw.generate(model, tokenizer, "a", 16, temperature=1.0, top_p=1e-6)
    assert nearly_greedy.tokens == bw.generate(model, tokenizer, "a", 16).tokens


def test_sampling_settings_of_the_model_do_not_leak(model, tokenizer) -> None:
    """A checkpoint whose generation config asks for sampling is still read greedily."""
    greedy = bw.generate(model, tokenizer, "a", 16).tokens
    before = model.generation_config
    try:
        model.generation_config = transformers.GenerationConfig(
            do_sample=True, temperature=5.0, top_k=3, repetition_penalty=3.0, num_beams=2, eos_token_id=1
        )
        assert bw.generate(model, tokenizer, "a", 16).tokens == greedy
    finally:
        model.generation_config = before


def test_chat_uses_the_template(model, tokenizer) -> None:
    with pytest.raises(CheckpointError, match="no chat template"):
        bw.generate(model, tokenizer, "hello", 2, chat=True)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    try:
        chat = bw.generate(model, tokenizer, "hello", 8, chat=True)
    finally:
        tokenizer.chat_template = None
    assert chat.tokens == bw.generate(model, tokenizer, "<user>hello<assistant>", 8).tokens


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}])
def test_values_without_sense(model, tokenizer, wrong: dict) -> None:
    with pytest.raises(BitwrightError, match="must be at least 1"):
        bw.generate(model, tokenizer, "a", **wrong)


def test_empty_prompt(model, tokenizer) -> None:
    with pytest.raises(BitwrightError, match="prompt is empty"):
        bw.generate(model, tokenizer, "")


@pytest.mark.parametrize("text", ["a", "The state of", "The state of the union is"])
def test_static_cache_gives_the_same_tokens(model, tokenizer, text: str) -> None:
    own = bw.generate(model, tokenizer, text, 24)
    static = bw.generate(model, tokenizer, text, 24, mode="static")
    assert (own.mode, static.mode) == ("transformers", "static")
    assert (own.tokens, own.text) == (static.tokens, static.text)
    assert own.reason is None and static.reason is None and own.setup_seconds == 0 < static.setup_seconds
    assert static.seconds >= static.prefill_seconds > 0
    decode_seconds = static.seconds - static.prefill_seconds
    assert static.tokens_per_second == pytest.approx((len(static.tokens) - 1) / decode_seconds)


@pytest.mark.parametrize("place", [0, 1, 5, 8, 9, 23])
def test_static_loop_drops_what_follows_a_stop_token(model, tokenizer, place: int) -> None:
    """Wherever it falls between two looks, the last token and the first included."""
    ids = tokenizer("It was")["input_ids"]
    stop = slow_greedy(model, ids, 24, -1)[place]
    config = model.generation_config
    before = config.eos_token_id
    try:
        config.eos_token_id = [319, stop]
        result = bw.generate(model, tokenizer, "It was", 24, mode="static")
    finally:
        config.eos_token_id = before
    assert list(result.tokens) == slow_greedy(model, ids, 24, stop)


def test_static_sampling(model, tokenizer) -> None:
    state = torch.get_rng_state()
    options = {"temperature": 1.0, "mode": "static"}
    one, same, other = (bw.generate(model, tokenizer, "a", 32, seed=s, **options).tokens for s in (1, 1, 2))
    assert one == same != other
    assert torch.equal(state, torch.get_rng_state())
    nearly_greedy = bw.generate(model, tokenizer, "a", 16, top_p=1e-6, **options)
    assert nearly_greedy.tokens == bw.generate(model, tokenizer, "a", 16).tokens


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_draws_follow_their_probabilities(top_p: float) -> None:
    from bitwright.generate import _drawing

    p = torch.tensor([0.05, 0.5, 0.15, 0.3])
    config = transformers.GenerationConfig(do_sample=True, temperature=0.5, top_p=top_p)
    rows = 20000
    drawn = _drawing(config, 0, "cpu")((p.log() * 0.5).expand(rows, -1))
    expected = p if top_p == 1 else torch.tensor([0, 0.5, 0, 0.3]) / 0.8  # 0.5 + 0.3 is the first to reach 0.7
    found = torch.bincount(drawn, minlength=4) / rows
    assert (found - expected).abs().max() < 0.015
    assert top_p == 1 or set(drawn.tolist()) == {1, 3}


def test_modes_that_cannot_be(model, tokenizer) -> None:
    with pytest.raises(BitwrightError, match="mode 'fast' is unknown; choose one of auto, transformers, static"):
        bw.generate(model, tokenizer, "a", 4, mode="fast")
    with pytest.raises(BitwrightError, match="CUDA graphs need a CUDA device"):
        bw.generate(model, tokenizer, "a", 4, mode="cuda-graph")
    config = transformers.BloomConfig(vocab_size=320, hidden_size=32, n_layer=1, n_head=4, eos_token_id=1)
    bloom = transformers.BloomForCausalLM(config).eval()
    with pytest.raises(BitwrightError, match="its forward takes no position_ids; use 'auto'"):
        bw.generate(bloom, tokenizer, "a", 4, mode="static")
    assert bw.generate(bloom, tokenizer, "a", 4).mode == "transformers"


def test_auto_on_a_gpu_falls_back_and_says_why(model, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: the model says it is on one to those who ask for the mode, and cannot make a static cache."""
    from bitwright import generate as function  # the package binds the function over the module of this name
    from bitwright.nn import graphs

    def unsupported(*args, **kwargs):
        raise graphs.Unsupported("it is only a test")

    monkeypatch.setattr(graphs, "decoder", unsupported)
    run = function.__globals__["_static_loop"]
    ids = tokenizer("It was")["input_ids"]
    config = function.__globals__["_config"](model, tokenizer, 8, 0.0, 1.0)
    found = run(model, torch.tensor([ids]), config, 0, "auto")
    assert (found.mode, found.reason) == ("transformers", "it is only a test")
    assert found.tokens == slow_greedy(model, ids, 8, 1)


def test_positions_end(model, tokenizer) -> None:
    """128 positions: a longer prompt is refused, and generation stops where they do."""
    with pytest.raises(BitwrightError, match="the prompt has 129 tokens, but the model has 128 positions"):
        bw.generate(model, tokenizer, "x" * 129, 4)
    for mode in ("transformers", "static"):
        assert len(bw.generate(model, tokenizer, "x" * 126, 64, mode=mode).tokens) <= 3
    assert len(bw.generate(model, tokenizer, "x" * 128, 64, mode="static").tokens) == 1
