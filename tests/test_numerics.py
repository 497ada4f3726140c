"""Grids against brute force: the range for minmax, an exhaustive scan of every storable scale for mse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from algorithm_oracles import minmax_grid, rng
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitwright.algorithms.rtn import rtn
from bitwright.errors import NumericsError
from bitwright.numerics import Grid, check_finite, choose_grid, encode, grouped, quantized
from bitwright.scheme import WeightScheme

ALL_BITS = (2, 3, 4, 8)
# K, group_size: per row, whole groups, ragged tails of several and of one column, a group wider than the row
LAYOUTS = [(40, None), (48, 16), (41, 16), (33, 8), (12, 32)]


def heavy(N: int, K: int, seed: int = 0) -> Tensor:
    """Weights with a few large values, rows of unequal size and rows of one sign."""
    g = rng(seed)
    W = torch.randn(N, K, generator=g) * torch.exp(torch.randn(N, 1, generator=g))
    W = torch.where(torch.rand(N, K, generator=g) < 0.05, 4 * W, W)
    W[0], W[1] = W[0].abs(), -W[1].abs()
    return W


def spans(K: int, group_size: int | None) -> list[slice]:
    g = group_size or K
    return [slice(i, min(i + g, K)) for i in range(0, K, g)]


def dequantized(W: Tensor, grid: Grid, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return quantized(encode(W, grid), grid, dtype).dequantize()


def nearest_error(
    w: np.ndarray, c: np.ndarray, scale: np.ndarray, zero: np.ndarray, scheme: WeightScheme
) -> np.ndarray:
    """Weighted squared error [...] of w [g] on the grids scale, zero [...], by trying every code."""
    codes = np.arange(scheme.qmin, scheme.qmax + 1)
    values = (codes - zero[..., None]) * scale[..., None]  # [..., codes]
    distance = np.abs(w[:, None] - values[..., None, :]).min(-1)  # [..., g]
    return (c * distance**2).sum(-1)


def all_scales(low: float, high: float, dtype: torch.dtype) -> np.ndarray:
    """Every positive number of a 16-bit dtype in [low, high]."""
    ints = torch.arange(1, 0x7F00 if dtype == torch.bfloat16 else 0x7BFF, dtype=torch.int16)
    values = ints.view(dtype).double().numpy()
    return values[(values >= low) & (values <= high)]


# ------------------------------------------------------------------------------------------------- min/max


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("K,g", LAYOUTS)
def test_minmax_is_the_range_of_each_group(K: int, g: int | None, symmetric: bool, bits: int) -> None:
    W, scheme = heavy(20, K), WeightScheme(bits, g, symmetric)
    grid = choose_grid(W, scheme, "minmax")
    assert grid.scale.shape == (20, len(spans(K, g))) and (grid.zero_point is None) == symmetric
    for i, span in enumerate(spans(K, g)):
        scale, zero, margin = minmax_grid(W[:, span].double().numpy(), scheme)
        safe = margin > 1e-3
        assert safe.mean() > 0.9
        np.testing.assert_array_equal(grid.scale[:, i].double().numpy()[safe], scale[safe])
        if grid.zero_point is not None:
            np.testing.assert_array_equal(grid.zero_point[:, i].double().numpy()[safe], zero[safe])


@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_scales_are_exact_in_their_storage_dtype(bits: int, dtype: torch.dtype, symmetric: bool, search: str) -> None:
    W, scheme = heavy(30, 41), WeightScheme(bits, 16, symmetric)
    grid = choose_grid(W, scheme, search, scale_dtype=dtype)
    assert grid.scale.dtype == torch.float32
    assert torch.equal(grid.scale.to(dtype).float(), grid.scale)
    assert (grid.scale != 0).all()
    if dtype == torch.float16:  # which has more digits than bfloat16, and these scales use them
        assert not torch.equal(grid.scale.bfloat16().float(), grid.scale)
    if grid.zero_point is not None:
        assert torch.equal(grid.zero_point.round().clamp(scheme.qmin, scheme.qmax), grid.zero_point)
    # The stored tensor decodes to exactly what the grid says.
    codes = encode(W, grid)
    zero = 0 if grid.zero_point is None else grid.zero_point.repeat_interleave(16, 1)[:, :41]
    want = (codes - zero) * grid.scale.repeat_interleave(16, 1)[:, :41]
    assert torch.equal(quantized(codes, grid, dtype).dequantize(), want)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_asymmetric_range_always_holds_zero(bits: int) -> None:
    """Groups of one sign keep an exact zero, and only one side of the range is used."""
    W = torch.rand(16, 24, generator=rng(1)) + 3
    W[8:] *= -1
    for search in ("minmax", "mse"):
        grid = choose_grid(W, WeightScheme(bits, 8, symmetric=False), search)
        assert not dequantized(torch.zeros_like(W), grid).any()
    grid = choose_grid(W, WeightScheme(bits, 8, symmetric=False), "minmax")
    assert (grid.zero_point[:8] == -(2 ** (bits - 1))).all()
    assert (
        grid.zero_point[8:] >= 2 ** (bits - 1) - (1 if bits < 8 else 2)
    ).all()  # the rounded scale may move it by one


# ------------------------------------------------------------------------------------------------- least error


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("K,g", LAYOUTS)
def test_mse_is_never_worse_than_minmax(K: int, g: int | None, bits: int, symmetric: bool, weighted: bool) -> None:
    W, scheme = heavy(40, K, seed=bits), WeightScheme(bits, g, symmetric)
    c = torch.exp(torch.randn(K, generator=rng(3))) if weighted else None
    ours = (W - dequantized(W, choose_grid(W, scheme, "mse", c))).double().square()
    theirs = (W - dequantized(W, choose_grid(W, scheme, "minmax"))).double().square()
    weight = 1 if c is None else c.double()
    for span in spans(K, g):
        a, b = (ours * weight)[:, span].sum(1), (theirs * weight)[:, span].sum(1)
        assert (a <= b * (1 + 1e-5) + 1e-12).all()
    if bits <= 4 and K > 12:
        assert (ours * weight).sum() < 0.97 * (theirs * weight).sum()


@pytest.mark.parametrize(
    "bits,weighted,most",
    [(2, False, 1.015), (3, False, 1.015), (4, False, 1.015), (2, True, 1.08), (3, True, 1.03), (4, True, 1.05)],
)
def test_symmetric_mse_is_close_to_the_exhaustive_best(bits: int, weighted: bool, most: float) -> None:
    """Against every bfloat16 scale of either sign; `most` is the mean ratio of the errors (without the closed-form
    polish it would be twice as far from 1)."""
    N, g = 24, 32
    W, scheme = heavy(N, 2 * g, seed=bits), WeightScheme(bits, g)
    c = torch.exp(torch.randn(2 * g, generator=rng(4))) if weighted else torch.ones(2 * g)
    ours = ((W - dequantized(W, choose_grid(W, scheme, "mse", c))).double().square() * c).view(N, 2, g).sum(-1)
    best = np.zeros((N, 2))
    for n in range(N):
        for i in range(2):
            w = W[n, i * g : (i + 1) * g].double().numpy()
            top = np.abs(w).max()
            scales = all_scales(0.2 * top / 2 ** (bits - 1), 1.5 * top / (2 ** (bits - 1) - 1), torch.bfloat16)
            scales = np.concatenate([scales, -scales])
            errors = nearest_error(w, c[i * g : (i + 1) * g].double().numpy(), scales, np.zeros_like(scales), scheme)
            best[n, i] = errors.min()
    assert (ours.numpy() >= best * (1 - 1e-5)).all()  # the scan is exhaustive
    assert (ours.numpy() / best).mean() <= most
    assert (ours.numpy() <= 2 * best).all()


@pytest.mark.parametrize("bits,most", [(2, 1.15), (3, 1.10)])
def test_asymmetric_mse_is_close_to_the_exhaustive_best(bits: int, most: float) -> None:
    """Against every bfloat16 scale with every zero point."""
    N, g = 16, 24
    W, scheme = heavy(N, g, seed=bits), WeightScheme(bits, None, symmetric=False)
    ours = (W - dequantized(W, choose_grid(W, scheme, "mse"))).double().square().sum(1).numpy()
    best = np.zeros(N)
    zeros = np.arange(scheme.qmin, scheme.qmax + 1).astype(float)
    for n in range(N):
        w = W[n].double().numpy()
        width = max(w.max(), 0) - min(w.min(), 0)
        scales = all_scales(0.2 * width / (2**bits - 1), 1.5 * width / (2**bits - 1), torch.bfloat16)
        s, z = np.meshgrid(scales, zeros)
        best[n] = nearest_error(w, np.ones(g), s, z, scheme).min()
    assert (ours >= best * (1 - 1e-5)).all()
    assert ours.sum() <= most * best.sum()


def test_negative_scale_where_it_helps() -> None:
    """-2..1 times -1 is 2, 1, 0, -1: exact for a 2-bit group whose largest weight is positive."""
    W = torch.tensor([[2.0, 1.0, 0.0, -1.0] * 2, [-2.0, 1.0, 0.0, -1.0] * 2])
    grid = choose_grid(W, WeightScheme(2), "mse")
    assert grid.scale.tolist() == [[-1.0], [1.0]]
    assert torch.equal(dequantized(W, grid), W)
    assert (choose_grid(W, WeightScheme(2), "minmax").scale > 0).all()


@pytest.mark.parametrize("bits,least", [(2, 0.1), (3, 0.03)])
def test_signs_of_scales_pay(bits: int, least: float) -> None:
    """On Gaussian weights both signs are used, and beat the best positive scale by more than noise."""
    W = torch.randn(400, 32, generator=rng(7))
    grid = choose_grid(W, WeightScheme(bits), "mse")
    assert 0.3 < (grid.scale < 0).float().mean() < 0.7
    ours = float((W - dequantized(W, grid)).square().sum())
    positive = Grid(grid.scale.abs(), None, grid.scheme)
    assert ours < (1 - least) * float((W - dequantized(W, positive)).square().sum())


def test_columns_of_no_weight_are_ignored() -> None:
    W = heavy(12, 32, seed=3)
    c = torch.ones(32)
    c[5] = c[20] = 0
    spoilt = W.clone()
    spoilt[:, 5], spoilt[:, 20] = 0, 0.01
    clean, grid = (choose_grid(x, WeightScheme(4, 16), "mse", c) for x in (spoilt, W))
    kept = c > 0
    a = (dequantized(W, grid) - W)[:, kept].square().sum()
    b = (dequantized(spoilt, clean) - spoilt)[:, kept].square().sum()
    torch.testing.assert_close(a, b, rtol=0.02, atol=0)
    # The weight of a column is the price of its error: a dear one becomes nearly exact.
    c[5] = 1e6
    dear = (dequantized(W, choose_grid(W, WeightScheme(3, 16), "mse", c)) - W)[:, 5].abs()
    cheap = (dequantized(W, choose_grid(W, WeightScheme(3, 16), "mse")) - W)[:, 5].abs()
    assert dear.mean() < 0.2 * cheap.mean()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("K,g", [(48, 16), (41, 16), (24, None)])
def test_groups_are_independent(K: int, g: int | None, search: str, symmetric: bool) -> None:
    """A group's grid is that of its columns alone, a ragged tail's too, and rows do not see each other."""
    W, scheme = heavy(10, K, seed=2), WeightScheme(4, g, symmetric)
    c = torch.rand(K, generator=rng(0)) + 0.5
    grid = choose_grid(W, scheme, search, c)
    row = WeightScheme(4, None, symmetric)
    for i, span in enumerate(spans(K, g)):
        alone = choose_grid(W[3:5, span], row, search, c[span])
        a = dequantized(W[3:5, span], alone)
        b = dequantized(W, grid)[3:5, span]
        error = [float(((x - W[3:5, span]).square() * c[span]).sum()) for x in (a, b)]
        assert error[0] == pytest.approx(error[1], rel=1e-4, abs=1e-12)
        if search == "minmax":
            assert torch.equal(alone.scale[:, 0], grid.scale[3:5, i]) and torch.equal(a, b)


def test_many_rows_are_worked_on_in_parts() -> None:
    """More rows than one chunk holds: every row as if alone."""
    W = heavy(9000, 64)
    grid = choose_grid(W, WeightScheme(4, 32), "mse")
    for rows in (slice(0, 50), slice(4090, 4102), slice(8990, 9000)):
        assert torch.equal(choose_grid(W[rows].clone(), WeightScheme(4, 32), "mse").scale, grid.scale[rows])


@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_groups_of_zeros_and_of_tiny_weights(dtype: torch.dtype, symmetric: bool, search: str) -> None:
    W = heavy(6, 41)
    W[2], W[:, 16:32] = 0, 0
    W[4, :16] = 1e-30  # below float16, where the scale becomes one and the codes zero
    grid = choose_grid(W, WeightScheme(4, 16, symmetric), search, scale_dtype=dtype)
    Q = dequantized(W, grid, dtype)
    assert torch.isfinite(grid.scale).all() and (grid.scale != 0).all()
    assert not Q[2].any() and not Q[:, 16:32].any() and Q[4, :16].abs().max() < 1e-29
    assert torch.isfinite(Q).all() and Q[0].any()
    zeros = choose_grid(torch.zeros(3, 16), WeightScheme(2, 8, symmetric), search, torch.zeros(16))
    assert not dequantized(torch.zeros(3, 16), zeros).any()


# ------------------------------------------------------------------------------------------------- on and off the grid


@settings(max_examples=30, deadline=None)
@given(
    bits=st.sampled_from(ALL_BITS),
    symmetric=st.booleans(),
    search=st.sampled_from(["minmax", "mse"]),
    K=st.integers(1, 40),
    g=st.sampled_from([None, 8, 16]),
    seed=st.integers(0, 1000),
)
def test_encode_finds_the_nearest_value_and_is_stable(
    bits: int, symmetric: bool, search: str, K: int, g: int | None, seed: int
) -> None:
    W, scheme = heavy(4, K, seed), WeightScheme(bits, g, symmetric)
    grid = choose_grid(W, scheme, search)
    codes = encode(W, grid)
    tensor = quantized(codes, grid, torch.bfloat16)
    assert torch.equal(tensor.codes.float(), codes) and tensor.scheme == scheme
    assert codes.min() >= scheme.qmin and codes.max() <= scheme.qmax
    Q = tensor.dequantize()
    assert torch.equal(encode(Q, grid), codes)
    levels = torch.arange(scheme.qmin, scheme.qmax + 1).double()
    for i, span in enumerate(spans(K, g)):
        zero = 0 if grid.zero_point is None else grid.zero_point[:, i : i + 1].double()
        values = (levels - zero) * grid.scale[:, i : i + 1].double()  # [N, levels]
        best = (W[:, span, None].double() - values[:, None]).abs().amin(-1)
        ours = (W[:, span] - Q[:, span]).double().abs()
        assert (ours <= best * (1 + 1e-5) + 1e-6 * W.abs().max()).all()


def test_rtn_is_its_grid_and_the_nearest_codes() -> None:
    W = heavy(8, 41)
    W0 = W.clone()
    for search in ("minmax", "mse"):
        for dtype in (torch.bfloat16, torch.float16):
            scheme = WeightScheme(3, 16, symmetric=False)
            tensor = rtn(W, scheme, search=search, scale_dtype=dtype)
            grid = choose_grid(W, scheme, search, scale_dtype=dtype)
            assert torch.equal(tensor.codes.float(), encode(W, grid)) and tensor.scale.dtype == dtype
            assert torch.equal(tensor.scale.float(), grid.scale)
    assert torch.equal(W, W0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_sixteen_bits(dtype: torch.dtype) -> None:
    """The grid of a 16-bit weight is that of the same values in float32."""
    W = heavy(8, 32).to(dtype)
    scheme = WeightScheme(4, 16)
    assert torch.equal(choose_grid(W, scheme).scale, choose_grid(W.float(), scheme).scale)
    assert torch.equal(rtn(W, scheme).codes, rtn(W.float(), scheme).codes)


@pytest.mark.parametrize("K,g", LAYOUTS)
def test_grouped_pads_with_zeros(K: int, g: int | None) -> None:
    W = torch.randn(3, K, generator=rng(0))
    blocks = grouped(W, g)
    assert torch.equal(blocks.reshape(3, -1)[:, :K], W)
    assert not blocks.reshape(3, -1)[:, K:].any()
    assert blocks.shape == (3, len(spans(K, g)), g or K)


# ------------------------------------------------------------------------------------------------- check_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_check_finite_names_the_tensor_and_counts(bad: float, dtype: torch.dtype) -> None:
    x = torch.randn(5, 7, generator=rng(0)).to(dtype)
    check_finite("fine", x)
    x[2, 3] = x[4, 6] = bad
    with pytest.raises(NumericsError, match=r"layers\.3\.up_proj: 2 of 35 values"):
        check_finite("layers.3.up_proj", x)


def test_check_finite_takes_the_largest_values_and_nothing() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check_finite("x", torch.full((100, 100), torch.finfo(dtype).max, dtype=dtype))
    check_finite("x", torch.empty(0, 4))
    both = torch.tensor([float("inf"), float("-inf")])  # they must not cancel
    with pytest.raises(NumericsError):
        check_finite("x", both)
