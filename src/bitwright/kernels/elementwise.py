"""What lies between the linears of a decoder block, each one call: a Triton kernel on a GPU, its plain twin elsewhere.

All take and give 16-bit tensors and compute in float32, rounding where the kernels round.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_norm(
    x: Tensor | None, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool
) -> tuple[Tensor, Tensor]:
    """(norm of residual + x, residual + x), both [M, H] contiguous; x None: the norm of residual alone.

    weight, bias [H]. center False: RMSNorm, h / sqrt(mean(h^2) + eps) * weight; True: LayerNorm. The sum is rounded to
    the dtype of residual before it is normalised.
    """
    if residual.is_cuda:
        from bitwright.kernels.triton import elementwise as kernels

        return kernels.add_norm(x, residual, weight, bias, eps, center)
    return add_norm_reference(x, residual, weight, bias, eps, center)


def rope_cache(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, start: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Rotated queries [B T, heads, D] of qkv [B T, (heads + 2 kv_heads) D]; keys and values go into the caches.

    Token t of sequence b stands at position start[b] + t (start integer [B], on the device). cos, sin: float32
    [S or more, D / 2], or None to rotate nothing. keys, values: [B, kv_heads, S, D], written at the tokens' positions;
    positions of S and beyond are dropped.
    """
    if qkv.is_cuda:
        from bitwright.kernels.triton import elementwise as kernels

        return kernels.rope_cache(qkv, cos, sin, start, keys, values)
    return rope_cache_reference(qkv, cos, sin, start, keys, values)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up [M, I] of gate_up [M, 2 I], the gate first."""
    if gate_up.is_cuda:
        from bitwright.kernels.triton import elementwise as kernels

        return kernels.silu_mul(gate_up)
    return silu_mul_reference(gate_up)


def relu(x: Tensor) -> Tensor:
    """max(x, 0) of x contiguous, NaN where x is."""
    if x.is_cuda:
        from bitwright.kernels.triton import elementwise as kernels

        return kernels.relu(x)
    return torch.relu(x)


def rope_tables(positions: int, head_dim: int, base: float, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [positions, head_dim / 2], of the angles position * base^(-2 i / head_dim)."""
    i = torch.arange(0, head_dim, 2, dtype=torch.float64)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * base ** (-i / head_dim)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def add_norm_reference(
    x: Tensor | None, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool
) -> tuple[Tensor, Tensor]:
    """The twin of `add_norm`."""
    total = residual if x is None else (residual.float() + x.float()).to(residual.dtype)
    h = total.float()
    if center:
        h = h - h.mean(dim=-1, keepdim=True)
    y = h * torch.rsqrt(h.pow(2).mean(dim=-1, keepdim=True) + eps) * weight.float()
    if bias is not None:
        y = y + bias.float()
    return y.to(residual.dtype), total


def rope_cache_reference(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, start: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """The twin of `rope_cache`."""
    B, KV, S, D = keys.shape
    M = qkv.shape[0]
    T = M // B
    position = start.long()[:, None] + torch.arange(T, device=qkv.device)  # [B, T]
    q, k, v = qkv.view(M, -1, D).split((qkv.shape[1] // D - 2 * KV, KV, KV), dim=1)
    if cos is not None and sin is not None:
        angle = position.clamp(max=S - 1)
        c, s = cos[angle].view(M, 1, -1), sin[angle].view(M, 1, -1)
        q, k = _rotate(q, c, s), _rotate(k, c, s)
    b, t = (position < S).nonzero(as_tuple=True)
    keys[b, :, position[b, t]] = k.view(B, T, KV, D)[b, t]
    values[b, :, position[b, t]] = v.view(B, T, KV, D)[b, t]
    return q.contiguous()


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """The twin of `silu_mul`."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (i, i + D / 2) of x [M, heads, D] turned by the angles of cos and sin [M, 1, D / 2]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
