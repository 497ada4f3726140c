"""A decode step of models built like Llama, out of kernels that each do the work of several of torch's.

Between the linears of a block transformers starts some forty kernels of a few microseconds each, which is as long as
4-bit linears take. Here a block is: a norm (with the sum before it), one linear for q, k and v, attention that also
rotates and writes the cache, the output linear, a norm, one linear for gate and up, their product, the last linear.
Of experts in stacks the second norm chooses, too, and the next one adds up what they gave.

What a model is built of is read from the names of its modules (`anatomy`). Names prove nothing: `graphs` takes a step
only after it has given the logits of transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.kernels import attention
from bitwright.kernels.cuda import one_after_the_other
from bitwright.kernels.elementwise import add_norm, silu_mul
from bitwright.kernels.routing import Outputs, combine_norm, norm_route
from bitwright.nn.attention import sees_all
from bitwright.nn.experts import ExpertStack, QuantExperts
from bitwright.nn.linear import QuantLinear

Linear = Callable[[Tensor], Tensor]

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_HEAD_NORMS = ("q_norm", "k_norm")  # of Qwen3
_NORMS = ("input_layernorm", "post_attention_layernorm")
_GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")
_HEAD_DIMS = (16, 32, 64, 128, 256)
_SETTLED = ("default", "linear", "llama3", "yarn")  # kinds of rotary tables that do not depend on the length


class Unknown(Exception):
    """A model that is built otherwise; the message says where."""


@dataclass(frozen=True)
class Norm:
    """An RMSNorm: weight [H]."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor | Outputs | None, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of residual + x, residual + x); what experts gave is summed first."""
        if isinstance(x, Outputs):
            return combine_norm(x, residual, *self.values)
        return add_norm(x, residual, *self.values)

    def of_heads(self, x: Tensor) -> Tensor:
        """Every head of x [B, heads D] by itself, for a weight [D]."""
        return self(None, x.reshape(-1, len(self.weight)))[0].view(x.shape)

    @property
    def values(self) -> tuple[Tensor, None, float, bool]:
        """As the kernels take them: weight, no bias, eps, not centered."""
        return self.weight, None, self.eps, False


@dataclass(frozen=True)
class Experts:
    """Experts in stacks and their router [E, H]: of each token the `top_k` best, weighted by a softmax over them."""

    router: Tensor
    top_k: int
    up: ExpertStack
    down: ExpertStack

    def __call__(self, norm: Norm, x: Tensor, residual: Tensor) -> tuple[Outputs, Tensor]:
        """(what they make of the norm of residual + x, not summed yet, residual + x)."""
        rows, residual, routing = norm_route(x, residual, *norm.values, self.router, self.top_k)
        inner = silu_mul(self.up(rows, routing.offsets))
        return Outputs(self.down(inner, routing.offsets, settled=True), routing), residual


@dataclass(frozen=True)
class Block:
    """qkv: [B, H] -> [B, (heads + 2 kv_heads) D]; head_norms: of queries and of keys; mlp: [B, H] -> [B, H]."""

    norm: Norm
    qkv: Linear
    head_norms: tuple[Norm, Norm] | None
    o: Linear
    mlp_norm: Norm
    mlp: Linear | Experts

    def behind_attention(self, x: Tensor, residual: Tensor) -> tuple[Tensor | Outputs, Tensor]:
        """(what the MLP makes of the norm of residual + x, residual + x)."""
        if isinstance(self.mlp, Experts):
            return self.mlp(self.mlp_norm, x, residual)
        y, residual = self.mlp_norm(x, residual)
        return self.mlp(y), residual


