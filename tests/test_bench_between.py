"""What stands between the linears of a decoding model: routing, norms, gates, attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitwright.bench.correctness import tiny
from bitwright.bench.linears import PackedExperts
from bitwright.bench.model import make_model, make_tables
from bitwright.bench.shapes import models
from bitwright.kernels import attention
from bitwright.kernels.elementwise import add_norm, silu_mul
from bitwright.kernels.routing import Outputs, Routing, combine, combine_norm, norm_route, route
from bitwright.scheme import Scheme

BF16 = torch.bfloat16
CPU = torch.device("cpu")
MIXTRAL = models("mixtral-8x7b")


def test_routing_keeps_order_and_sums_to_one() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 0.0], [0.0, 5.0, 9.0]])
    routing = route(logits, 2)
    # tokens choose (1, 2), (0, 1) by the tie, (2, 1)
    assert routing.offsets.tolist() == [0, 1, 4, 6]
    assert routing.tokens.tolist() == [1, 0, 1, 2, 0, 2]
    assert routing.places.tolist() == [[1, 4], [0, 2], [5, 3]]
    torch.testing.assert_close(routing.shares.sum(dim=1), torch.ones(3))
    torch.testing.assert_close(routing.shares[2, 0], torch.tensor([5.0, 9.0]).softmax(0)[1])
    y = torch.arange(6.0)[:, None].expand(6, 2)
    expected = [float((routing.shares[m] * routing.places[m]).sum()) for m in range(3)]
    summed = torch.tensor(expected)[:, None].expand(3, 2)
    torch.testing.assert_close(combine(Outputs(y, routing)), summed)
    assert isinstance(routing, Routing)
    h, weight = torch.randn(3, 2), torch.randn(2)
    torch.testing.assert_close(
        combine_norm(Outputs(y, routing), h, weight, None, 1e-5, False), add_norm(summed, h, weight, None, 1e-5, False)
    )


def test_tokens_go_to_their_experts_behind_the_norm() -> None:
    x, h, weight, router = torch.randn(5, 16), torch.randn(5, 16), torch.randn(16), torch.randn(4, 16)
    rows, total, routing = norm_route(x, h, weight, None, 1e-5, False, router, 2)
    normed, expected = add_norm(x, h, weight, None, 1e-5, False)
    assert torch.equal(total, expected)
    best = (normed @ router.t()).topk(2).indices
    for e in range(4):
        of = slice(int(routing.offsets[e]), int(routing.offsets[e + 1]))
        (tokens,) = (best == e).any(dim=1).nonzero(as_tuple=True)
        assert torch.equal(rows[of], normed[tokens])


def test_offsets_are_settled_only_behind_packed_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of `up` is what has waited for them, and only the packed one does so before it lets others begin."""
    made = make_model(tiny(MIXTRAL), Scheme.parse("w4a16-g128"), make_tables(tiny(MIXTRAL), BF16, CPU), 1)
    promised: list[bool] = []
    right = PackedExperts.__call__

    def call(self: PackedExperts, x: Tensor, offsets: Tensor, settled: bool = False) -> Tensor:
        promised.append(settled)
        return right(self, x, offsets, settled)

    monkeypatch.setattr(PackedExperts, "__call__", call)
    (block,) = made.blocks
    x = torch.randn(3, 256).to(BF16)
    block.mlp(block.mlp_norm, x, x)
    assert promised == [False, True]
    promised.clear()
    mixed = replace(block.mlp, up=block.mlp.up.dense())
    mixed(block.mlp_norm, x, x)
    assert promised == [False]


def test_elementwise_against_torch() -> None:
    x, h, weight, bias = (torch.randn(3, 40), torch.randn(3, 40), torch.randn(40), torch.randn(40))
    normed, total = add_norm(x, h, weight, bias, 1e-5, True)
    torch.testing.assert_close(normed, torch.nn.functional.layer_norm(x + h, (40,), weight, bias, 1e-5))
    torch.testing.assert_close(total, x + h)
    normed, same = add_norm(None, h, weight, None, 1e-5, False)
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(h, (40,), weight, 1e-5))
    assert same is h
    torch.testing.assert_close(silu_mul(x), torch.nn.functional.silu(x[:, :20]) * x[:, 20:])


@pytest.mark.parametrize(
    ("batch", "kv_heads", "capacity", "splits", "block"),
    [(1, 32, 516, 4, 128), (1, 8, 4096, 16, 128), (1, 8, 100, 1, 64), (256, 8, 1024, 1, 64), (1, 96, 516, 1, 128)],
)
def test_attention_fills_the_gpu(batch: int, kv_heads: int, capacity: int, splits: int, block: int) -> None:
    assert attention.choose_split(batch, kv_heads, capacity) == attention.Split(splits, block)
