"""The activation quantizer on a GPU: the whole matrix to the last bit, repeats, graphs, and who shares what when."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from torch import Tensor

from bitwright.kernels import shared_input
from bitwright.kernels.elementwise import add_norm, silu_mul
from bitwright.kernels.shared_input import Codes, share
from bitwright.kernels.split_ops import (
    add_rms_norm_quantize,
    quantize_activations,
    rms_norm_quantize,
    silu_mul_quantize,
)
from bitwright.split import InputSplit
from gpu import quantize_cases as cases
from gpu.quantize_cases import Case

pytestmark = pytest.mark.gpu

SUBNORMAL = [Case(bits, 512, 16, block, "ascending", dtype=torch.bfloat16) for bits in (4, 8) for block in (0, 512)]
WIDE = [Case(4, 4096, 256, order="ascending", M=300), Case(8, 8192, 0, M=600), Case(4, 8064, 128, M=600)]


@pytest.mark.parametrize("case", cases.matrix() + cases.shapes() + WIDE, ids=str)
def test_every_bit(case: Case, poison: None) -> None:
    cases.check(quantize_activations, case, "cuda")


@pytest.mark.parametrize("case", SUBNORMAL, ids=str)
def test_subnormal_activations(case: Case, poison: None) -> None:
    """bf16 below the normal floats, where a GPU that flushed anything would find zeros."""
    x, *rest = cases.operands(case)
    x = (torch.randn(x.shape, generator=torch.Generator().manual_seed(5)) * 2.0**-126).to(case.dtype)
    assert (x != 0).any() and x.abs().max() < 2.0**-120
    on_gpu = [t.cuda() if isinstance(t, Tensor) else t for t in (x, *rest)]
    cases.compare(quantize_activations(*on_gpu), quantize_activations(x, *rest), str(case))


@pytest.mark.parametrize("bits", [4, 8])
def test_many_scales(bits: int, poison: None) -> None:
    """Millions of quotients with scales all over the range: the reciprocal, twice corrected, must not be off once."""
    generator = torch.Generator(device="cuda").manual_seed(bits)
    x = torch.randn(4096, 2048, device="cuda", generator=generator)
    x *= torch.exp2(torch.randn(4096, 1, device="cuda", generator=generator) * 25)
    none = torch.empty(0, dtype=torch.int32, device="cuda")
    got = quantize_activations(x, None, none, bits, 0, 0.9)
    cases.compare(got, quantize_activations(x.cpu(), None, none.cpu(), bits, 0, 0.9), "many scales")


def test_quotients_near_a_tie(poison: None) -> None:
    """x = (n + 1/2) scale and its two neighbours, for 4000 scales: rounding once or twice tells them apart."""
    generator = torch.Generator().manual_seed(0)
    largest = torch.rand(4000, 1, generator=generator) + 1
    scale = largest / torch.full_like(largest, 127)
    x = (torch.arange(-126, 126) + 0.5) * scale
    x = torch.cat((x, x.nextafter(torch.tensor(9.0)), x.nextafter(torch.tensor(-9.0)), largest), dim=1)
    none = torch.empty(0, dtype=torch.int32)
    expected = quantize_activations(x, None, none, 8, 0, 1.0)
    cases.compare(quantize_activations(x.cuda(), None, none.cuda(), 8, 0, 1.0), expected, "near ties")


@pytest.mark.parametrize("case", [Case(4, 4096, 0), Case(8, 8000, 192, 64, "shuffled", M=600)], ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_a_norm_in_front(case: Case, dtype: torch.dtype, poison: None) -> None:
    """Another order of the sum of squares may round a value the other way: one unit in its last place, seldom."""
    _, base_idx, outlier_idx, *rest = cases.operands(case, "cuda")
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(case.M, case.K, generator=generator).to(dtype).cuda()
    weight = (torch.rand(case.K, generator=generator) + 0.5).to(dtype).cuda()
    got = rms_norm_quantize(x, weight, 1e-5, base_idx, outlier_idx, *rest)
    h = x.double()
    h = (h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + 1e-5)).to(dtype) * weight
    codes, scale, zero, outliers = quantize_activations(h, base_idx, outlier_idx, *rest)
    unit = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(got[1], scale, rtol=unit, atol=0)
    torch.testing.assert_close(got[3], outliers, rtol=unit, atol=0)
    assert (got[2] - zero).abs().max() <= 1
    apart = ((got[0] - got[2][:, None]) - (codes - zero[:, None])).abs()
    assert apart[:, : case.B].max() <= 2 and (apart[:, : case.B] > 0).float().mean() < 0.05


BEFORE = [
    Case(bits, B, O, block, order, M=M)
    for bits, B, O, block, order in (
        (4, 7936, 256, 0, "ascending"),
        (8, 4096, 0, 0, "first"),
        (8, 27776, 896, 0, "ascending"),
        (4, 1001, 23, 0, "shuffled"),
        (8, 1536, 16, 512, "shuffled"),
        (4, 40000, 960, 0, "ascending"),
    )
    for M in (1, 3, 600)
] + [Case(4, 7936, 256, 0, "ascending", M=2048)]


@pytest.mark.parametrize("case", BEFORE, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_a_gate_in_front(case: Case, dtype: torch.dtype, poison: None) -> None:
    """Bit for bit what the product's own kernel leaves in memory: gates of every size, peculiar tokens included."""
    x, base_idx, outlier_idx, *rest = cases.operands(replace(case, dtype=dtype), "cuda")
    generator = torch.Generator(device="cuda").manual_seed(4)
    gates = torch.randn(x.shape, device="cuda", generator=generator) * 5
    large = torch.tensor([-1e4, -104.0, -95.0, -88.5, -88.0, -87.25, -60.0, 1e-30, 0.0, 30.0, 90.0, 6e4], device="cuda")
    chosen = large[torch.randint(len(large), x.shape, device="cuda", generator=generator)]
    gates = torch.where(torch.rand(x.shape, device="cuda", generator=generator) < 0.2, chosen, gates)
    both = torch.cat((gates.to(dtype), x), dim=1)
    got = silu_mul_quantize(both, base_idx, outlier_idx, *rest)
    wanted = quantize_activations(silu_mul(both), base_idx, outlier_idx, *rest)
    cases.compare(got, tuple(t.cpu() for t in wanted), str(case))


