"""What a block does behind its attention: norms, plain and expert MLPs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from bitwright.bench.linears import DenseExperts, DenseLinear, PackedExperts, PackedLinear, RoundedLinear
from bitwright.kernels.elementwise import add_norm, relu, silu_mul
from bitwright.kernels.routing import Outputs, Routing, combine_norm, norm_route, route

_EPS = 1e-5

Linear = DenseLinear | PackedLinear | RoundedLinear
Experts = DenseExperts | PackedExperts


@dataclass(frozen=True)
class Norm:
    """weight, bias [hidden]; a bias makes it a LayerNorm."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor | Outputs | None, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of residual + x, residual + x); what experts gave is summed first."""
        if isinstance(x, Outputs):
            return combine_norm(x, residual, *self._values)
        return add_norm(x, residual, *self._values)

    def into(self, linear: Linear, x: Tensor | Outputs | None, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(`linear` of the norm of residual + x, residual + x); its input is quantized on the way if it can be."""
        if isinstance(linear, PackedLinear) and self.bias is None and not isinstance(x, Outputs):
            fused = linear.behind_norm(x, residual, self.weight, _EPS)
            if fused is not None:
                return fused
        normed, residual = self(x, residual)
        return linear(normed), residual

    def route(self, x: Tensor, residual: Tensor, router: Tensor, top_k: int) -> tuple[Tensor, Tensor, Routing]:
        """(rows of the norm for their experts, residual + x, where they belong)."""
        return norm_route(x, residual, *self._values, router, top_k)

    @property
    def _values(self) -> tuple[Tensor, Tensor | None, float, bool]:
        return self.weight, self.bias, _EPS, self.bias is not None


@dataclass(frozen=True)
class Mlp:
    """down(silu(gate) * up) where gated, gate and up one linear; else down(relu(up))."""

    up: Linear
    down: Linear
    gated: bool

    def __call__(self, norm: Norm, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(what it makes of the norm of residual + x, residual + x)."""
        y, residual = norm.into(self.up, x, residual)
        fused = self.down.behind_silu(y) if self.gated and isinstance(self.down, PackedLinear) else None
        return self.down(_activate(y, self.gated)) if fused is None else fused, residual

    def calls(self, x: Tensor) -> list[Callable[[], Tensor]]:
        """Its linears alone, on inputs of the right shape made now."""
        inner = _activate(self.up(x), self.gated)
        return [partial(self.up, x), partial(self.down, inner)]

    def dense(self) -> Mlp:
        """The same with dequantized weights."""
        return replace(self, up=self.up.dense(), down=self.down.dense())

    @property
    def nbytes(self) -> int:
        """Bytes of its linears."""
        return self.up.nbytes + self.down.nbytes


@dataclass(frozen=True)
class MoE:
    """The `top_k` best experts of each token, by a 16-bit router [E, hidden]; the order of every sum is fixed."""

    router: Tensor
    up: Experts
    down: Experts
    gated: bool
    top_k: int

    def __call__(self, norm: Norm, x: Tensor, residual: Tensor) -> tuple[Outputs, Tensor]:
        """(what it makes of the norm of residual + x, not summed yet, residual + x)."""
        rows, residual, routing = norm.route(x, residual, self.router, self.top_k)
        inner = _activate(self.up(rows, routing.offsets), self.gated)
        return Outputs(self._down(inner, routing.offsets), routing), residual

    def _down(self, inner: Tensor, offsets: Tensor) -> Tensor:
        """Behind `up`, which waited for the offsets if it is packed: 16-bit experts promise nothing of the kind."""
        if isinstance(self.down, PackedExperts):
            return self.down(inner, offsets, settled=isinstance(self.up, PackedExperts))
        return self.down(inner, offsets)

    def calls(self, x: Tensor) -> list[Callable[[], Tensor]]:
        """Its linears alone, on inputs of the right shape made now."""
        routing = route(torch.mm(x, self.router.t()), self.top_k)
        rows = x.index_select(0, routing.tokens)
        inner = _activate(self.up(rows, routing.offsets), self.gated)
        return [partial(self.up, rows, routing.offsets), partial(self._down, inner, routing.offsets)]

    def dense(self) -> MoE:
        """The same with dequantized weights."""
        return replace(self, up=self.up.dense(), down=self.down.dense())

    @property
    def nbytes(self) -> int:
        """Bytes of its linears."""
        return self.up.nbytes + self.down.nbytes


def _activate(y: Tensor, gated: bool) -> Tensor:
    return silu_mul(y) if gated else relu(y)
