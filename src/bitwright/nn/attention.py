"""Ways around slow attention for one query at a time, which is what decoding asks for.

*On a CPU.* torch's attention is several times slower in bfloat16 than in float32 when there is a single query (torch
2.13, 9 heads, 1025 keys, one thread: 0.82 ms against 0.09 ms), and packed models run in bfloat16. Here a single query
is answered in float32: keys and values are widened as they are used, one layer at a time, before they are repeated for
grouped heads; the cache stays as it is. Without it, a small packed model is slower than its float32 original at a
context of 1500 tokens.

*On a Hopper GPU.* Over a cache of fixed size torch reads all of it, masked, and gives every head one program. Within
`counted` a kernel of ours reads as many keys as there are, cut among processors (`kernels.nvrtc.decode_attention`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from bitwright.kernels.nvrtc import decode_attention
from bitwright.kernels.problem import cuda_features

NAME, GPU_NAME = "bitwright_cpu", "bitwright_gpu"
# Options of transformers that change what attention is: whoever uses one gets torch's.
_OTHERS = ("softcap", "s_aux", "position_bias", "sliding_window", "cache")
_ALIGNMENT = 16  # bytes, of what the kernel copies
# Lengths of the sequences, and for how many tokens there is room.
_counted: ContextVar[tuple[Tensor, int] | None] = ContextVar("counted", default=None)


def widen_single_queries(model: Any) -> bool:
    """Let a transformers model attend to single queries in float32.

    False, and nothing done, if its attention is not torch's own or cannot be exchanged. Registers the function with
    transformers under `NAME`.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        """query [B, heads, Q, D] -> [B, Q, heads, D], as transformers' own for torch's attention."""
        dtype = query.dtype
        if query.shape[2] != 1 or dtype == torch.float32:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **options)
        return output.to(dtype), None

    if model.config._attn_implementation != "sdpa" or not getattr(model, "_supports_attention_backend", False):
        return False
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return True


def counts(model: Any) -> bool:
    """Whether `counted` can be used for a transformers causal LM: a Hopper GPU, torch's attention, every key seen."""
    config = model.config.get_text_config(decoder=True)
    return (
        model.device.type == "cuda"
        and cuda_features(model.device) >= decode_attention.FEATURES
        and config._attn_implementation == "sdpa"
        and bool(getattr(model, "_supports_attention_backend", False))
        and sees_all(config)
    )


def sees_all(config: Any) -> bool:
    """Whether every layer of a transformers text config attends to all tokens before."""
    layers = set(getattr(config, "layer_types", None) or ())
    slides = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return layers <= {"full_attention"} and not slides


@contextmanager
def counted(model: Any, lengths: Tensor, room: int) -> Iterator[None]:
    """Within, single queries of a `model` that `counts` see the first lengths[b] keys of sequence b's static cache.

    lengths: int32 [B] on the device, the query's own key counted. room: keys of the cache. What masks hide is not
    looked at; what the kernel does not take goes to torch.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(GPU_NAME, _attention)
    AttentionMaskInterface.register(GPU_NAME, sdpa_mask)
    config = model.config.get_text_config(decoder=True)
    before, token = config._attn_implementation_internal, _counted.set((lengths, room))
    config._attn_implementation_internal = GPU_NAME  # of this config alone, not of those inside it
    try:
        yield
    finally:
        config._attn_implementation_internal = before
        _counted.reset(token)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """query [B, heads, 1, D], key and value [B, kv_heads, S, D] -> [B, 1, heads, D]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    found = _counted.get()
    if found is None or not _takes(query, key, value, attention_mask, *found, options):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    B, heads, _, D = query.shape
    scale = options.get("scaling")
    queries = query.reshape(B, heads, D).contiguous()
    y = decode_attention.attend(queries, key, value, found[0], D**-0.5 if scale is None else scale)
    return y.view(B, 1, heads, D), None


def _takes(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, lengths: Tensor, room: int, options: dict[str, Any]
) -> bool:
    """Whether it is one query of every sequence over all of the cache, as the kernel can read it."""
    B, heads, Q, D = query.shape
    return (
        Q == 1
        and len(lengths) == B
        and (mask is None or mask.dtype == torch.bool)  # a mask of numbers may hold a bias
        and query.dtype in (torch.bfloat16, torch.float16)
        and all(t.dtype == query.dtype and t.device == lengths.device for t in (query, key, value))
        and key.shape == value.shape == (B, key.shape[1], room, D)
        and all(t.is_contiguous() and t.data_ptr() % _ALIGNMENT == 0 for t in (key, value))
        and decode_attention.takes(heads, key.shape[1], D)
        and not any(options.get(name) is not None for name in _OTHERS)
        and not options.get("dropout")
    )
