"""What transformers models are made of, read from the names of their modules: of those built like Llama, and like OPT.

Names prove nothing: `graphs` takes a step made of it (`fused`) only after it has given what transformers' own gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from bitwright.kernels.cuda import one_after_the_other
from bitwright.kernels.elementwise import relu, silu_mul
from bitwright.nn.attention import sees_all
from bitwright.nn.experts import QuantExperts
from bitwright.nn.fused import Anatomy, Block, Experts, Linear, Norm, Unknown
from bitwright.nn.linear import QuantLinear

_LLAMA = {"embed_tokens", "layers", "norm", "rotary_emb"}
_OPT = {"embed_tokens", "embed_positions", "layers", "final_layer_norm"}
_INPUTS = ("q_proj", "k_proj", "v_proj")
_HEAD_NORMS = {"q_norm", "k_norm"}  # of Qwen3
_NORMS = {"input_layernorm", "post_attention_layernorm"}
_MLPS = {"mlp", "block_sparse_moe"}
_GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_OPT_BLOCK = {"self_attn", "activation_fn", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"}
_HEAD_DIMS = (16, 32, 64, 128)  # of 256 a stage of the attention kernel has no room
_ROUTERS = ("Mixtral", "Qwen3Moe", "Olmoe")  # that weight experts by a softmax, if over the chosen ones
# What a config may ask for beside Llama's arithmetic, and the values that ask for nothing.
_NEUTRAL = {
    "residual_multiplier": (1, None), "embedding_multiplier": (1, None), "logits_scaling": (1, None),
    "clip_qkv": (None,), "scale_emb": (1, None), "scale_depth": (None,), "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
}  # fmt: skip
_SETTLED = ("default", "linear", "llama3", "yarn")  # kinds of rotary tables that do not depend on the length


def anatomy(model: Any) -> Anatomy:
    """What a transformers causal LM is made of. Unknown if it is built otherwise.

    Weights of linears that read one tensor are laid one after the other, where their kernel allows it; the modules keep
    views of them.
    """
    config = model.config.get_text_config(decoder=True)
    if not sees_all(config):
        raise Unknown("its attention sees a window")
    if extras := _extras(config):
        raise Unknown(f"it asks for {', '.join(extras)}")
    base = getattr(model, model.base_model_prefix, None)
    base = getattr(base, "decoder", base)
    named = set() if base is None else _children(base)
    if not (named >= _LLAMA or named == _OPT):
        raise Unknown("its modules have other names than those of Llama and OPT")
    hooked = [name for name, m in model.named_modules() if _is_hooked(m)]
    if hooked:
        raise Unknown(f"there are hooks on {hooked[0] or 'it'}, which would not be called")
    found = _of_llama(model, base) if named >= _LLAMA else _of_opt(model, base)
    dtypes = {n.weight.dtype for n in (found.norm, *(n for b in found.blocks for n in (b.norm, b.mlp_norm)))}
    if len(dtypes) > 1:
        raise Unknown("its norms are of several dtypes")
    return found


def _extras(config: Any) -> list[str]:
    """What a config asks for that Llama has not, and that little or nothing shows of at the beginning of a text."""
    found = [name for name, values in _NEUTRAL.items() if getattr(config, name, values[0]) not in values]
    if 0 in (getattr(config, "no_rope_layers", None) or ()):
        found.append("no_rope_layers")
    if (getattr(config, "rope_parameters", None) or {}).get("llama_4_scaling_beta") is not None:
        found.append("llama_4_scaling_beta")
    return found


def _of_llama(model: Any, base: Any) -> Anatomy:
    if getattr(base.rotary_emb, "rope_type", None) not in _SETTLED:
        raise Unknown("its rotary tables depend on the length")
    for layer in base.layers:
        found = _children(layer)
        if len(found) != 4 or found - _MLPS != {"self_attn", *_NORMS}:
            raise Unknown(f"its blocks are made of {', '.join(sorted(found))}")
    heads = _heads(base.layers, {*_INPUTS, "o_proj"}, _HEAD_NORMS)
    tokens = base.embed_tokens

    def embed(ids: Tensor, positions: Tensor) -> Tensor:
        return tokens(ids)[:, 0]

    norm = _rms_norm(base.norm)
    blocks = tuple(_block_of_llama(layer) for layer in base.layers)
    head = model.get_output_embeddings()
    return Anatomy(embed, None, base.rotary_emb, blocks, norm, head, *heads, tokens.num_embeddings)


def _block_of_llama(layer: Any) -> Block:
    attn = layer.self_attn
    head_norms = None
    if _children(attn) >= _HEAD_NORMS:
        head_norms = _rms_norm(attn.q_norm), _rms_norm(attn.k_norm)
    mlp = layer.mlp if "mlp" in _children(layer) else layer.block_sparse_moe
    norms = _rms_norm(layer.input_layernorm), _rms_norm(layer.post_attention_layernorm)
    qkv = together([getattr(attn, name) for name in _INPUTS])
    return Block(norms[0], qkv, head_norms, attn.o_proj, norms[1], _mlp(mlp))


def _of_opt(model: Any, base: Any) -> Anatomy:
    for layer in base.layers:
        if _children(layer) != _OPT_BLOCK or not layer.do_layer_norm_before:
            raise Unknown(f"its blocks are made of {', '.join(sorted(_children(layer)))}, or normalize what they give")
    heads = _heads(base.layers, {*_INPUTS, "out_proj"}, set())
    tokens, places = base.embed_tokens, base.embed_positions

    def embed(ids: Tensor, positions: Tensor) -> Tensor:
        return tokens(ids)[:, 0] + embedding(positions[:, 0] + places.offset, places.weight)

    norm = _layer_norm(base.final_layer_norm)
    blocks = tuple(_block_of_opt(layer) for layer in base.layers)
    head = model.get_output_embeddings()
    known = len(places.weight) - places.offset
    return Anatomy(embed, known, None, blocks, norm, head, *heads, tokens.num_embeddings)


def _block_of_opt(layer: Any) -> Block:
    attn, up, down, act = layer.self_attn, layer.fc1, layer.fc2, layer.activation_fn
    if isinstance(act, nn.ReLU):
        act = relu
    norms = _layer_norm(layer.self_attn_layer_norm), _layer_norm(layer.final_layer_norm)
    qkv = together([getattr(attn, name) for name in _INPUTS])
    return Block(norms[0], qkv, None, attn.out_proj, norms[1], lambda x: down(act(up(x))))


def _heads(layers: Sequence[Any], linears: set[str], besides: set[str]) -> tuple[int, int, int]:
    """Heads of queries, those of keys and values, and their size, of attention made of `linears`, maybe `besides`."""
    shapes = set()
    for layer in layers:
        attn = layer.self_attn
        found = _children(attn)
        if found - besides != linears or found & besides not in (set(), besides):
            raise Unknown(f"its attention is made of {', '.join(sorted(found))}")
        size = attn.head_dim
        if abs(attn.scaling - size**-0.5) > 1e-6:
            raise Unknown(f"its attention scales by {attn.scaling}")
        shapes.add((attn.q_proj.out_features // size, attn.k_proj.out_features // size, size))
    if len(shapes) != 1:
        raise Unknown("its blocks differ in their heads")
    heads, kv_heads, head_dim = shapes.pop()
    if head_dim not in _HEAD_DIMS or heads % kv_heads:
        raise Unknown(f"no kernel takes {heads} heads on {kv_heads} of {head_dim} numbers")
    return heads, kv_heads, head_dim


def _mlp(mlp: Any) -> Linear | Experts:
    if _children(mlp) == _GATED and "SiLU" in type(mlp.act_fn).__name__:
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
    held = dict([*router.named_parameters(), *router.named_buffers()])
    top_k, normalized = getattr(router, "top_k", None), getattr(router, "norm_topk_prob", True)
    known = type(router).__name__.startswith(_ROUTERS) and normalized and set(held) == {"weight"}
    if stacks is None or top_k is None or not known:
        return None
    weight = held["weight"]
    return Experts(weight, top_k, *stacks) if weight.dtype == stacks[0].packed.dtype else None


def _rms_norm(module: Any) -> Norm:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "RMSNorm" not in type(module).__name__ or eps is None or [n for n, _ in module.named_parameters()] != ["weight"]:
        raise Unknown(f"{type(module).__name__} is no RMSNorm with a weight")
    return Norm(module.weight, None, eps)


def _layer_norm(module: Any) -> Norm:
    if not isinstance(module, nn.LayerNorm) or module.bias is None:
        raise Unknown(f"{type(module).__name__} is no LayerNorm with weight and bias")
    return Norm(module.weight, module.bias, module.eps)


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


def _is_hooked(module: nn.Module) -> bool:
    """Whether calling it does more than its class says: hooks of torch, of accelerate, or a forward of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks or vars(module).keys() & {"_hf_hook", "forward"})


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}
