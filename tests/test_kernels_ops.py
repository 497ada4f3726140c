"""The operators as torch sees them: schemas, shapes, tracing, and their CPU programs against plain loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu import cases
from torch import Tensor

from bitwright.errors import SchemeError
from bitwright.kernels import fragments, ops
from bitwright.kernels.fragments import Fragments, pack, stack
from bitwright.kernels.routing_ops import sort_by_expert
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import WEIGHT_BITS, WeightScheme

N, K = 20, 96


def random_weight(bits: int, symmetric: bool, seed: int = 0) -> QuantizedTensor:
    scheme = WeightScheme(bits, 32, symmetric)
    generator = torch.Generator().manual_seed(seed)
    grid = (N, 3)
    codes = torch.randint(scheme.qmin, scheme.qmax + 1, (N, K), generator=generator).to(torch.int8)
    zero = torch.randint(scheme.qmin, scheme.qmax + 1, grid, generator=generator).to(torch.int8)
    scale = (torch.randn(grid, generator=generator) * 0.1).to(torch.bfloat16)
    return QuantizedTensor(codes, scale, None if symmetric else zero, scheme)


def activations(M: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(dtype)


def operands(f: Fragments) -> tuple[Any, ...]:
    return list(f.words), f.scale, f.zero


def linear_arguments(M: int, bits: int, symmetric: bool, bias: bool) -> tuple[Any, ...]:
    f = pack(random_weight(bits, symmetric), torch.bfloat16)
    b = torch.arange(N).bfloat16() if bias else None
    return (activations(M), *operands(f), b, N, bits, f.group_size, "triton")


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("M", [0, 1, 7])
def test_linear(bits: int, dtype: torch.dtype, M: int) -> None:
    qt = random_weight(bits, symmetric=bits != 3)
    f = pack(qt, dtype)
    assert f.scale.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    x, bias = activations(M, dtype), torch.arange(N).to(dtype)
    exact = x.double() @ qt.dequantize(dtype).double().t()
    for b in (None, bias):
        y = ops.fragment_linear(x, *operands(f), b, N, bits, f.group_size, "gluon")
        assert (y.dtype, tuple(y.shape)) == (dtype, (M, N))
        expected = exact if b is None else exact + b.double()
        # float32 sums, rounded once: at most one unit in the last place from the exact result
        torch.testing.assert_close(y.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_one_hot_activations_read_the_rounded_weight() -> None:
    qt = random_weight(4, False)
    f = pack(qt, torch.bfloat16)
    y = ops.fragment_linear(torch.eye(K).bfloat16(), *operands(f), None, N, 4, 32, "triton")
    assert torch.equal(y, qt.dequantize(torch.bfloat16).t())


def test_experts() -> None:
    weights = [random_weight(4, False, seed) for seed in range(4)]
    f = stack([pack(w, torch.bfloat16) for w in weights])
    x = activations(10)
    offsets = torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32)  # the second gets nothing, the last row is nobody's
    y = ops.fragment_experts(x, offsets, *operands(f), N, 4, 32, "triton")
    assert tuple(y.shape) == (10, N)
    for e, w in enumerate(weights):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        one = pack(w, torch.bfloat16)
        expected = ops.fragment_linear(x[rows], *operands(one), None, N, 4, 32, "triton")
        assert torch.equal(y[rows], expected)
    assert torch.equal(ops.fragment_experts(x, offsets, *operands(f), N, 4, 32, "triton", True)[:9], y[:9])
    none = torch.zeros(5, dtype=torch.int32)
    assert ops.fragment_experts(x[:0], none, *operands(f), N, 4, 32, "triton").shape == (0, N)


@pytest.mark.parametrize(("M", "k", "E"), [(1, 2, 8), (7, 4, 128), (700, 2, 8)])
def test_tokens_are_sorted_by_expert(M: int, k: int, E: int) -> None:
    cases.check_sort(sort_by_expert, M, k, E, "cpu")


@pytest.mark.parametrize("M", [0, 5])
def test_sorting_of_tokens_can_be_traced(M: int) -> None:
    index = torch.randint(0, 5, (M, 2))
    torch.library.opcheck(sort_by_expert, (index, 4))
    assert sort_by_expert(index, 4)[0].tolist() == [int((index < e).sum()) for e in range(5)]


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dequantize(bits: int, dtype: torch.dtype) -> None:
    qt = random_weight(bits, False)
    weight = ops.fragment_dequantize(*operands(pack(qt, torch.bfloat16)), N, K, bits, 32, dtype)
    assert torch.equal(weight, qt.dequantize(dtype))


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_opcheck(bits: int, symmetric: bool) -> None:
    for M in (0, 3):
        torch.library.opcheck(ops.fragment_linear, linear_arguments(M, bits, symmetric, bias=symmetric))
    f = pack(random_weight(bits, symmetric), torch.bfloat16)
    torch.library.opcheck(ops.fragment_dequantize, (*operands(f), N, K, bits, 32, torch.float16))
    whole = stack([f, f])
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    for settled in ([], [True]):
        given = (activations(5), offsets, *operands(whole), N, bits, 32, "triton", *settled)
        torch.library.opcheck(ops.fragment_experts, given)


def test_compiled() -> None:
    """One graph for every M, zero included, and the same numbers."""
    f = pack(random_weight(3, False), torch.bfloat16)
    bias = torch.ones(N, dtype=torch.bfloat16)

    def layer(x: Tensor) -> Tensor:
        y = ops.fragment_linear(x * 2, list(f.words), f.scale, f.zero, bias, N, 3, 32, "triton")
        return torch.relu(y)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for M in (5, 1, 0):
        x = activations(M)
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("change", [{"N": 65}, {"N": 0}, {"K": K + 64}, {"K": 64}], ids=str)
def test_weights_that_do_not_fit_are_refused(change: dict[str, int]) -> None:
    shape = {"N": N, "K": K} | change
    f = pack(random_weight(4, True), torch.bfloat16)
    x = torch.zeros(2, shape["K"], dtype=torch.bfloat16)
    with pytest.raises(SchemeError, match=r"words \[1, 2, 4, 128\] cannot hold a weight"):
        ops.fragment_linear(x, *operands(f), None, shape["N"], 4, 32, "triton")


# --- what runs on a GPU, with slow kernels in place of the real ones


def slow_linear(x: Tensor, f: Fragments, bias: Tensor | None) -> Tensor:
    assert x.is_contiguous()
    y = x.float() @ fragments.dequantize(f, x.dtype).float().t()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def test_the_named_kernel_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def kernel(name: str) -> Callable[..., Tensor]:
        called.append(name)
        return slow_linear

    monkeypatch.setattr(ops, "_linear_kernel", kernel)
    monkeypatch.setattr(ops, "_dequantize_kernel", lambda: fragments.dequantize)
    for bias in (True, False):
        arguments = linear_arguments(6, 4, False, bias)
        expected = ops.fragment_linear(*arguments)
        strided = torch.stack((arguments[0], arguments[0]), dim=-1)[..., 0]
        for name in ("hopper", "gluon", "triton"):
            assert torch.equal(ops._cuda_linear(strided, *arguments[1:-1], name), expected)
            assert called.pop() == name
        by_gemm = ops._cuda_linear(*arguments[:-1], "dequantize")
        assert by_gemm.dtype == torch.bfloat16 and not called
        torch.testing.assert_close(by_gemm.float(), expected.float(), rtol=1e-2, atol=1e-2)
        assert ops._cuda_linear(arguments[0][:0], *arguments[1:]).shape == (0, N) and not called


def test_an_expert_stack_reaches_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    f = stack([pack(random_weight(4, False), torch.bfloat16)] * 2)
    seen: list[Any] = []

    def kernel(x: Tensor, offsets: Tensor, given: Fragments, settled: bool) -> Tensor:
        seen.append((offsets, given, settled))
        return x.new_zeros(len(x), given.N)

    monkeypatch.setattr(ops, "_experts_kernel", lambda name: kernel)
    offsets = torch.tensor([0, 1, 2], dtype=torch.int32)
    ops._cuda_experts(activations(2), offsets, *operands(f), N, 4, 32, "triton")
    ops._cuda_experts(activations(2), offsets, *operands(f), N, 4, 32, "triton", settled=True)
    assert seen[0][0] is offsets
    assert [settled for _, _, settled in seen] == [False, True]
    given = seen[0][1]
    assert replace(given, words=f.words, scale=f.scale, zero=f.zero) == f and given.experts == 2
    assert all(map(torch.equal, given.tensors, f.tensors))


@pytest.mark.parametrize("name", ["hopper", "gluon"])
def test_hopper_kernels_refuse_other_scales(name: str) -> None:
    arguments = linear_arguments(3, 4, True, False)[:-1]
    assert arguments[2].dtype == torch.bfloat16
    with pytest.raises(SchemeError, match=f"kernel '{name}' cannot multiply .*float16 activations with .*bfloat16"):
        ops._cuda_linear(arguments[0].half(), *arguments[1:], name)
    with pytest.raises(SchemeError, match=r"with torch\.float32 scales"):
        ops._cuda_linear(*arguments[:2], arguments[2].float(), *arguments[3:], name)


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(SchemeError, match="no kernel 'cutlass' for a linear"):
        ops._linear_kernel("cutlass")
    with pytest.raises(SchemeError, match="no kernel 'dequantize' for experts"):
        ops._experts_kernel("dequantize")
