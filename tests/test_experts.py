"""Unfused expert stacks compute what transformers' own fused modules compute, and every expert is called."""

from __future__ import annotations

import pytest
import torch
from conftest import MOE_FAMILIES
from torch import nn

from bitwright.errors import StructureError
from bitwright.models.discover import discover
from bitwright.models.experts import UnfusedExperts, fuse, unfuse

LEAVES = {"mixtral": ("w1", "w3", "w2")}


def stack_of(model):
    """(block module, stack, fused module) of the last block."""
    model.set_experts_implementation("eager")  # the plain loop; the default groups the GEMMs
    block = discover(model).blocks[-1]
    module = model.get_submodule(block.name)
    return module, block.experts[0], module.get_submodule(block.experts[0].path)


def routed(M: int, E: int, k: int, hidden: int = 32, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(M, hidden, generator=g)
    scores = torch.rand(M, E, generator=g)
    weights, index = scores.topk(k, dim=-1)
    return x, index, weights


@pytest.mark.parametrize("family", MOE_FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M", [0, 1, 23])
def test_same_as_the_fused_module(tiny_model, family: str, dtype: torch.dtype, M: int) -> None:
    model = tiny_model(family).to(dtype)
    block, stack, fused = stack_of(model)
    x, index, weights = routed(M, stack.num_experts, 2)
    x, weights = x.to(dtype), weights.to(dtype)
    with torch.no_grad():
        before = fused(x, index, weights)
        unfuse(block, stack)
        after = block.get_submodule(stack.path)(x, index, weights)
    assert before.dtype == after.dtype == dtype and before.shape == after.shape
    # One GEMM over [gate; up] against two over its halves: equal but for the order of sums.
    torch.testing.assert_close(after, before, rtol=1e-5 if dtype == torch.float32 else 1.6e-2, atol=1e-6)
    assert M == 0 or before.abs().max() > 0


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_whole_model_gives_the_same_logits(tiny_model, family: str) -> None:
    model = tiny_model(family)
    model.set_experts_implementation("eager")
    ids = torch.randint(0, 320, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(ids).logits
        for block in discover(model).blocks:
            for stack in block.experts:
                unfuse(model.get_submodule(block.name), stack)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)


def test_index_past_the_last_expert_means_none(tiny_model) -> None:
    block, stack, fused = stack_of(tiny_model("mixtral"))
    x, index, weights = routed(6, 4, 2)
    with torch.no_grad():
        before = fused(x, index, weights)
        index[2] = 4  # expert parallelism marks tokens of other ranks so
        after = unfuse(block, stack)(x, index, weights)
    before[2] = 0
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    assert after[1].any()


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_names_shapes_and_shared_memory(tiny_model, family: str) -> None:
    block, stack, fused = stack_of(tiny_model(family))
    gate_up, down = fused.gate_up_proj, fused.down_proj
    unfuse(block, stack)
    leaves = LEAVES.get(family, ("gate_proj", "up_proj", "down_proj"))
    inner = down.shape[2]
    for e in range(stack.num_experts):
        parts = [block.get_submodule(f"{stack.path}.{e}.{leaf}") for leaf in leaves]
        assert all(type(p) is nn.Linear and p.bias is None for p in parts)
        for part, view in zip(parts, (gate_up[e, :inner], gate_up[e, inner:], down[e]), strict=True):
            assert torch.equal(part.weight, view)
            assert part.weight.data_ptr() == view.data_ptr(), "no copy"
    found = [name for name, m in block.named_modules() if isinstance(m, nn.Linear) and name.startswith(stack.path)]
    prefix = stack.name.removesuffix(stack.path)
    assert sorted(prefix + name for name in found) == sorted(linear.name for linear in stack.linears)


def test_every_expert_is_called_in_a_fixed_order(tiny_model) -> None:
    block, stack, _ = stack_of(tiny_model("mixtral"))
    experts = unfuse(block, stack)
    calls: list[tuple[str, torch.Tensor]] = []
    for name, m in experts.named_modules():
        if isinstance(m, nn.Linear):
            m.register_forward_pre_hook(lambda _m, args, name=name: calls.append((name, args[0])))
    x, _, weights = routed(5, 4, 2)
    index = torch.tensor([[0, 2]] * 5)  # experts 1 and 3 get nothing
    with torch.no_grad():
        experts(x, index, weights)
    order = [f"{e}.{leaf}" for e in range(4) for leaf in ("w1", "w3")] + [f"{e}.w2" for e in range(4)]
    assert [name for name, _ in calls] == order
    assert [linear.name.removeprefix(stack.name + ".") for linear in stack.linears] == order
    seen = dict(calls)
    assert seen["1.w1"].shape == (0, 32) and seen["1.w2"].shape == (0, 48)
    assert all(seen[f"{e}.w1"] is seen[f"{e}.w3"] for e in range(4)), "one tensor object for gate and up"
    assert torch.equal(seen["0.w1"], x)


def test_replaced_weights_take_effect(tiny_model) -> None:
    block, stack, _ = stack_of(tiny_model("mixtral"))
    experts = unfuse(block, stack)
    x, index, weights = routed(5, 4, 2)
    for e in range(4):
        experts.linear(e, "w2").weight = nn.Parameter(torch.zeros(32, 48))
    with torch.no_grad():
        assert not experts(x, index, weights).any()


def test_unfusing_frees_the_fused_parameters_and_fuse_undoes_it(tiny_model) -> None:
    block, stack, fused = stack_of(tiny_model("mixtral"))
    experts = unfuse(block, stack)
    assert unfuse(block, stack) is experts
    assert all(p.is_meta for p in fused.parameters())
    fuse(block)
    assert block.get_submodule(stack.path) is fused
    assert not any(isinstance(m, UnfusedExperts) for m in block.modules())


def test_custom_gating_is_kept(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    block, stack, fused = stack_of(tiny_model("mixtral"))

    def clamped(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return gate.clamp(max=0.01) * (up + 1)

    monkeypatch.setattr(type(fused), "_apply_gate", clamped)
    x, index, weights = routed(7, 4, 2)
    fused.config._experts_implementation_internal = "batched_mm"  # transformers' path that goes through _apply_gate
    with torch.no_grad():
        before = fused(x, index, weights)
        after = unfuse(block, stack)(x, index, weights)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def test_the_wrong_block_is_refused(tiny_model) -> None:
    model = tiny_model("mixtral")
    block, stack, _ = stack_of(model)
    block.mlp.experts = nn.Identity()
    with pytest.raises(StructureError, match="expected a MixtralExperts, found a Identity"):
        unfuse(block, stack)