@pytest.mark.parametrize("case", BEFORE, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_a_sum_and_its_norm_in_front(case: Case, dtype: torch.dtype, poison: None) -> None:
    """The sum to the last bit; its norm but for another order of the sum of squares, as in `test_a_norm_in_front`."""
    _, base_idx, outlier_idx, *rest = cases.operands(replace(case, M=1), "cuda")
    generator = torch.Generator(device="cuda").manual_seed(2)
    x, residual = (torch.randn(case.M, case.K, device="cuda", generator=generator).to(dtype) for _ in range(2))
    weight = (torch.rand(case.K, device="cuda", generator=generator) + 0.5).to(dtype)
    *got, total = add_rms_norm_quantize(x, residual, weight, 1e-5, base_idx, outlier_idx, *rest, True)
    h, summed = add_norm(x, residual, weight, None, 1e-5, False)
    assert torch.equal(total, summed)
    alone = rms_norm_quantize(total, weight, 1e-5, base_idx, outlier_idx, *rest, True)
    cases.compare(tuple(got), tuple(t.cpu() for t in alone), "of the stored sum")
    codes, scale, zero, outliers = quantize_activations(h, base_idx, outlier_idx, *rest)
    unit = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(got[1], scale, rtol=unit, atol=0)
    torch.testing.assert_close(got[3], outliers, rtol=unit, atol=0)
    assert (got[2] - zero).abs().max() <= 1
    apart = ((got[0] - got[2][:, None]) - (codes - zero[:, None])).abs()[:, : case.B]
    assert apart.max() <= 2 and (apart > 0).float().mean() < 0.01


def test_gates_beyond_two_gigabytes() -> None:
    M, K = 70_000, 16_384
    if torch.cuda.mem_get_info()[0] < M * K * 5 + (1 << 30):
        pytest.skip("needs 7 GB of free GPU memory")
    x = torch.zeros(M, 2 * K, dtype=torch.bfloat16, device="cuda")
    x[-4:] = torch.randn(4, 2 * K, generator=torch.Generator().manual_seed(1)).bfloat16().cuda()
    outlier_idx = torch.arange(0, K, 2048, dtype=torch.int32, device="cuda")
    base_idx = torch.ones(K, device="cuda").index_fill(0, outlier_idx.long(), 0).nonzero()[:, 0].int()
    got = silu_mul_quantize(x, base_idx, outlier_idx, 8, 0, 1.0)
    expected = quantize_activations(silu_mul(x[-4:].contiguous()), base_idx, outlier_idx, 8, 0, 1.0)
    cases.compare(tuple(t[-4:] for t in got), tuple(t.cpu() for t in expected), "last rows")
    assert not got[0][:-4].any()


def test_sums_beyond_two_gigabytes() -> None:
    M, K = 70_000, 32_768
    if torch.cuda.mem_get_info()[0] < M * K * 7 + (1 << 30):
        pytest.skip("needs 17 GB of free GPU memory")
    x, residual = (torch.zeros(M, K, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    x[-4:], residual[-4:] = (torch.randn(4, K, generator=generator).bfloat16().cuda() for _ in range(2))
    rest = torch.ones_like(x[0]), 1e-5, None, torch.empty(0, dtype=torch.int32, device="cuda"), 8, 0, 1.0
    *got, total = add_rms_norm_quantize(x, residual, *rest)
    *expected, last = add_rms_norm_quantize(x[-4:].clone(), residual[-4:].clone(), *rest)
    cases.compare(tuple(t[-4:] for t in got), tuple(t.cpu() for t in expected), "last rows")
    assert torch.equal(total[-4:], last) and torch.equal(last, x[-4:] + residual[-4:]) and not total[:-4].any()


def test_a_gate_and_a_sum_in_a_graph_and_every_time_the_same() -> None:
    g = torch.Generator(device="cuda").manual_seed(0)
    x = torch.randn(300, 8192, device="cuda", generator=g).bfloat16()
    weight, none = torch.ones_like(x[0]), torch.empty(0, dtype=torch.int32, device="cuda")
    base_idx = torch.randperm(8192, device="cuda", generator=g).int()
    picked = base_idx[base_idx < 4096]
    calls = (
        lambda: silu_mul_quantize(x, picked, none, 8, 0, 1.0),
        lambda: add_rms_norm_quantize(x, x * 2, weight, 1e-5, base_idx, none, 4, 0, 0.9, True),
    )
    for call in calls:
        first = call()
        for _ in range(20):
            assert all(map(torch.equal, first, call()))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = call()
        x.copy_(torch.randn(x.shape, device="cuda", generator=g))
        graph.replay()
        assert all(map(torch.equal, got, call())) and not torch.equal(got[0], first[0])


def test_no_tokens() -> None:
    cases.check(quantize_activations, Case(4, 96, 8, M=0), "cuda")
    x, none = torch.empty(0, 96, device="cuda"), torch.empty(0, dtype=torch.int32, device="cuda")
    *_, total = add_rms_norm_quantize(x, x, torch.ones(96, device="cuda"), 1e-5, None, none, 8, 0, 1.0)
    assert total.shape == (0, 96) and silu_mul_quantize(x, None, none, 8, 0, 1.0)[0].shape == (0, 128)


def test_rows_beyond_two_gigabytes() -> None:
    """Offsets of x and of the codes pass 2^31; compared on the last rows."""
    M, K = 70_000, 32_768
    if torch.cuda.mem_get_info()[0] < M * K * 3 + (1 << 30):
        pytest.skip("needs 8 GB of free GPU memory")
    x = torch.zeros(M, K, dtype=torch.bfloat16, device="cuda")
    last = torch.randn(4, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    x[-4:] = last.cuda()
    outlier_idx = torch.arange(0, K, 2048, dtype=torch.int32)
    base_idx = torch.tensor(sorted(set(range(K)) - set(outlier_idx.tolist())), dtype=torch.int32)
    got = quantize_activations(x, base_idx.cuda(), outlier_idx.cuda(), 8, 0, 1.0)
    expected = quantize_activations(last, base_idx, outlier_idx, 8, 0, 1.0)
    cases.compare(tuple(t[-4:] for t in got), expected, "last rows")
    assert not got[0][:-4].any()


@pytest.mark.parametrize("case", [Case(4, 4096, 256, 1024, "shuffled", 0.9, M=64), Case(8, 20480, 7, M=5)], ids=str)
def test_the_same_every_time(case: Case, poison: None) -> None:
    operands = cases.operands(case, "cuda")
    first = quantize_activations(*operands)
    for _ in range(20):
        again = quantize_activations(*operands)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("case", [Case(4, 1024, 40, 1024, "shuffled", 0.9, M=2), Case(8, 40, 3, M=2)], ids=str)
def test_opcheck(case: Case) -> None:
    x, *rest = cases.operands(case, "cuda")
    torch.library.opcheck(quantize_activations, (x, *rest))
    x, weight = torch.randn(2, case.K, device="cuda"), torch.ones(case.K, device="cuda")
    torch.library.opcheck(rms_norm_quantize, (x, weight, 1e-5, *rest, True))
    torch.library.opcheck(add_rms_norm_quantize, (x, x * 2, weight, 1e-5, *rest, True))
    torch.library.opcheck(silu_mul_quantize, (x.repeat(1, 2), *rest))


def test_a_graph_quantizes_what_is_there_at_replay() -> None:
    x, *rest = cases.operands(Case(4, 1024, 40, 512, "shuffled", 0.9, M=5), "cuda")
    quantize_activations(x, *rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = quantize_activations(x, *rest)
    for seed in range(3):
        x.copy_(cases.operands(Case(4, 1024, 40, 512, "shuffled", 0.9, M=5), "cuda", seed)[0])
        graph.replay()
        expected = quantize_activations(*(t.cpu() if isinstance(t, Tensor) else t for t in (x, *rest)))
        cases.compare(got, expected, f"replay {seed}")


# --- sharing


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every call of the operator."""
    seen: list[int] = []

    def counted(x: Tensor, *rest: object) -> tuple[Tensor, ...]:
        seen.append(x.shape[0])
        return quantize_activations(x, *rest)

    monkeypatch.setattr(shared_input, "quantize_activations", counted)
    return seen


def split() -> InputSplit:
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0)).cuda()
    return InputSplit(order[16:], order[:16].sort().values, 4, 0, 0.9)


def activations(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(seed)).bfloat16().cuda()


def same(a: Codes, b: Codes) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("codes", "scale", "zero", "outliers"))


def test_readers_of_one_tensor_share(calls: list[int]) -> None:
    q, k, v = (share(split()) for _ in range(3))
    x = activations()
    assert q.codes(x) is k.codes(x.view(6, 256)) is v.codes(x) and calls == [6]
    x.add_(1)
    assert same(k.codes(x), share(split()).codes(x.clone())) and len(calls) == 3


def test_streams_do_not_share(calls: list[int]) -> None:
    q, k = share(split()), share(split())
    x = activations()
    first = q.codes(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        second = k.codes(x)
    torch.cuda.synchronize()
    assert second is not first and same(first, second) and len(calls) == 2


def test_a_capture_takes_nothing_from_outside_and_gives_nothing_away(calls: list[int]) -> None:
    """Within a capture linears share; each graph holds a quantizer of its own, so each replay sees its input."""
    q, k, v = (share(split()) for _ in range(3))
    x = activations()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graphs, inside = [], []
    with torch.cuda.stream(stream):
        q.codes(x)
        for readers in ((k, v), (q, k, v)):
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1], stream=stream):
                found = [r.codes(x) for r in readers]
            assert all(f is found[0] for f in found)
            inside.append(found[0])
        outside = v.codes(x)
    torch.cuda.current_stream().wait_stream(stream)
    assert len({id(c) for c in (*inside, outside)}) == 3
    assert len(calls) == 4
    for seed, graph, codes in zip((1, 2), graphs, inside, strict=True):
        x.copy_(activations(seed))
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert same(codes, share(split()).codes(activations(seed)))


def test_what_a_replay_writes_is_quantized_anew() -> None:
    """torch does not count it as a change, so only the rounds of readers help: every linear, every time."""
    q, k = share(split()), share(split())
    x, source = activations(), activations()
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):
        x.copy_(source)
    for seed in range(3):
        source.copy_(activations(seed))
        graph.replay()
        expected = share(split()).codes(activations(seed))
        assert same(q.codes(x), expected) and same(k.codes(x), expected)
