"""Decoding over a key-value cache of fixed size, with one decode step as a CUDA graph.

A decode step of a small or packed model is hundreds of kernels of a few microseconds each; started one by one from
Python, the GPU mostly waits. Recorded once as a CUDA graph, the whole step is one launch. For that nothing in the step
may depend on values the host knows: the cache has its full length from the start (a multiple of `BUCKET`, so that few
lengths share a graph), tokens and positions lie in buffers that the step reads and advances, and the cache counts its
own length on the device.

The cache is made of transformers' `StaticLayer` for every layer, those with a sliding window included: transformers
masks what lies outside the window, and its own sliding layer counts in Python, which a graph cannot replay. Masks are
transformers' own too, made in the step from the length on the device.

Models built like Llama or OPT take that step by kernels that each do the work of several of torch's (`fused`), once
these have given the same as transformers.

What cannot be recorded (a step that waits for the device: experts run in a loop, rotary tables that depend on the
length) runs step by step over the same cache, and says why. What cannot use such a cache at all is `Unsupported`.
"""

from __future__ import annotations

import inspect
import logging
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import BitwrightError
from bitwright.kernels.problem import TRITON, cuda_features
from bitwright.nn.anatomy import anatomy
from bitwright.nn.attention import NAME, counted, counts
from bitwright.nn.constants import Constants
from bitwright.nn.fused import Anatomy, FusedStep, Unknown
from bitwright.nn.packed import PackedModule
from bitwright.nn.proof import Left, apart, fill, left

logger = logging.getLogger(__name__)

BUCKET = 256  # cache lengths are multiples of this; also what attention kernels like
ATTENTION = ("sdpa", "eager", NAME)  # those that mask a cache longer than what it holds
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_KEPT = 2  # decoders per model: each holds a cache of its own
# How far from what transformers leaves a fused step may be: relative, or in distances of transformers from itself.
_FAR, _NOISE, _FARTHEST = 0.05, 3.0, 0.15
_PROOF = 12  # tokens that it is proved with


class Unsupported(Exception):
    """A model that cannot decode over a cache of fixed size; the message is the reason."""


def refuse(model: Any) -> str | None:
    """None if a transformers causal LM can decode over a static cache as far as its config tells, else why not."""
    from transformers.cache_utils import StaticCache, StaticLayer, StaticSlidingWindowLayer

    config = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        return "it has an encoder"
    if config._attn_implementation not in ATTENTION:
        return f"attention {config._attn_implementation!r} is none of {', '.join(ATTENTION)}"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "its forward takes no position_ids"
    unknown = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if unknown:
        return f"it has layers of type {', '.join(sorted(unknown))}"
    try:
        kinds = {type(layer) for layer in StaticCache(config=config, max_cache_len=1).layers}
    except (ValueError, KeyError, AttributeError, TypeError) as e:
        return f"transformers makes no static cache for it: {_line(e)}"
    if not kinds <= {StaticLayer, StaticSlidingWindowLayer}:
        return f"its cache needs {', '.join(sorted(k.__name__ for k in kinds))}"
    return None


