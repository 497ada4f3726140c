"""QUIK and SparseGPT against a column-by-column float64 twin, and against what they promise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from algorithm_oracles import SAFE, bf16_margin, correlated, damped64, hessian, minmax_grid, objective, rng, to_bf16
from torch import Tensor

from bitwright.algorithms.gptq import gptq
from bitwright.algorithms.quik import (
    InputProfile,
    QUIKOptions,
    SplitResult,
    check_columns,
    choose_clip,
    choose_split,
    plain_split,
    quik,
    round_to_nearest,
)
from bitwright.algorithms.sparsegpt import kept_of_four
from bitwright.errors import SchemeError
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import Scheme
from bitwright.split import InputSplit

N = 24


def problem(K: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """W [N, K], H [K, K] of inputs with a few large columns, already arranged: those are last."""
    W = torch.randn(N, K, generator=rng(seed)) * torch.exp(torch.randn(N, 1, generator=rng(seed + 1)))
    X = correlated(400, K, seed + 2)
    X[:, -4:] *= 8
    return W, hessian(X)


def solve(W: Tensor, H: Tensor, text: str, O: int = 0, **options: object) -> SplitResult:
    scheme = Scheme.parse(text)
    split = InputSplit(torch.arange(W.shape[1] - O), torch.arange(W.shape[1] - O, W.shape[1]), scheme.activation_bits)
    return quik(W, H, scheme, split, QUIKOptions.parse({"search": "minmax", "weighting": "none"} | options))


def oracle(W: Tensor, H: Tensor, scheme: Scheme, O: int, by_energy: bool) -> tuple[np.ndarray, np.ndarray]:
    """Values [N, K] and margins [N]: one column after the other with the explicit inverse in float64; base columns on a
    min/max grid per row, pruned 2:4 in fours if sparse, outlier columns rounded to bfloat16."""
    w, Hd = W.double().numpy().copy(), damped64(H, 0.01, 0.05)
    rows, K = w.shape
    B = K - O
    diagonal = np.diag(H.double().numpy()).astype(np.float32)
    order = sorted(range(B), key=lambda j: -diagonal[j]) if by_energy else list(range(B))
    order += range(B, K)

    def eliminated(inverse: np.ndarray, j: int) -> np.ndarray:
        left = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        left[j, :] = left[:, j] = 0
        return left

    inverse = np.linalg.inv(Hd)
    pivots, left = {}, inverse
    for j in order:
        pivots[j] = left[j, j]
        left = eliminated(left, j)
    margin = np.full(rows, np.inf)
    if scheme.weight.bits < 16:
        scale, _, margin = minmax_grid(w[:, :B], scheme.weight)
    kept = np.ones((rows, K), dtype=bool)
    values = np.zeros((rows, K))
    for i, j in enumerate(order):
        if scheme.sparse and j < B and i % 4 == 0:
            four = order[i : i + 4]
            cost = w[:, four] ** 2 / np.array([pivots[k] for k in four])
            ranked = np.sort(cost, axis=1)
            gap = np.sqrt(ranked[:, 2]) / np.maximum(np.sqrt(ranked[:, 1]), 1e-30) - 1
            margin = np.minimum(margin, gap)
            kept[:, four] = cost >= ranked[:, 2:3]
        if j < B and scheme.weight.bits < 16:
            level = w[:, j] / scale
            inside = (level > scheme.weight.qmin - 0.5) & (level < scheme.weight.qmax + 0.5)
            tie = np.where(inside, np.abs(level - np.floor(level) - 0.5), np.abs(np.abs(level) - 7.5))
            margin = np.minimum(margin, np.where(kept[:, j], tie, np.inf))
            values[:, j] = np.clip(np.round(level), scheme.weight.qmin, scheme.weight.qmax) * scale
        else:
            margin = np.minimum(margin, np.where(kept[:, j], 100 * bf16_margin(w[:, j]), np.inf))
            values[:, j] = to_bf16(w[:, j])
        values[:, j] *= kept[:, j]
        error = (w[:, j] - values[:, j]) / inverse[j, j]
        w -= np.outer(error, inverse[j])
        inverse = eliminated(inverse, j)
    return values, margin


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("block_size", [16, 30, 128])
@pytest.mark.parametrize(
    ("text", "K", "O"),
    [("w4a4-o16", 64, 16), ("w4a8", 40, 0), ("w4a4-o6-24", 70, 6), ("w4a16-24", 48, 0), ("w16a16-24", 64, 0)],
)
def test_equals_the_oracle(text: str, K: int, O: int, block_size: int, act_order: bool) -> None:
    W, H = problem(K)
    scheme = Scheme.parse(text)
    want, margin = oracle(W, H, scheme, O, by_energy=act_order and not scheme.sparse)
    got = solve(W, H, text, O, block_size=block_size, act_order=act_order)
    safe = margin > SAFE
    assert safe.mean() > 0.4, safe.mean()
    np.testing.assert_array_equal(got.tensor.arranged(torch.float64).numpy()[safe], want[safe])


def test_without_outliers_it_is_gptq() -> None:
    W, H = problem(64)
    ours = quik(W, H, Scheme.parse("w4a4"), plain_split(64, Scheme.parse("w4a4"), W.device), QUIKOptions())
    theirs = gptq(W, H, Scheme.parse("w4a16").weight)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-3, atol=0)
    assert (ours.tensor.base.codes == theirs.tensor.codes).float().mean() > 0.999


def test_outlier_columns_take_the_error_of_all_others() -> None:
    """Given the base columns, no other values of the outlier columns have a smaller damped loss."""
    W, H = problem(64)
    tensor = solve(W, H, "w4a4-o16", 16).tensor
    D = torch.from_numpy(damped64(H, 0.01, 0.05))
    base_error = tensor.arranged(torch.float64)[:, :48] - W.double()[:, :48]
    best = W.double()[:, 48:] - torch.linalg.solve(D[48:, 48:], D[48:, :48] @ base_error.T).T
    torch.testing.assert_close(tensor.outliers.double(), best, rtol=0.02, atol=0.02)
    fixed = tensor.arranged(torch.float64)
    fixed[:, 48:] = W[:, 48:]
    assert objective(tensor.arranged(), W, H).sum() < 0.9 * objective(fixed, W, H).sum()


def test_losses_order_as_they_must() -> None:
    """More outliers, no pruning and feedback each lower the loss; the record is the loss of what is stored."""
    W, H = problem(96)
    loss = {text: solve(W, H, text, O) for text, O in (("w4a4", 0), ("w4a4-o8", 8), ("w4a4-o32", 32), ("w4a4-24", 0))}
    total = {text: float(r.loss.sum()) for text, r in loss.items()}
    assert total["w4a4-o32"] < total["w4a4-o8"] < total["w4a4"] < total["w4a4-24"]
    plain = plain_split(96, Scheme.parse("w4a4-24"), W.device)
    nearest = round_to_nearest(W, Scheme.parse("w4a4-24"), plain, "minmax")
    assert total["w4a4-24"] < 0.6 * objective(nearest.arranged(), W, H).sum()
    for r in loss.values():
        np.testing.assert_allclose(r.loss.numpy(), objective(r.tensor.arranged(), W, H), rtol=1e-3)


def test_joint_pruning_beats_one_after_the_other() -> None:
    """Rounding in the sweep that prunes, against rounding what was pruned, with the same mask."""
    W, H = problem(96)
    joint = solve(W, H, "w3a16-24")
    pruned = solve(W, H, "w16a16-24").tensor.arranged()
    after = round_to_nearest(pruned, Scheme.parse("w3a16-24"), joint.tensor.split, "minmax")
    assert (objective(after.arranged(), W, H) / joint.loss.numpy()).mean() > 1.1


def test_two_of_four_stay() -> None:
    for text, O in (("w4a4-o8-24", 8), ("w16a16-24", 0)):
        tensor = solve(*problem(72), text, O).tensor
        base = tensor.base.codes if isinstance(tensor.base, QuantizedTensor) else tensor.base
        assert int((base.view(N, -1, 4) != 0).sum(-1).max()) == 2
        assert (tensor.outliers != 0).all()


def test_kept_of_four_by_hand() -> None:
    w = torch.tensor([[3.0, 0.0], [2.0, 0.0], [-4.0, 0.0], [1.0, 0.0]])
    assert kept_of_four(w, torch.ones(4)).T.tolist() == [[True, False, True, False], [True, True, False, False]]
    # w²/U² with a large U for the third column
    assert kept_of_four(w, torch.tensor([1.0, 1.0, 10.0, 1.0])).T[0].tolist() == [True, True, False, False]


def test_dead_columns_and_the_target() -> None:
    W, H = problem(64)
    H[5, :] = H[:, 5] = 0
    scheme = Scheme.parse("w4a4-o16")
    split = InputSplit(torch.arange(48), torch.arange(48, 64), 4)
    result = quik(W, H, scheme, split, dead=torch.arange(64) == 5)
    assert result.dead_columns == 1 and (result.tensor.arranged()[:, 5] == 0).all()
    W, H = problem(64)
    D = torch.randn(N, 64, generator=rng(9)) * H.diagonal().mean() * 0.05
    moved = quik(W, H, scheme, split, QUIKOptions(target_strength=1.0), correction=D)
    Q = moved.tensor.arranged(torch.float64)

    # E||W x + d - Q x||² = (W - Q) H (W - Q)ᵀ + 2 (W - Q) Dᵀ + const
    def error(Q: Tensor) -> float:
        E = W.double() - Q
        return float(((E @ H.double()) * E).sum() + 2 * (E * D.double()).sum())

    assert error(Q) < error(quik(W, H, scheme, split).tensor.arranged(torch.float64))


@pytest.mark.parametrize("text", ["w4a4", "w4a4-24"])
def test_a_column_too_small_for_the_grid_of_its_tokens_is_rounded(text: str) -> None:
    """Its code is 0 at every token, so H has nothing of it; its weights are kept, unlike those of a dead column. Under
    2:4 it is pruned before its neighbours."""
    X = correlated(400, 64, 3)
    X[:, 7] = 1e-3 * torch.randn(400, generator=rng(4))
    X[:, 9] = 0
    W, scheme = problem(64)[0], Scheme.parse(text)
    split = plain_split(64, scheme, W.device)
    H = hessian(split.seen(X))
    assert H[7, 7] == 0
    result = quik(W, H, scheme, split, dead=split.arrange_mask((X == 0).all(0)))
    Q = result.tensor.arranged()
    assert result.dead_columns == 1 and (Q[:, 9] == 0).all()
    if scheme.sparse:
        assert (Q[:, 7] == 0).float().mean() > 0.9
    else:
        scale = result.tensor.scale[:, 0].float()
        inside = (W[:, 7] / scale > -8) & (W[:, 7] / scale < 7)
        assert inside.float().mean() > 0.9
        torch.testing.assert_close(Q[inside, 7] / scale[inside], (W[:, 7] / scale).round()[inside])


def test_a_hessian_without_a_factor_falls_back() -> None:
    W, H = problem(64)
    H[0, 0] = float("inf")
    result = solve(W, H, "w4a4-o16", 16)
    assert result.fallback is not None and torch.isfinite(result.tensor.arranged()).all()
    assert torch.equal(result.tensor.outliers, W[:, 48:].bfloat16())


# --------------------------------------------------------------------------------------------------- choice of columns


def profile(largest: list[float], energy: list[float] | None = None) -> InputProfile:
    x = torch.tensor(largest)
    return InputProfile(x, torch.tensor(energy) if energy else x.square(), x[None])


def chosen(p: InputProfile, text: str, **options: object) -> InputSplit:
    return choose_split(p, Scheme.parse(text), QUIKOptions.parse(options), "blk.q_proj")


def test_the_largest_columns_are_outliers_and_ties_go_to_the_first() -> None:
    p = profile([1.0, 7.0, 3.0, 9.0, 3.0, 3.0])
    split = chosen(p, "w4a4-o3")
    assert split.outlier_idx.tolist() == [1, 2, 3] and split.base_idx.tolist() == [0, 4, 5]
    assert (split.bits, split.block) == (4, 0)
    by_energy = chosen(profile([1.0, 7.0, 3.0, 9.0], [5.0, 1.0, 4.0, 2.0]), "w4a4-o2", measure="energy")
    assert by_energy.outlier_idx.tolist() == [0, 2]


def test_under_the_threshold_there_are_none() -> None:
    p = profile([1.0, 7.0, 3.0, 9.0])
    assert chosen(p, "w4a4-o2", threshold=9.0).outlier_idx.tolist() == []
    assert chosen(p, "w4a4-o2", threshold=8.9).outlier_idx.tolist() == [1, 3]


def test_columns_that_are_pruned_are_stored_in_the_order_of_the_sweep() -> None:
    p = profile([1.0, 7.0, 3.0, 9.0, 2.0, 4.0, 6.0, 5.0])
    assert chosen(p, "w4a4-o4-24").base_idx.tolist() == [5, 2, 4, 0]
    assert chosen(p, "w4a4-o4-24", act_order=False).base_idx.tolist() == [0, 2, 4, 5]
    assert chosen(p, "w4a4-o4").base_idx.tolist() == [0, 2, 4, 5]


def test_rotation_takes_the_largest_block() -> None:
    assert chosen(profile([float(i) for i in range(56)]), "w4a4-o8-rot").block == 16


@pytest.mark.parametrize(
    ("text", "K", "message"),
    [
        ("w4a4-o64", 64, r"blk\.q_proj: 64 outlier columns.*leave no other in an input of 64"),
        ("w4a4-o5%", 16, r"blk\.q_proj: 16 outlier columns.*smaller number.*at least 16 columns.*keep the layer"),
        ("w4a4-o6-24", 64, r"blk\.q_proj: 2:4 needs base columns in groups of 4.*64 with 6"),
        ("w4a4-24", 62, r"blk\.q_proj: 2:4 needs"),
    ],
)
def test_schemes_that_do_not_fit_a_width_name_the_layer(text: str, K: int, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        check_columns(K, Scheme.parse(text), "blk.q_proj")


def test_clip_is_the_best_of_those_tried() -> None:
    """A Gaussian input wants a narrower grid, a uniform one all of its range; 8 bits are not clipped."""
    g = rng(0)
    W = torch.randn(32, 512, generator=g)
    heavy = torch.randn(100, 512, generator=g)
    flat = torch.rand(100, 512, generator=g) - 0.5
    split = plain_split(512, Scheme.parse("w4a4"), W.device)
    profiles = [InputProfile(x.abs().amax(0), x.square().mean(0), x) for x in (heavy, flat)]
    clips = [choose_clip(split, p, W) for p in profiles]
    assert clips[0] < 0.9 and clips[1] == 1.0

    def error(clip: float) -> float:
        exact = heavy @ W.T
        seen = replace(split, clip=clip).seen(heavy) @ W.T
        return float(((seen - exact).square().sum(1) / exact.square().sum(1)).mean())

    assert error(clips[0]) < min(error(1.0), error(clips[0] + 0.15), error(clips[0] - 0.15))
    assert choose_clip(replace(split, bits=8), profiles[0], W) == 1.0


@pytest.mark.parametrize("options", [{"rounds": 1}, {"static_groups": False, "act_order": False}, {"outliers": 4}])
def test_options_that_mean_nothing_here(options: dict[str, object]) -> None:
    with pytest.raises(SchemeError, match=r"quik|rounds|static_groups"):
        QUIKOptions.parse(options)
