"""Text from a model: prompt in, continuation and its speed out.

The loop, the KV cache and the sampling are transformers' own; a quantized folder runs packed. Greedy by default, so
that two models, or a model before and after quantization, can be compared word by word. torch and transformers are
loaded by the first call.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.errors import BitwrightError, CheckpointError


@dataclass(frozen=True)
class GenerationResult:
    """What was generated, and how fast.

    text: the continuation without special tokens. tokens: its ids, end-of-sequence included. seconds: the whole call
    after loading; prefill_seconds: up to the first token. tokens_per_second: of the tokens after the first (decoding
    alone), None if there was only one.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    seconds: float
    prefill_seconds: float
    tokens_per_second: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for json.dumps."""
        return dataclasses.asdict(self)


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 64,
    *,
    chat: bool = False,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> GenerationResult:
    """Continue a prompt with a KV cache.

    model, tokenizer: of transformers, loaded (see `bitwright.load`). chat: wrap the prompt as a user's message with the
    tokenizer's chat template. temperature 0 is greedy; above it, tokens are drawn from the top_p most likely mass, the
    same ones for the same seed. Raises CheckpointError if there is no chat template, BitwrightError for other values
    that make no sense.
    """
    import torch

    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise BitwrightError(
            f"max_new_tokens {max_new_tokens}, temperature {temperature}, top_p {top_p}: they must be at least 1, at "
            "least 0, and in (0, 1]"
        )
    ids = _encode(tokenizer, prompt, chat)
    if not ids:
        raise BitwrightError("the prompt is empty and the tokenizer adds no token of its own; give a prompt")
    batch = torch.tensor([ids], device=model.device)
    clock = _Clock()
    started = time.perf_counter()
    # The draw must not disturb the caller's random state.
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=batch,
            attention_mask=torch.ones_like(batch),
            generation_config=_config(model, tokenizer, max_new_tokens, temperature, top_p),
            streamer=clock,
        )
    tokens = tuple(output[0, len(ids) :].tolist())
    first, last = clock.stamps[0], clock.stamps[-1]
    return GenerationResult(
        prompt=prompt,
        text=tokenizer.decode(list(tokens), skip_special_tokens=True),
        tokens=tokens,
        prompt_tokens=len(ids),
        seconds=last - started,
        prefill_seconds=first - started,
        tokens_per_second=(len(tokens) - 1) / (last - first) if len(tokens) > 1 else None,
    )


class _Clock:
    """A transformers streamer that only notes when each token came; the first `put` hands over the prompt."""

    def __init__(self) -> None:
        self.stamps: list[float] = []
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        if self._prompt_seen:
            self.stamps.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        pass


def _encode(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    if not chat:
        return list(tokenizer(prompt)["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        where = Path(str(tokenizer.name_or_path)).name or "this model"
        raise CheckpointError(f"the tokenizer of {where} has no chat template; generate without chat")
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _config(model: Any, tokenizer: Any, max_new_tokens: int, temperature: float, top_p: float) -> Any:
    """A fresh generation config: only the model's stop and padding tokens carry over, none of its sampling habits."""
    from transformers import GenerationConfig

    own = model.generation_config
    stop = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    pad = own.pad_token_id if own.pad_token_id is not None else tokenizer.pad_token_id
    if pad is None and stop is not None:
        pad = stop[0] if isinstance(stop, list) else stop
    # Whatever is left unset here, transformers fills in from the model's own config; so every habit is set.
    unused = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}  # the values that transformers takes for "not set"
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else unused
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=stop,
        pad_token_id=pad,
        use_cache=True,
        num_beams=1,
        do_sample=temperature > 0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        **sampling,
    )
