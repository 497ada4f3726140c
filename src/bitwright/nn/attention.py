"""A way around slow attention for one query at a time, which is what decoding asks for.

torch's attention on a CPU is several times slower in bfloat16 than in float32 when there is a single query (torch 2.13,
9 heads, 1025 keys, one thread: 0.82 ms against 0.09 ms), and packed models run in bfloat16. Here a single query is
answered in float32: keys and values are widened as they are used, one layer at a time, before they are repeated for
grouped heads; the cache stays as it is. Without it, a small packed model is slower than its float32 original at a
context of 1500 tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAME = "bitwright_cpu"


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