class StaticDecoder:
    """A cache for `batch` sequences of equal length, up to `length` (3 or more) tokens each, and the step that extends
    them.

    graph: record the step as a CUDA graph (a CUDA model only). `graphed` tells whether that worked, `reason` why not.
    parts: what the step is to be made of instead of transformers' modules; `fused` tells whether it is.
    Making one runs the model on a token or two, so kernels are compiled and errors come here: Unsupported. The model
    is not held (its modules are, by a fused step); its weights must stay where they are (`decoder` sees to that).
    """

    def __init__(
        self, model: Any, length: int, batch: int = 1, *, graph: bool = False, parts: Anatomy | None = None
    ) -> None:
        from transformers.cache_utils import Cache, StaticLayer

        refusal = refuse(model)
        if refusal is not None:
            raise Unsupported(refusal)
        if length < 3 or batch < 1:
            raise BitwrightError(f"a cache for {batch} sequences of {length} tokens: at least 1 of 3 are needed")
        self.length, self.batch, self.used = length, batch, 0
        self.reason: str | None = None
        self._model = weakref.ref(model)
        self._constants = Constants()  # held, because a graph reads them at every replay
        self._short_mask = True
        self._names = frozenset(inspect.signature(model.forward).parameters)
        self._device = model.device
        self._counts = counts(model)
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        with self._plain_tensors():
            self._cache = Cache(layers=[StaticLayer(max_cache_len=length) for _ in range(layers)])
            self._tokens = torch.zeros(batch, 1, dtype=torch.long, device=self._device)
            self._positions = torch.zeros_like(self._tokens)
            self._mask = torch.ones(batch, length, dtype=torch.long, device=self._device)
            self._graph: torch.cuda.CUDAGraph | None = None
            self._logits: Tensor | None = None
            self._fused: FusedStep | None = None
            self._try()
            if parts is not None:
                self._fuse(parts)
            if graph:
                self._record()

    @property
    def graphed(self) -> bool:
        """Whether a step is one replay of a CUDA graph."""
        return self._graph is not None

    @property
    def fused(self) -> bool:
        """Whether the step is made of fused kernels."""
        return self._fused is not None

    def prefill(self, ids: Tensor) -> Tensor:
        """Forget everything, read prompts [batch, T] and return the logits [batch, V] of what follows.

        BitwrightError if they are longer than the cache.
        """
        tokens = ids.shape[1]
        if tokens > self.length:
            raise BitwrightError(f"{tokens} tokens do not fit a cache of {self.length}; make a longer one")
        with self._plain_tensors():
            self._cache.reset()  # zeros: what is masked is still multiplied, and NaN would survive that
            positions = torch.arange(tokens, device=self._device).expand(self.batch, -1)
            mask = torch.ones_like(ids) if self._short_mask else self._mask
            logits = self._forward(ids, mask, positions)
            self._positions.fill_(tokens)
        self.used = tokens
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens [batch] and return the logits [batch, V] of what follows; the next step overwrites them.

        Nothing here waits for the device. BitwrightError if the cache is full.
        """
        if self.used >= self.length:
            raise BitwrightError(f"the cache is full with {self.length} tokens; make a longer one")
        with self._plain_tensors():
            self._tokens.copy_(tokens.view(self.batch, 1))
            if self._graph is not None:
                self._graph.replay()
            else:
                self._logits = self._one_step()
        self.used += 1
        assert self._logits is not None
        return self._logits

    @contextmanager
    def _plain_tensors(self) -> Iterator[None]:
        """No gradients, and no inference mode: tensors made in it could not be written to outside; on our GPU."""
        on_device = torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()
        with torch.inference_mode(False), torch.no_grad(), on_device:
            yield

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Logits [batch, V] after the last of ids [batch, T]; mask [batch, T or length], positions [batch, T]."""
        model = self._model()
        assert model is not None, "a decoder does not outlive its model"
        options: dict[str, Any] = {"position_ids": positions}
        if "logits_to_keep" in self._names:
            options["logits_to_keep"] = 1
        if "cache_position" in self._names:  # code that comes with a model may still ask for it
            options["cache_position"] = positions[0]
        output = model(input_ids=ids, attention_mask=mask, past_key_values=self._cache, use_cache=True, **options)
        return output.logits[:, -1]

    def _one_step(self) -> Tensor:
        if self._fused is not None:
            logits = self._fused(self._tokens, self._positions)
            self._positions.add_(1)
            return logits
        model, lengths = self._model(), (self._positions[:, 0] + 1).to(torch.int32)
        with counted(model, lengths, self.length) if self._counts and self._short_mask else nullcontext():
            logits = self._forward(self._tokens, self._mask, self._positions)
        self._positions.add_(1)
        return logits

    def _rewind(self, used: int) -> None:
        """Back to `used` tokens, the lengths that the cache counts included; what lies beyond is masked."""
        self._positions.fill_(used)
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(used)

    def _try(self) -> None:
        """A prompt of two tokens, and a step: Unsupported if the model fails or does not keep its past in our cache."""
        ids = torch.zeros(self.batch, 2, dtype=torch.long, device=self._device)
        try:
            try:
                self.prefill(ids)
            except RuntimeError:
                # A mask as long as the prompt lets attention skip the empty cache. Models that make their position
                # bias from the mask (ALiBi) need it as long as the cache.
                self._short_mask = False
                self.prefill(ids)
            held = [int(layer.get_seq_length()) for layer in self._cache.layers]
            if set(held) != {2}:
                raise Unsupported("it does not fill the cache that it is given")
            try:
                self._one_step()
            except RuntimeError as e:
                if not self._counts or isinstance(e, torch.OutOfMemoryError):
                    raise
                logger.warning("attention of single queries is torch's: %s", _line(e))
                self._counts = False
                self._rewind(2)
                self._one_step()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as e:
            raise Unsupported(f"it fails with a static cache: {_line(e)}") from e
        self._rewind(2)

    def _fuse(self, parts: Anatomy) -> None:
        """Take the fused step from now on, if it gives what transformers' modules give after the same tokens."""
        ids = torch.randint(parts.vocabulary, (self.batch, _PROOF), generator=torch.Generator().manual_seed(0))
        end = min(self.length, parts.places or self.length)
        ids = ids.to(self._device)[:, :end]
        half, T = ids.shape[1] // 2, ids.shape[1]
        try:
            step = FusedStep(parts, self._cache.layers, self.batch, self.length)
            self.prefill(ids[:, :half])
            found, expected = self._after(ids[:, half:], half, step)
            # At the end of the cache, too, full of noise: what is otherwise far away, or with many keys, shows there.
            fill(self._cache.layers)
            far = end - (T - half)
            self._rewind(far)
            distance, limit = max(apart(found, expected), apart(*self._after(ids[:, half:], far, step))), _FAR
            if not distance <= limit:
                # The deeper the model, the more of roundings: what transformers' own prompts and steps differ by tells.
                prompts = [left(self.prefill(ids[:, : t + 1]), self._cache.layers, t) for t in range(half, T)]
                limit = min(_FARTHEST, _NOISE * apart(prompts, expected))
            if not distance <= limit:
                raise Unknown(f"its logits or its cache differ by {distance:.1%} from transformers'")
            self._fused = step
        except torch.OutOfMemoryError:
            raise
        except Exception as e:  # whatever kernels, and modules that only look like Llama's, may raise
            logger.info("%s decodes by transformers' own modules: %s", type(self._model()).__name__, _line(e))
        self._rewind(2)

    def _after(self, ids: Tensor, used: int, step: FusedStep) -> tuple[list[Left], list[Left]]:
        """What tokens ids [batch, n] leave by `step`, and by transformers' modules, which each of them goes on from."""
        found, expected = [], []
        for t in range(used, used + ids.shape[1]):
            self._tokens.copy_(ids[:, t - used, None])
            found.append(left(step(self._tokens, self._positions), self._cache.layers, t))
            expected.append(left(self._one_step(), self._cache.layers, t))
        return found, expected

    def _record(self) -> None:
        """The step as a CUDA graph, or `reason`."""
        if self._device.type != "cuda":
            self.reason = f"CUDA graphs need a CUDA device, and the model is on {self._device}"
            return
        if len(set(getattr(self._model(), "hf_device_map", {}).values())) > 1:
            self.reason = "the model is spread over several devices"
            return
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(self._device)
        with self._constants:
            try:
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    self._one_step()  # kernels tune themselves here, and cuBLAS takes its workspace of this stream
                    self._rewind(2)
                    # A wait found here is named, and leaves nothing behind; one found while recording does.
                    with _waiting_is_an_error():
                        self._one_step()
                    self._rewind(2)
                torch.cuda.current_stream().wait_stream(stream)
                with torch.cuda.graph(graph, stream=stream):
                    self._logits = self._one_step()
                self._graph = graph
            except RuntimeError as e:
                self._logits, self.reason = None, _line(e)
                # torch leaves its random generator recording when a recording fails; one that succeeds ends that.
                with torch.cuda.graph(torch.cuda.CUDAGraph()):
                    self._positions.add_(0)
                if isinstance(e, torch.OutOfMemoryError):
                    raise
            torch.cuda.synchronize()
        self._rewind(2)


