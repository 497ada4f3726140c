"""QuantizedTensor: its formula against a loop, its invariants against bad input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.errors import FormatError
from bitwright.qtensor import QuantizedTensor, spread
from bitwright.scheme import WEIGHT_BITS, WeightScheme


def random_qtensor(N: int, K: int, scheme: WeightScheme, seed: int, dtype: torch.dtype) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    grid = (N, scheme.num_groups(K))

    def integers(shape: tuple[int, int]) -> torch.Tensor:
        return torch.randint(scheme.qmin, scheme.qmax + 1, shape, generator=generator).to(torch.int8)

    scale = torch.randn(grid, generator=generator).to(dtype)  # both signs
    return QuantizedTensor(integers((N, K)), scale, None if scheme.symmetric else integers(grid), scheme)


@given(
    bits=st.sampled_from(WEIGHT_BITS),
    group_size=st.sampled_from([None, 8, 16, 24]),
    symmetric=st.booleans(),
    N=st.integers(1, 3),
    K=st.integers(1, 50),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_dequantize_is_the_documented_formula(
    bits: int, group_size: int | None, symmetric: bool, N: int, K: int, seed: int, dtype: torch.dtype
) -> None:
    qt = random_qtensor(N, K, WeightScheme(bits, group_size, symmetric), seed, dtype)
    w = qt.dequantize()
    assert w.shape == (N, K) == qt.shape and w.dtype == torch.float32
    for n in range(N):
        for k in range(K):
            i = 0 if group_size is None else k // group_size
            zero = 0 if qt.zero_point is None else int(qt.zero_point[n, i])
            # exact: at most 9 bits of code difference times at most 11 bits of scale
            assert w[n, k].item() == (int(qt.codes[n, k]) - zero) * qt.scale[n, i].item()
    assert torch.equal(qt.dequantize(torch.bfloat16), w.to(torch.bfloat16))


def test_spread_repeats_per_group_with_a_ragged_tail() -> None:
    per_group = torch.tensor([[1, 2], [3, 4]])
    assert spread(per_group, 3, 5).tolist() == [[1, 1, 1, 2, 2], [3, 3, 3, 4, 4]]
    assert spread(per_group[:, :1], 3, 2).tolist() == [[1, 1], [3, 3]]


def test_bits_per_weight_is_that_of_the_scheme() -> None:
    qt = random_qtensor(2, 40, WeightScheme(4, 16), 0, torch.float16)
    assert qt.bits_per_weight == 4 + 3 * 16 / 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(2, 40, dtype=torch.int32)}, "int8"),
        ({"scale": torch.zeros(2, 2, dtype=torch.float16)}, r"\(2, 2\).*\(2, 3\)"),
        ({"zero_point": None}, "present"),
        ({"zero_point": torch.zeros(2, 3, dtype=torch.int32)}, "int8"),
        ({"zero_point": torch.zeros(3, 2, dtype=torch.int8)}, r"\(3, 2\)"),
        ({"scheme": WeightScheme(4, 16)}, "absent"),
    ],
)
def test_inconsistent_parts_are_refused(change: dict[str, object], message: str) -> None:
    qt = random_qtensor(2, 40, WeightScheme(4, 16, symmetric=False), 0, torch.float16)
    with pytest.raises(FormatError, match=message):
        replace(qt, **change)