@dataclass(frozen=True)
class Anatomy:
    """What a step of a model is made of. rotary: the module that makes its tables."""

    embedding: nn.Module
    rotary: nn.Module
    blocks: tuple[Block, ...]
    norm: Norm
    head: nn.Module
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    dtype: torch.dtype

    def tables(self, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [positions, head_dim / 2]. Unknown if pairs are not (i, i + head_dim / 2)."""
        like = torch.empty(1, 1, dtype=torch.float32, device=device)
        both = self.rotary(like, torch.arange(positions, device=device)[None])
        half = self.head_dim // 2
        for table in both:
            if table.shape != (1, positions, 2 * half) or not torch.equal(table[..., :half], table[..., half:]):
                raise Unknown("its rotary tables are of another kind")
        cos, sin = (t[0, :, :half].float().contiguous() for t in both)
        return cos, sin


class FusedStep:
    """One token more for `batch` sequences of at most `length` tokens, over the layers of a static cache.

    `layers` have keys and values [batch, kv_heads, length, D], which the step writes; what they count is left alone.
    """

    def __init__(self, anatomy: Anatomy, layers: Sequence[Any], batch: int, length: int) -> None:
        a, device = anatomy, layers[0].keys.device
        shape = (batch, a.kv_heads, length, a.head_dim)
        caches = [(layer.keys, layer.values) for layer in layers]
        if len(caches) != len(a.blocks) or any(t.shape != shape or not t.is_contiguous() for kv in caches for t in kv):
            raise Unknown("its cache has another shape than its linears")
        self._anatomy, self._caches = a, caches
        self._cos, self._sin = a.tables(length, device)
        self._scratch = attention.workspace(batch, a.heads, a.kv_heads, a.head_dim, length, device, a.dtype)

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits [batch, V] after tokens [batch, 1] at positions [batch, 1]."""
        a = self._anatomy
        # Before the embedding, a plain launch: attention reads them while the kernel before it still runs.
        where = positions[:, 0].to(torch.int32)
        h = a.embedding(tokens).view(len(tokens), -1)
        x: Tensor | Outputs | None = None
        for block, (keys, values) in zip(a.blocks, self._caches, strict=True):
            y, h = block.norm(x, h)
            qkv = self._heads_normed(block, block.qkv(y))
            y = attention.decode(qkv, self._cos, self._sin, where, keys, values, self._scratch)
            x, h = block.behind_attention(block.o(y.view(len(tokens), -1)), h)
        logits: Tensor = a.head(a.norm(x, h)[0])
        return logits

    def _heads_normed(self, block: Block, qkv: Tensor) -> Tensor:
        if block.head_norms is None:
            return qkv
        a = self._anatomy
        q, k, v = qkv.split([n * a.head_dim for n in (a.heads, a.kv_heads, a.kv_heads)], dim=-1)
        of_queries, of_keys = block.head_norms
        return torch.cat([of_queries.of_heads(q), of_keys.of_heads(k), v], dim=-1)


def anatomy(model: Any) -> Anatomy:
    """What a transformers causal LM is made of. Unknown if it is not built like Llama.

    Weights of linears that read one tensor are laid one after the other, where their kernel allows it; the modules keep
    views of them.
    """
    config = model.config.get_text_config(decoder=True)
    if not sees_all(config):
        raise Unknown("its attention sees a window")
    base = getattr(model, model.base_model_prefix, None)
    if base is None or not {"embed_tokens", "layers", "norm", "rotary_emb"} <= _children(base):
        raise Unknown("its modules have other names than those of Llama")
    if getattr(base.rotary_emb, "rope_type", None) not in _SETTLED:
        raise Unknown("its rotary tables depend on the length")
    shapes = {_heads(layer) for layer in base.layers}
    if len(shapes) != 1:
        raise Unknown("its blocks differ in their heads")
    heads, kv_heads, head_dim = shapes.pop()
    if head_dim not in _HEAD_DIMS or heads % kv_heads:
        raise Unknown(f"no kernel takes {heads} heads on {kv_heads} of {head_dim} numbers")
    norms = [_norm(base.norm), *(_norm(getattr(layer, n)) for layer in base.layers for n in _NORMS)]
    dtypes = {n.weight.dtype for n in norms}
    if len(dtypes) != 1:
        raise Unknown("its norms are of several dtypes")
    hooked = [name for name, m in base.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    if hooked:
        raise Unknown(f"there are hooks on {hooked[0] or 'it'}, which would not be called")
    blocks = tuple(_block(layer) for layer in base.layers)
    head = model.get_output_embeddings()
    vocabulary = base.embed_tokens.num_embeddings
    shape = heads, kv_heads, head_dim, vocabulary
    return Anatomy(base.embed_tokens, base.rotary_emb, blocks, norms[0], head, *shape, dtypes.pop())


def _heads(layer: Any) -> tuple[int, int, int]:
    """Heads, those of keys and values, and their size."""
    found = _children(layer)
    if len(found) != 4 or found - {"mlp", "block_sparse_moe"} != {"self_attn", *_NORMS}:
        raise Unknown(f"its blocks are made of {', '.join(sorted(found))}")
    attn = layer.self_attn
    if not set(_ATTENTION) <= _children(attn) <= {*_ATTENTION, *_HEAD_NORMS}:
        raise Unknown(f"its attention is made of {', '.join(sorted(_children(attn)))}")
    size = attn.head_dim
    if abs(attn.scaling - size**-0.5) > 1e-6:
        raise Unknown(f"its attention scales by {attn.scaling}")
    return attn.q_proj.out_features // size, attn.k_proj.out_features // size, size


def _block(layer: Any) -> Block:
    attn = layer.self_attn
    named = _children(attn)
    head_norms = None
    if named & set(_HEAD_NORMS):
        head_norms = _norm(attn.q_norm), _norm(attn.k_norm)
    mlp = layer.mlp if "mlp" in _children(layer) else layer.block_sparse_moe
    return Block(
        _norm(layer.input_layernorm),
        together([attn.q_proj, attn.k_proj, attn.v_proj]),
        head_norms,
        attn.o_proj,
        _norm(layer.post_attention_layernorm),
        _mlp(mlp),
    )


def _mlp(mlp: Any) -> Linear | Experts:
    if _children(mlp) == set(_GATED) and "SiLU" in type(mlp.act_fn).__name__:
        gate_up, down = together([mlp.gate_proj, mlp.up_proj]), mlp.down_proj
        return lambda x: down(silu_mul(gate_up(x)))
    if _children(mlp) == {"gate", "experts"} and (found := _experts(mlp.gate, mlp.experts)) is not None:
        return found

    def plain(x: Tensor) -> Tensor:
        y = mlp(x[:, None])
        y = y[0] if isinstance(y, tuple) else y  # beside what the router said, in some versions
        return y.view(x.shape)

    return plain


def _experts(router: Any, experts: nn.Module) -> Experts | None:
    stacks = experts.gated_stacks if isinstance(experts, QuantExperts) else None
    weight, top_k = getattr(router, "weight", None), getattr(router, "top_k", None)
    normalized = getattr(router, "norm_topk_prob", True)
    if stacks is None or weight is None or top_k is None or not normalized or getattr(router, "bias", None) is not None:
        return None
    return Experts(weight, top_k, *stacks) if weight.dtype == stacks[0].packed.dtype else None


def _norm(module: Any) -> Norm:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "RMSNorm" not in type(module).__name__ or eps is None or [n for n, _ in module.named_parameters()] != ["weight"]:
        raise Unknown(f"{type(module).__name__} is no RMSNorm with a weight")
    return Norm(module.weight, eps)


def together(linears: Sequence[nn.Module]) -> Linear:
    """What all of `linears` give for one x [M, K], side by side: in one product, if their weights can be one."""
    packed = [m for m in linears if isinstance(m, QuantLinear)]
    biases = [m.bias for m in packed if m.bias is not None]
    if len(packed) == len(linears) and len(biases) in (0, len(packed)):
        joined = one_after_the_other([m.packed for m in packed])
        if joined is not None:
            whole, parts = joined
            for module, part in zip(packed, parts, strict=True):
                module.packed = part
            bias = torch.cat(biases) if biases else None
            return lambda x: whole.linear(x, bias)
    return lambda x: torch.cat([m(x) for m in linears], dim=-1)


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}
