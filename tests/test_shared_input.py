"""Linears that read one tensor quantize it once, and never take what belongs to another tensor or another state."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pipeline_oracle import IDS, TEXT, WIDE
from split_cases import random_split_tensor
from torch import Tensor

from bitwright.errors import SchemeError
from bitwright.kernels import shared_input
from bitwright.kernels.shared_input import Codes, share
from bitwright.nn.linear import QuantLinear
from bitwright.nn.load import load
from bitwright.pipeline import quantize
from bitwright.split import InputSplit

K = 96


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Every input that the operator is called with, copied."""
    seen: list[Tensor] = []
    real = shared_input.quantize_activations

    def counted(x: Tensor, *rest: object) -> tuple[Tensor, ...]:
        seen.append(x.detach().clone())
        return real(x, *rest)

    monkeypatch.setattr(shared_input, "quantize_activations", counted)
    yield seen


def split(bits: int = 4, seed: int = 0, *, block: int = 0, clip: float = 0.9, outliers: int = 16) -> InputSplit:
    order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
    return InputSplit(order[outliers:], order[:outliers].sort().values, bits, block, clip)


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(seed))


def equal(a: Codes, b: Codes) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("codes", "scale", "zero", "outliers"))


def fresh(of: InputSplit, x: Tensor) -> Codes:
    """What x is quantized to, by a linear that has not seen it."""
    return share(of).codes(x.clone())


def test_equal_splits_are_one_and_others_are_not() -> None:
    q, k = share(split()), share(split())
    assert q.split is k.split
    columns = torch.arange(K)  # the same order twice, cut at two places
    cut = [InputSplit(columns[:B], columns[B:], 4) for B in (80, 81)]
    others = [split(8), split(seed=1), split(block=16), split(clip=0.8), *cut]
    kept = [share(s) for s in [split(), *others]]
    assert len({id(s.split) for s in kept}) == len(others) + 1
    died = weakref.ref(q.split)
    del q, k, kept
    gc.collect()
    assert died() is None


def test_views_of_one_tensor_are_quantized_once(calls: list[Tensor]) -> None:
    readers = [share(split()) for _ in range(3)]
    x = inputs(2, 5)
    results = [r.codes(x.reshape(-1, K)) for r in readers]
    assert len(calls) == 1
    assert results[0] is results[1] is results[2]
    assert readers[1].codes(x.reshape(-1, K)) is not results[1]  # the same linear again: a new round
    assert len(calls) == 2
    assert readers[0].codes(x) is readers[2].codes(x)
    assert len(calls) == 2


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_padded(bits: int) -> None:
    of, x = split(bits), inputs(2, 3).bfloat16()
    c = share(of).codes(x)
    assert c.codes.shape == (6, 128) and c.outliers.shape == (6, 16) and c.outliers.dtype == torch.bfloat16
    assert not c.codes[:, K - 16 :].any()
    assert torch.equal(c.outliers, x.view(6, K)[:, of.outlier_idx])
    assert c.zero.any() == (bits == 4)


def change_in_place(x: Tensor) -> None:
    x.mul_(3)


def change_through_a_view(x: Tensor) -> None:
    x[0, 0, 0] += 100


def change_through_detached(x: Tensor) -> None:
    x.detach().add_(1)


def change_by_out(x: Tensor) -> None:
    torch.mul(x, 2, out=x)


def exchange_the_data(x: Tensor) -> None:
    x.data = inputs(2, 5, seed=9)


CHANGES = [change_in_place, change_through_a_view, change_through_detached, change_by_out, exchange_the_data]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_changes_are_seen(change: Callable[[Tensor], None]) -> None:
    q, k = share(split()), share(split())
    x = inputs(2, 5)
    before = q.codes(x)
    change(x)
    after = k.codes(x)
    assert not equal(before, after)
    assert equal(after, fresh(split(), x))


def test_other_parts_of_one_tensor_are_other_inputs() -> None:
    x = inputs(4, 6)
    for part in (x[1:], x[::2], x[:, :3], x.transpose(0, 1)):
        q, k = share(split()), share(split())
        q.codes(x)
        assert equal(k.codes(part), fresh(split(), part.contiguous()))


def test_rows_apart_are_other_rows() -> None:
    """One address, shape and count of changes; only the strides differ."""
    x = inputs(8)
    q, k = share(split()), share(split())
    assert not equal(q.codes(x[:4]), k.codes(x[::2]))
    assert equal(share(split()).codes(x[::2]), fresh(split(), x[::2]))


def test_nothing_outlives_the_input() -> None:
    q = share(split())
    x = inputs(2, 5)
    died = weakref.ref(q.codes(x.view(10, K)).codes)
    assert died() is not None
    del x
    gc.collect()
    assert died() is None
    # A tensor in the same place with the same count of changes is another one.
    for seed in range(5):
        y = inputs(2, 5, seed=seed)
        assert equal(share(split()).codes(y), fresh(split(), y))
        del y


