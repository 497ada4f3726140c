"""QuantExperts: stacks and one grouped product, against the loop over experts and transformers' fused module.

The kernels of a GPU are replaced by the operators' slow program on a CPU; routing, order and combination are the same.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import MOE_FAMILIES
from torch import Tensor, nn

from bitwright.algorithms.rtn import rtn
from bitwright.kernels.cuda import GluonWeight, HopperWeight, TritonWeight
from bitwright.kernels.dispatch import Choice, prepare
from bitwright.kernels.fragments import pack
from bitwright.kernels.problem import Problem
from bitwright.models.discover import discover
from bitwright.models.experts import unfuse
from bitwright.nn.experts import ExpertStack, QuantExperts
from bitwright.nn.linear import QuantLinear
from bitwright.nn.load import explain
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import Scheme

W4 = Scheme.parse("w4a16-g32")


def quantized(weight: Tensor, scheme: Scheme) -> QuantizedTensor:
    """A weight on the scheme's grid, from its largest values per group."""
    return rtn(weight.float(), scheme.weight)


def as_fragments(qt: QuantizedTensor, scheme: Scheme, dtype: torch.dtype, kind: Any = TritonWeight) -> QuantLinear:
    """What a GPU would be given, on a CPU."""
    problem = Problem.of(qt, scheme, dtype, "cpu", frozenset())
    return QuantLinear(kind(problem, pack(qt, dtype)), scheme, Choice(kind, "for a test"))