@dataclass
class _Kept:
    """What is remembered of a model while it lives: decoders by their shape, and why there are none."""

    state: tuple[Any, ...]
    parts: Anatomy | None = None
    decoders: dict[tuple[int, int, bool], StaticDecoder] = field(default_factory=dict)
    refusal: str | None = None


_kept: weakref.WeakKeyDictionary[Any, _Kept] = weakref.WeakKeyDictionary()


def decoder(model: Any, tokens: int, batch: int = 1, *, graph: bool | None = None) -> StaticDecoder:
    """A StaticDecoder with room for `tokens` tokens in each of `batch` sequences; made once per model and length.

    graph: None = where the model is on a CUDA device. The last few are kept with the model, and dropped when it goes
    or its weights are replaced. Raises Unsupported; that, and a step that cannot be recorded, is logged once a model.
    """
    graph = model.device.type == "cuda" if graph is None else graph
    key = (max(1, -(-tokens // BUCKET)) * BUCKET, batch, graph)
    kept, state = _kept.get(model), _state(model)
    if kept is None or kept.state != state:
        kept = None
        _kept.pop(model, None)  # before weights move: what it holds of them goes
        parts = _parts(model)
        kept = _kept[model] = _Kept(_state(model), parts)
    if kept.refusal is not None:
        raise Unsupported(kept.refusal)
    found = kept.decoders.pop(key, None)
    if found is None:
        told = any(d.reason for d in kept.decoders.values())
        while len(kept.decoders) >= _KEPT:
            kept.decoders.pop(next(iter(kept.decoders)))
        try:
            try:
                found = StaticDecoder(model, key[0], batch, graph=graph, parts=kept.parts)
            except torch.OutOfMemoryError:
                kept.decoders.clear()  # their caches and graphs may be what is in the way
                torch.cuda.empty_cache()
                found = StaticDecoder(model, key[0], batch, graph=graph, parts=kept.parts)
        except Unsupported as e:
            kept.refusal = str(e)
            logger.warning("%s decodes with transformers' own loop: %s", type(model).__name__, e)
            raise
        if not found.fused:
            kept.parts = None  # not to be tried again
        if found.reason is not None and not told:
            logger.warning("%s decodes without a CUDA graph: %s", type(model).__name__, found.reason)
    kept.decoders[key] = found  # last in order: the one to go last
    return found


def _parts(model: Any) -> Anatomy | None:
    """What a fused step of the model is made of, None where there is none: its kernels are Triton's, for one GPU.

    Weights that are joined for it move: decoders made before must not be used any more.
    """
    several = len(set(getattr(model, "hf_device_map", {}).values())) > 1
    if model.device.type != "cuda" or several or TRITON not in cuda_features(model.device) or refuse(model) is not None:
        return None
    try:
        return anatomy(model)
    except (Unknown, AttributeError, TypeError, ZeroDivisionError, torch.OutOfMemoryError) as e:
        logger.info("%s decodes by transformers' own modules: %s", type(model).__name__, _line(e))
        return None


def _state(model: Any) -> tuple[Any, ...]:
    """Equal as long as a recorded step is still that of the model: its tensors and how it attends."""
    tensors = (*model.parameters(), *model.buffers())
    packed = (t.data_ptr() for m in model.modules() if isinstance(m, PackedModule) for t in m.packed.tensors)
    return (model.config.get_text_config(decoder=True)._attn_implementation, *(t.data_ptr() for t in tensors), *packed)


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    """Within, torch raises wherever the host would wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this mode a prototype, every time
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _line(error: Exception) -> str:
    """The error's message on one line, or its kind if it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__
