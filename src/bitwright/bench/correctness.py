"""Before a model is timed: a small one of its kind has to compute what its dequantized twin computes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitwright.bench.model import Decoder, State, make_model, make_state, make_tables
from bitwright.bench.shapes import ModelShape
from bitwright.bench.timing import capture
from bitwright.scheme import OutlierScheme, Scheme

_BATCH, _PROMPT, _STEPS = 3, 20, 4
# Relative Frobenius error of the logits after two blocks: a few roundings to 16 bits each. Where both models round
# activations, a difference in the last bit of an input sends some of them to the next code: at 4 bits a large step.
_LIMITS = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-3}
_LIMIT_ROUNDED = {8: 5e-2, 4: 0.25}


@dataclass(frozen=True)
class Verdict:
    """error: relative error of the logits, against `limit`. reason: None if all is well."""

    error: float
    limit: float
    reason: str | None


def tiny(shape: ModelShape) -> ModelShape:
    """A model of the same kind: norms, activation, experts, biases, grouped heads; two blocks, hidden 256."""
    return replace(
        shape,
        name=f"tiny {shape.name}",
        hidden=256,
        intermediate=384,
        heads=4,
        kv_heads=4 if shape.kv_heads == shape.heads else 2,
        head_dim=64,
        layers=2,
        vocab=320,
        context=64,
        positions=64 if shape.positions else 0,
    )


def check(shape: ModelShape, scheme: Scheme, dtype: torch.dtype, device: torch.device) -> Verdict:
    """Compare prefill and decoding of a tiny model with the same one dequantized, fed the same tokens.

    A router may send a token elsewhere for the last bit of its input, and its logits are then others: with experts the
    median over tokens is what is limited. On a GPU the step is also captured, and a replay has to equal the eager run.
    Of outlier columns the tiny model has the same share, for it is hardly wider than their number is in a large one.
    """
    small = tiny(shape)
    if scheme.outliers is not None:
        share = OutlierScheme(share=100 * scheme.outliers.columns(shape.hidden) / shape.hidden)
        scheme = replace(scheme, outliers=share).resolved(small.hidden)
    quantized = make_model(small, scheme, make_tables(small, dtype, device))
    logits, fed = _run(quantized, _state(small, dtype, device))
    expected, _ = _run(quantized.dense(), _state(small, dtype, device), fed)
    each = (logits.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)  # [1 + steps, batch]
    error = float(each.median() if shape.experts else each.max())
    limit = _LIMIT_ROUNDED.get(scheme.activation_bits, _LIMITS[dtype])
    if not error <= limit:  # NaN too
        return Verdict(error, limit, f"logits are off by {error:.2g} of their size, more than {limit:.2g}")
    if device.type == "cuda":
        again = _replayed(quantized, _state(small, dtype, device))
        if not torch.equal(again, logits[1:]):
            return Verdict(error, limit, "the replayed graph gives other logits than the eager run")
    return Verdict(error, limit, None)


def prompts(shape: ModelShape, batch: int, length: int, device: torch.device | str) -> Tensor:
    """Random ids int64 [batch, length], the same every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(shape.vocab, (batch, length), generator=generator).to(device)


def _state(shape: ModelShape, dtype: torch.dtype, device: torch.device) -> State:
    return make_state(shape, shape.layers, _BATCH, _PROMPT + _STEPS, dtype, device)


def _run(model: Decoder, state: State, fed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits [1 + steps, batch, vocab] of a prompt and some steps, and the tokens [steps, batch] that were fed.

    fed: feed these instead of the greedy ones.
    """
    logits = [model.prefill(state, prompts(model.shape, _BATCH, _PROMPT, state.ids.device))]
    used = []
    for i in range(_STEPS):
        if fed is not None:
            state.ids.copy_(fed[i])
        used.append(state.ids.clone())
        logits.append(model.step(state))
    return torch.stack(logits), torch.stack(used)


def _replayed(model: Decoder, state: State) -> Tensor:
    """Logits [steps, batch, vocab] of the same steps by one graph."""
    ids = prompts(model.shape, _BATCH, _PROMPT, state.ids.device)
    model.prefill(state, ids)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model.step(state)
    torch.cuda.synchronize()
    captured: list[Tensor] = []
    capture(lambda: captured.append(model.step(state)), graph, stream)
    (logits,) = captured
    model.prefill(state, ids)  # what the warm-up changed
    steps = []
    for _ in range(_STEPS):
        graph.replay()
        steps.append(logits.clone())
    return torch.stack(steps)