def experts_of(
    model: Any, scheme: Scheme = W4, dtype: torch.dtype = torch.float32, kind: Any = TritonWeight
) -> tuple[QuantExperts, Any]:
    """(experts in fragments, not yet stacked; the fused module with the same, dequantized weights)."""
    model.set_experts_implementation("eager")
    block = discover(model).blocks[-1]
    module, stack = model.get_submodule(block.name), block.experts[0]
    fused = module.get_submodule(stack.path)
    parameters = {name: p.detach().clone() for name, p in fused.named_parameters(recurse=False)}
    experts = QuantExperts.adopt(unfuse(module, stack))
    inner = next(reversed(parameters.values())).shape[2]
    for e in range(experts.num_experts):
        rows = {0: slice(None, inner), 1: slice(inner, None), 2: slice(None)}
        for i, leaf in enumerate([name for name, _ in experts.get_submodule(str(e)).named_children()]):
            whole = list(parameters.values())[i // 2]
            qt = quantized(whole[e, rows[i]], scheme)
            whole[e, rows[i]] = qt.dequantize()
            setattr(experts.get_submodule(str(e)), leaf, as_fragments(qt, scheme, dtype, kind))
    for name, p in parameters.items():
        setattr(fused, name, nn.Parameter(p.to(dtype), requires_grad=False))
    return experts, fused


def routed(M: int, E: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(M)
    weights, index = torch.rand(M, E, generator=generator).topk(k, dim=-1)
    return torch.randn(M, 32, generator=generator).to(dtype), index, weights.to(dtype)


@pytest.mark.parametrize("family", MOE_FAMILIES)
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w3a16", "w2a16-g32-asym", "w8a16-g64"])
@pytest.mark.parametrize("M", [0, 1, 37])
def test_stacked_is_the_loop_and_the_fused_module(tiny_model, family: str, scheme: str, M: int) -> None:
    experts, fused = experts_of(tiny_model(family), Scheme.parse(scheme))
    x, index, weights = routed(M, experts.num_experts, 2)
    with torch.no_grad():
        expected, loop = fused(x, index, weights), experts(x, index, weights)
        held = sum(m.nbytes for m in experts.modules() if isinstance(m, QuantLinear))
        experts.stack()
        assert experts.unstacked is None
        stacked = experts(x, index, weights)
    assert sum(m.nbytes for m in experts.modules() if isinstance(m, ExpertStack)) == held
    assert not any(isinstance(m, QuantLinear) for m in experts.modules()), "their memory is given back"
    for y in (loop, stacked):
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert M == 0 or expected.abs().max() > 0.01


@pytest.mark.parametrize("family", MOE_FAMILIES)
@pytest.mark.parametrize("inner", [40, 64, 72])
def test_widths_that_fill_no_block(tiny_model, family: str, inner: int) -> None:
    """Up begins at a whole band of 64 rows beside gate."""
    name = "intermediate_size" if family == "mixtral" else "moe_intermediate_size"
    experts, fused = experts_of(tiny_model(family, **{name: inner}))
    experts.stack()
    x, index, weights = routed(9, 4, 2)
    with torch.no_grad():
        torch.testing.assert_close(experts(x, index, weights), fused(x, index, weights), rtol=1e-4, atol=1e-5)


def test_bfloat16_and_weights_in_float32(tiny_model) -> None:
    """Routers give float32 weights beside 16-bit activations; sums over k are float32 then, and rounded once."""
    experts, fused = experts_of(tiny_model("mixtral"), dtype=torch.bfloat16)
    x, index, weights = routed(23, 4, 2, torch.bfloat16)
    experts.stack()
    with torch.no_grad():
        y = experts(x, index, weights.float())
        expected = fused.float()(x.float(), index, weights.float())
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).norm() < 0.01 * expected.norm()


def test_no_expert_and_experts_without_tokens(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Index num_experts or more adds nothing, whatever the kernel leaves in those rows."""
    from bitwright.nn import experts as module

    experts, fused = experts_of(tiny_model("mixtral"))
    experts.stack()
    x, index, weights = routed(6, 4, 2)
    index[:] = torch.tensor([3, 1])
    index[2], index[4, 0] = torch.tensor([4, 7]), 4
    expected_index, expected_weights = index.clamp(max=3), weights.masked_fill(index > 3, 0.0)
    product = module.fragment_experts

    def careless(x: Tensor, offsets: Tensor, *rest: Any) -> Tensor:
        assert offsets.dtype == torch.int32 and offsets.tolist() == [0, 0, 5, 5, 9]
        y = product(x, offsets, *rest)
        y[int(offsets[-1]) :] = torch.nan
        return y

    monkeypatch.setattr(module, "fragment_experts", careless)
    with torch.no_grad():
        y = experts(x, index, weights)
        torch.testing.assert_close(y, fused(x, expected_index, expected_weights), rtol=1e-4, atol=1e-5)
    assert not y[2].any() and y[4].any()


def test_custom_gating_is_kept(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    experts, fused = experts_of(tiny_model("mixtral", intermediate_size=40))
    x, index, weights = routed(7, 4, 2)
    with torch.no_grad():
        usual = fused(x, index, weights)

    def clamped(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return gate.clamp(max=0.01) * (up + 1)

    monkeypatch.setattr(type(fused), "_apply_gate", clamped)
    with torch.no_grad():
        loop = experts(x, index, weights)
        experts.stack()
        stacked = experts(x, index, weights)
    torch.testing.assert_close(stacked, loop, rtol=1e-4, atol=1e-5)
    assert (stacked - usual).abs().max() > 1e-3


def test_what_cannot_be_stacked_says_why(tiny_model) -> None:
    experts, _ = experts_of(tiny_model("mixtral"))
    x, index, weights = routed(7, 4, 2)
    with torch.no_grad():
        before = experts(x, index, weights)
    weight = quantized(experts.linear(2, "w3").dequantize(), W4)

    cpu, choice = prepare(weight, W4, torch.float32)
    other = Scheme.parse("w8a16-g32")
    wide = as_fragments(quantized(experts.linear(2, "w3").dequantize(), other), other, torch.float32)
    plain = nn.Linear(32, 48, bias=False)
    plain.weight.data = weight.dequantize()
    for replacement, reason in (
        (QuantLinear(cpu, W4, choice), "2.w3 runs as dequantize, which has no grouped product"),
        (wide, "2.w3 is w8a16-g32, triton"),
        (as_fragments(weight, W4, torch.float32, GluonWeight), "2.w3 is w4a16-g32, gluon"),
        (as_fragments(weight, W4, torch.float32, HopperWeight), "2.w3 is w4a16-g32, hopper"),
        (plain, "2.w3 is not quantized"),
    ):
        experts.get_submodule("2").w3 = replacement
        experts.stack()
        assert experts.unstacked is not None and experts.unstacked.startswith(reason)
        assert explain(experts)[-1] == f"1 QuantExperts: one expert after the other ({experts.unstacked})"
        with torch.no_grad():
            torch.testing.assert_close(experts(x, index, weights), before, rtol=0.05, atol=1e-3)


def test_down_may_have_a_scheme_of_its_own(tiny_model) -> None:
    experts, _ = experts_of(tiny_model("mixtral"))
    other = Scheme.parse("w8a16-g32")
    for e in range(4):
        down = quantized(experts.linear(e, "w2").dequantize(), other)
        experts.get_submodule(str(e)).w2 = as_fragments(down, other, torch.float32)
    x, index, weights = routed(7, 4, 2)
    with torch.no_grad():
        loop = experts(x, index, weights)
        experts.stack()
        torch.testing.assert_close(experts(x, index, weights), loop, rtol=1e-4, atol=1e-5)
    lines = explain(experts)
    assert [line.split(" (")[0] for line in lines] == [
        "1 ExpertStack w4a16-g32: triton",
        "1 ExpertStack w8a16-g32: triton",
    ]
    assert "one product for 8 matrices of experts" in lines[0] and "for 4 matrices" in lines[1]


def test_a_stack_runs_by_the_kernel_of_its_experts(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitwright.nn import experts as module

    product, called = module.fragment_experts, []
    monkeypatch.setattr(module, "fragment_experts", lambda *a: called.append(a[-2]) or product(*a))
    experts, fused = experts_of(tiny_model("mixtral"), kind=HopperWeight)
    experts.stack()
    x, index, weights = routed(7, 4, 2)
    with torch.no_grad():
        torch.testing.assert_close(experts(x, index, weights), fused(x, index, weights), rtol=1e-4, atol=1e-5)
    assert called == ["hopper", "hopper"]
    assert [line.split(" (")[0] for line in explain(experts)] == ["1 ExpertStack w4a16-g32: hopper"] * 2


def test_stacks_hold_the_weights_of_their_experts(tiny_model) -> None:
    experts, fused = experts_of(tiny_model("mixtral", intermediate_size=40))
    experts.stack()
    gate_up = experts.gate_up.dequantize()
    assert torch.equal(gate_up[:, :40], fused.gate_up_proj[:, :40])
    assert torch.equal(gate_up[:, 64:], fused.gate_up_proj[:, 40:])
    assert torch.equal(experts.down.dequantize(), fused.down_proj)


def test_nothing_is_read_on_the_host(tiny_model) -> None:
    """What a CUDA graph cannot hold: values or shapes that depend on data."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    experts, _ = experts_of(tiny_model("mixtral"))
    x, index, weights = routed(7, 4, 2)
    forbidden = {"_local_scalar_dense", "nonzero", "_unique2", "bincount", "masked_select"}
    called: list[str] = []
    with torch.no_grad(), Watch():
        experts(x, index, weights)
    assert forbidden & set(called), "the loop does"
    experts.stack()
    called.clear()
    with torch.no_grad(), Watch():
        experts(x, index, weights)
    assert called.count("fragment_experts") == 2
    assert not forbidden & set(called)