def test_few_inputs_are_remembered(calls: list[Tensor]) -> None:
    """Two at a time: the input of a parallel block is still there after attention's last linear ran."""
    qkv, dense, up = (share(split()) for _ in range(3))
    x, inner = inputs(3), inputs(3, seed=2)
    qkv.codes(x), dense.codes(inner), up.codes(x)
    assert len(calls) == 2
    many = [inputs(3, seed=s) for s in range(10)]
    died = [weakref.ref(qkv.codes(m).codes) for m in many]
    gc.collect()
    assert sum(d() is not None for d in died) == 2


def test_inference_tensors_are_not_remembered() -> None:
    q, k = share(split()), share(split())
    with torch.inference_mode():
        x = inputs(2, 5)
        q.codes(x)
        x.mul_(5)
        got = k.codes(x)
    assert equal(got, fresh(split(), x))


def test_threads_do_not_take_from_each_other(calls: list[Tensor]) -> None:
    q, k = share(split()), share(split())
    x = inputs(2, 5)
    first = q.codes(x)
    found: list[Codes] = []
    thread = threading.Thread(target=lambda: found.append(k.codes(x)))
    thread.start()
    thread.join()
    assert len(calls) == 2 and found[0] is not first and equal(found[0], first)


def test_copies_share_as_well() -> None:
    q = share(split())
    assert copy.deepcopy(q).split is q.split


def test_sixteen_bits_have_no_codes() -> None:
    with pytest.raises(SchemeError, match="a4 or a8"):
        share(split(16))


def test_the_compiler_sees_plain_operators() -> None:
    """One graph, nothing remembered: a change between two calls is seen."""
    q, k = share(split()), share(split())

    def both(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = q.codes(x.view(-1, K))
        x = x * 2
        b, c = k.codes(x), q.codes(x)
        return a.scale, b.scale, c.scale

    x = inputs(2, 5)
    explained = torch._dynamo.explain(both)(x)
    assert explained.graph_break_count == 0 and explained.graph_count == 1
    got = torch.compile(both, fullgraph=True, backend="aot_eager")(x)
    once, twice = fresh(split(), x).scale, fresh(split(), x * 2).scale
    assert torch.equal(got[0], once) and torch.equal(got[1], twice) and torch.equal(got[2], twice)


def test_linears_with_equal_splits_share(calls: list[Tensor]) -> None:
    """Through the modules, bit for bit what each gives alone."""
    tensors = [random_split_tensor(24, K, "w4a4-o16", seed=3) for _ in range(3)]
    for i, t in enumerate(tensors):  # other weights, the same split
        torch.nn.init.normal_(t.outliers, generator=torch.Generator().manual_seed(i))
    layers = [QuantLinear.from_quantized(t, t.scheme) for t in tensors]
    x = inputs(2, 5).bfloat16()
    together = [layer(x) for layer in layers]
    assert len(calls) == 1
    alone = [layer(x.clone()) for layer in layers]
    assert len(calls) == 4
    assert all(map(torch.equal, together, alone))
    assert not torch.equal(together[0], together[1])


# linears of a block that read an input of their own, per model: (attention and MLP, linears in all)
COUNTS = {"llama": (4, 7), "opt": (4, 6), "falcon": (3, 4)}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return str(file)


@pytest.mark.parametrize("family", [*COUNTS, "mixtral"])
def test_models_quantize_each_input_once(
    tiny_folder: Callable[..., Path],
    text: str,
    tmp_path: Path,
    family: str,
    calls: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = tiny_folder(family, torch.bfloat16, **WIDE[family])
    small = {"num_samples": 6, "seq_len": 64}
    result = quantize(
        source, tmp_path / "out", scheme="w4a4-o16-rot", algorithm="quik", calibration=text, device="cpu", **small
    )
    model = load(result.out)
    calls.clear()
    with torch.no_grad():
        got = model(IDS).logits
    linears = [m for m in model.modules() if isinstance(m, QuantLinear)]
    blocks = model.config.num_hidden_layers
    if family in COUNTS:
        inputs_of_block, linears_of_block = COUNTS[family]
        assert len(linears) == blocks * linears_of_block
        assert len(calls) == blocks * inputs_of_block
    else:
        # Attention reads two inputs with four linears; each expert that has tokens two with three.
        attention = [x for x in calls if x.shape[0] == IDS.numel()]
        assert len(attention) >= 2 * blocks
        experts = len(calls) - 2 * blocks
        assert experts % 2 == 0 and 0 < experts <= 2 * blocks * model.config.num_local_experts
    shared = len(calls)
    calls.clear()
    monkeypatch.setattr(shared_input._Memory, "recall", lambda self, rows, reader: self.quantized(rows))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, got)
    if family in COUNTS:
        assert len(calls) == blocks * COUNTS[family][1]
    else:
        assert (len(calls) - 4 * blocks) * 2 == (shared - 2 * blocks) * 3
