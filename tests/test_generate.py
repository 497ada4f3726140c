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
