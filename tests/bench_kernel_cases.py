"""Cases for the Triton kernels between linears, each compared with its plain twin.

`test_bench_model.py` runs them in Triton's interpreter on a CPU (in a process of its own),
`gpu/test_bench_model_cuda.py` on a GPU. The interpreter knows no bfloat16 products, so it is asked for float16 alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.kernels import attention, elementwise, routing
from bitwright.kernels.routing import Outputs, Routing
from bitwright.kernels.triton import attention as attention_kernels
from bitwright.kernels.triton import elementwise as elementwise_kernels
from bitwright.kernels.triton import route as routing_kernels
from bitwright.kernels.triton import router as router_kernels

EPS = {torch.float16: 2**-10, torch.bfloat16: 2**-7}  # one rounding


def close(y: Tensor, expected: Tensor, factor: float = 1.5) -> None:
    """Equal up to a rounding: float32 sums may run in another order."""
    assert y.dtype == expected.dtype and y.shape == expected.shape
    limit = factor * EPS[y.dtype] * expected.float().abs().clamp(min=0.1)
    wrong = ~((y.float() - expected.float()).abs() <= limit)  # NaN too
    assert not wrong.any(), f"{int(wrong.sum())} of {y.numel()} values differ"


def normal(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def add_norm(dtype: torch.dtype, device: str) -> None:
    for M, H in ((1, 64), (3, 200), (2, 1024)):
        x, h = (normal(M, H, dtype=dtype, device=device, seed=s) for s in (1, 2))
        weight, bias = (normal(H, dtype=dtype, device=device, seed=s) for s in (3, 4))
        for case in (
            (x, h, weight, bias, 1e-5, True),
            (x, h, weight, None, 1e-5, False),
            (None, h, weight, bias, 0.1, True),
        ):
            before = [None if t is None else t.clone() for t in case[:4]]
            normed, total = elementwise_kernels.add_norm(*case)
            expected = elementwise.add_norm_reference(*case)
            close(normed, expected[0], 3)
            assert torch.equal(total, expected[1])
            assert all(a is None or torch.equal(a, b) for a, b in zip(before, case[:4], strict=True))


def rope_cache(dtype: torch.dtype, device: str) -> None:
    for B, T, heads, kv, D, S in ((2, 3, 6, 2, 16, 20), (3, 1, 4, 4, 32, 9), (1, 5, 9, 1, 16, 5)):
        qkv = normal(B * T, (heads + 2 * kv) * D, dtype=dtype, device=device)
        # The last sequence runs over the end of its cache: nothing may be written there.
        start = torch.tensor([0, 4, S - 1][:B], dtype=torch.int32, device=device)
        tables = elementwise.rope_tables(S, D, 10000.0, device)
        for cos, sin in (tables, (None, None)):
            ours, theirs = (
                [torch.full((B, kv, S, D), 7.0, device=device).to(dtype) for _ in range(2)] for _ in range(2)
            )
            q = elementwise_kernels.rope_cache(qkv, cos, sin, start, *ours)
            close(q, elementwise.rope_cache_reference(qkv, cos, sin, start, *theirs))
            for a, b in zip(ours, theirs, strict=True):
                close(a, b)
                assert (a == 7.0).all(dim=-1).sum() < a.numel() // D  # something was written


def silu_mul(dtype: torch.dtype, device: str) -> None:
    for M, inner in ((1, 40), (3, 1500)):
        x = normal(M, 2 * inner, dtype=dtype, device=device)
        close(elementwise_kernels.silu_mul(x), elementwise.silu_mul_reference(x), 2)


def relu(dtype: torch.dtype, device: str) -> None:
    for M, inner in ((1, 40), (3, 1500)):
        x = normal(M, inner, dtype=dtype, device=device)
        x[0, 7] = float("nan")
        torch.testing.assert_close(elementwise_kernels.relu(x), torch.relu(x), rtol=0, atol=0, equal_nan=True)


def experts(dtype: torch.dtype, device: str) -> None:
    """route, the norm of what experts gave, and the kernel for few rows."""
    for M, E, top_k in ((1, 8, 2), (5, 8, 2), (37, 6, 3), (64, 4, 4)):
        logits = normal(M, E, dtype=dtype, device=device)
        ours, expected = Routing(*routing_kernels.route(logits, top_k)), routing.route_reference(logits, top_k)
        for name in ("offsets", "tokens", "places"):
            assert torch.equal(getattr(ours, name), getattr(expected, name)), name
        torch.testing.assert_close(ours.shares, expected.shares, rtol=1e-5, atol=1e-6)
        y = normal(M * top_k, 48, dtype=dtype, device=device)
        h, gain = normal(M, 48, dtype=dtype, device=device, seed=1), normal(48, dtype=dtype, device=device, seed=2)
        summed = routing.combine(Outputs(y, expected))
        norm = (h, gain, None, 1e-5, False)
        normed, total = elementwise_kernels.add_norm(y, *norm, places=ours.places, shares=ours.shares)
        close(total, elementwise.add_norm_reference(summed, *norm)[1])
        close(normed, elementwise.add_norm_reference(summed, *norm)[0], 3)
        weight = normal(E, 24, 48, dtype=dtype, device=device)
        of_row = torch.arange(E, device=device).repeat_interleave(expected.offsets.diff().long())
        products = torch.einsum("tk,tnk->tn", y.double(), weight[of_row].double())
        close(routing_kernels.rows(y, ours.offsets, weight), products.to(dtype), 2)


def norm_route(dtype: torch.dtype, device: str) -> None:
    """From norm to sorted rows, one token and several; no two logits of a token are so close that rounding could swap
    them, but the last two experts have the same router row: a tie, which the lower number wins."""
    for M, E, H, top_k, center in (
        (1, 8, 64, 2, False),
        (1, 5, 200, 3, True),
        (3, 8, 1024, 2, False),
        (16, 6, 64, 4, True),
    ):
        assert router_kernels.takes(M, E, H)
        generator = torch.Generator().manual_seed(M)
        router = torch.eye(E).repeat(1, H // E + 1)[:, :H] * E / H + torch.randn(E, H, generator=generator) * 2e-4
        router[-1] = router[-2]
        order = torch.stack([torch.randperm(E, generator=generator) for _ in range(M)]).float()
        wanted = (order - E / 2) @ torch.eye(E).repeat(1, H // E + 1)[:, :H]  # larger where an expert is better
        x = normal(M, H, dtype=dtype, device=device, seed=5)
        h = (wanted.to(device) - x.float()).to(dtype)
        weight, router = torch.ones(H, dtype=dtype, device=device), router.to(device, dtype)
        weight[::3] = 0.75
        bias = normal(H, dtype=dtype, device=device, seed=6) * 0.01 if center else None
        case = (x, h, weight, bias, 1e-5, center)
        normed, total = elementwise.add_norm_reference(*case)
        logits = (normed.double() @ router.double().t()).float()
        gaps = logits[:, :-1].sort().values.diff(dim=1)
        assert gaps.min() > 20 * EPS[dtype], "a case that shows nothing"
        expected = routing.route_reference(logits.to(dtype), top_k)
        rows, ours_total, sent = router_kernels.norm_route(*case, router, top_k)
        ours = Routing(*sent)
        assert torch.equal(ours_total, total)
        for name in ("offsets", "tokens", "places"):
            assert torch.equal(getattr(ours, name), getattr(expected, name)), name
        torch.testing.assert_close(ours.shares, expected.shares, rtol=4 * EPS[dtype], atol=1e-6)
        assert expected.shares[:, -1].min() > 1e-3
        close(rows, normed[expected.tokens.long()], 3)


def decode_attention(dtype: torch.dtype, device: str) -> None:
    for heads, kv, D, S, splits, block in (
        (4, 4, 16, 100, 1, 16),
        (4, 4, 16, 100, 3, 16),
        (6, 2, 32, 100, 5, 16),
        (8, 1, 16, 100, 7, 32),  # more stretches than blocks: some are empty
    ):
        qkv = normal(5, (heads + 2 * kv) * D, dtype=dtype, device=device, seed=1)
        keys, values = (normal(5, kv, S, D, dtype=dtype, device=device, seed=s) for s in (2, 3))
        positions = torch.tensor([0, 37, 64, S - 1, S + 3], dtype=torch.int32, device=device)
        for b, p in enumerate(positions.tolist()):  # what is not there yet must not matter
            keys[b, :, p:] = values[b, :, p:] = float("nan")
        n = 5 * heads * splits
        partial = torch.full((n, D), float("nan"), device=device)
        stats = torch.full((n, 2), float("nan"), device=device)
        counters = torch.zeros(5 * kv, dtype=torch.int32, device=device)
        tables = elementwise.rope_tables(S, D, 10000.0, device)
        for cos, sin in (tables, (None, None), tables):
            ours, theirs = ((keys.clone(), values.clone()) for _ in range(2))
            scratch = (partial, stats, counters)
            y = attention_kernels.decode(qkv, cos, sin, positions, *ours, splits, block, scratch)
            close(y, attention.decode_reference(qkv, cos, sin, positions, *theirs), 3)
            assert not counters.any()
            for cache, expected, before in zip(ours, theirs, (keys, values), strict=True):
                for b, p in enumerate(positions.tolist()):
                    assert torch.equal(cache[b, :, :p], before[b, :, :p])
                    assert cache[b, :, p + 1 :].isnan().all()
                    close(cache[b, :, p : p + 1], expected[b, :, p : p + 1])


CASES = (add_norm, rope_cache, silu_mul, relu, experts, norm_route, decode_attention)
