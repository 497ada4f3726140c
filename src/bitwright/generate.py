"""Text from a model: prompt in, continuation and its speed out.

On a GPU a decode step is recorded once as a CUDA graph over a cache of fixed size (`nn.graphs`) and replayed; what
cannot be recorded runs step by step, and the result says so. On a CPU the loop, the cache and the sampling are
transformers' own. A quantized folder runs packed either way. Greedy by default, so that two models, or a model before
and after quantization, can be compared word by word. torch and transformers are loaded by the first call.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.errors import BitwrightError, CheckpointError

MODES = ("auto", "transformers", "static", "cuda-graph")

_STEPS_PER_LOOK = (
    8  # steps between two looks for a stop token, so that a GPU need not wait; what comes after it is dropped
)


@dataclass(frozen=True)
class GenerationResult:
    """What was generated, and how fast.

    text: the continuation without special tokens. tokens: its ids, end-of-sequence included. seconds: prompt to last
    token; prefill_seconds: prompt to first token. tokens_per_second: of the tokens after the first (decoding alone),
    None if there was only one. mode: which loop ran, "transformers" (its own), "static" (a cache of fixed size) or
    "cuda-graph" (that, with the step recorded). reason: why not what "auto" tries first, or None. setup_seconds: making
    the cache and the graph, before all that; once per model and cache length, about 0 afterwards.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    seconds: float
    prefill_seconds: float
    tokens_per_second: float | None
    mode: str = "transformers"
    reason: str | None = None
    setup_seconds: float = 0.0

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
    mode: str = "auto",
) -> GenerationResult:
    """Continue a prompt with a KV cache.

    model, tokenizer: of transformers, loaded (see `bitwright.load`). max_new_tokens: at most; fewer if the model stops
    or has no position left. chat: wrap the prompt as a user's message with the tokenizer's chat template. temperature
    0 is greedy; above it, tokens are drawn from the top_p most likely mass, the same ones for the same seed and mode.
    mode: "auto" is a CUDA graph on a GPU, or as much of that as the model allows, and transformers' loop on a CPU; any
    other of `MODES` is done or refused. Raises CheckpointError if there is no chat template, BitwrightError for a
    prompt that is empty or has more tokens than the model has positions, and for other values that make no sense.
    """
    import torch

    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise BitwrightError(
            f"max_new_tokens {max_new_tokens}, temperature {temperature}, top_p {top_p}: they must be at least 1, at "
            "least 0, and in (0, 1]"
        )
    if mode not in MODES:
        raise BitwrightError(f"mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
    ids = _encode(tokenizer, prompt, chat)
    if not ids:
        raise BitwrightError("the prompt is empty and the tokenizer adds no token of its own; give a prompt")
    config = _config(model, tokenizer, _room(model, len(ids), max_new_tokens), temperature, top_p)
    batch = torch.tensor([ids], device=model.device)
    on_gpu = model.device.type == "cuda"
    if mode == "transformers" or (mode == "auto" and not on_gpu):
        run = _transformers_loop(model, batch, config, seed)
    else:
        run = _static_loop(model, batch, config, seed, mode)
    return GenerationResult(
        prompt=prompt,
        text=tokenizer.decode(run.tokens, skip_special_tokens=True),
        tokens=tuple(run.tokens),
        prompt_tokens=len(ids),
        seconds=run.last - run.started,
        prefill_seconds=run.first - run.started,
        tokens_per_second=(len(run.tokens) - 1) / (run.last - run.first) if len(run.tokens) > 1 else None,
        mode=run.mode,
        reason=run.reason,
        setup_seconds=run.setup_seconds,
    )


@dataclass(frozen=True)
class _Run:
    """Tokens of a loop; when it began, had its first token and its last, by the clock."""

    tokens: list[int]
    started: float
    first: float
    last: float
    mode: str
    reason: str | None = None
    setup_seconds: float = 0.0


def _transformers_loop(model: Any, batch: Any, config: Any, seed: int) -> _Run:
    import torch

    clock = _Clock()
    started = time.perf_counter()
    # The draw must not disturb the caller's random state.
    devices = [model.device.index or 0] if model.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=batch, attention_mask=torch.ones_like(batch), generation_config=config, streamer=clock
        )
    tokens = output[0, batch.shape[1] :].tolist()
    return _Run(tokens, started, clock.stamps[0], clock.stamps[-1], "transformers")


def _static_loop(model: Any, batch: Any, config: Any, seed: int, mode: str) -> _Run:
    """Prefill, then one step after the other, the host looking at tokens now and then only."""
    import torch

    from bitwright.nn.graphs import Unsupported, decoder

    before = time.perf_counter()
    room = batch.shape[1] + config.max_new_tokens - 1  # the last token is not read
    try:
        steps = decoder(model, room, graph=mode != "static")
    except Unsupported as e:
        if mode != "auto":
            raise BitwrightError(f"mode {mode!r} is not for this model: {e}; use 'auto' or 'transformers'") from e
        return dataclasses.replace(_transformers_loop(model, batch, config, seed), reason=str(e))
    if mode == "cuda-graph" and not steps.graphed:
        raise BitwrightError(f"mode {mode!r} is not for this model: {steps.reason}; use 'auto' or 'static'")
    draw = _drawing(config, seed, batch.device)
    stops = config.eos_token_id
    stops = set(stops if isinstance(stops, list) else [] if stops is None else [stops])
    started = time.perf_counter()
    token = draw(steps.prefill(batch))
    tokens = token.tolist()
    first = last = time.perf_counter()
    while len(tokens) < config.max_new_tokens and tokens[-1] not in stops:
        drawn = []
        for _ in range(min(_STEPS_PER_LOOK, config.max_new_tokens - len(tokens))):
            token = draw(steps.step(token))
            drawn.append(token)
        looked = torch.cat(drawn).tolist()
        end = next((i + 1 for i, t in enumerate(looked) if t in stops), len(looked))
        tokens += looked[:end]
        last = time.perf_counter()
    kind = "cuda-graph" if steps.graphed else "static"
    return _Run(tokens, started, first, last, kind, steps.reason, started - before)


def _drawing(config: Any, seed: int, device: Any) -> Callable[[Any], Any]:
    """A function from logits [B, V] to tokens [B] that never waits for the device."""
    import torch

    if not config.do_sample:
        return lambda logits: logits.argmax(dim=-1)
    generator = torch.Generator(device).manual_seed(seed)

    def draw(logits: Any) -> Any:
        p = torch.softmax(logits.float() / config.temperature, dim=-1)
        if config.top_p < 1:
            p, index = p.sort(dim=-1, descending=True, stable=True)
            p = p.masked_fill(p.cumsum(dim=-1) - p >= config.top_p, 0.0)  # the first one always stays
            p = torch.zeros_like(p).scatter_(-1, index, p)
        # The largest p / noise is a draw from p (a race of exponentials); torch.multinomial would look at its input.
        return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(dim=-1)

    return draw


def _room(model: Any, prompt_tokens: int, max_new_tokens: int) -> int:
    """max_new_tokens, or as many as the model has positions for; BitwrightError if the prompt alone has too many."""
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if not isinstance(limit, int) or limit < 1 or rope.get("rope_type") == "dynamic":
        return max_new_tokens
    if prompt_tokens > limit:
        raise BitwrightError(
            f"the prompt has {prompt_tokens} tokens, but the model has {limit} positions; give a shorter prompt"
        )
    return min(max_new_tokens, limit - prompt_tokens + 1)  # the last token is not read


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
