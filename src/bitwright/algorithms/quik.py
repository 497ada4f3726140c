"""QUIK: 4-bit weights and activations around a few 16-bit outlier columns (arXiv 2310.09259), with or without 2:4.

The input's columns with the largest calibrated max|x| stay at 16 bits and go last, so that the sweep pushes what the
rounding of all others costs into columns that can take it exactly. Scales are chosen over the base columns alone, by
the same weighted search as gptq's. Everything here happens in *arranged* form (see `bitwright.split`): W_z [N, K] with
its O outliers last, and H and D of inputs as the integer product sees them, so that the sweep makes good what the
rounding of activations does too.

Beside the paper: H of quantized inputs and a target that aims at the output for exact ones; clipped activation
grids; an optional rotation of the base columns. What each brings is in `dev/LOG.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bitwright.activations import rotation_block
from bitwright.algorithms.descent import proxy_loss
from bitwright.algorithms.gptq import GPTQOptions, column_weight, times_inverse
from bitwright.algorithms.hessian import DAMP_CEILING, factorize
from bitwright.algorithms.sparsegpt import GROUP, kept_of_four, pruning
from bitwright.algorithms.sweep import Project, column_sweep
from bitwright.errors import SchemeError
from bitwright.numerics import Grid, Search, choose_grid, encode, quantized
from bitwright.qtensor import spread
from bitwright.scheme import BEHIND_ACTIVATION, OUTLIER_STEP, UNQUANTIZED_BITS, Scheme
from bitwright.split import InputSplit, SplitTensor

Measure = Literal["max", "energy"]
SAME = "same"
# Shares of a token's range that are tried for 4-bit activation grids.
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


@dataclass(frozen=True)
class QUIKOptions(GPTQOptions):
    """Options of gptq, and: threshold: an input whose calibrated max|x| is not above it takes no outliers. measure:
    what makes a column an outlier, its largest |x| or its mean square. proportional: a count of outliers is meant for
    the model's hidden size and grows with wider inputs. after_activation: scheme of linears that read the output of the
    activation function (w8a8 there takes the outliers, rotation and 2:4 of the others), "same" = as all others. clip:
    search the range of 4-bit activation grids."""

    threshold: float = 0.0
    measure: Measure = "max"
    proportional: bool = True
    after_activation: str = BEHIND_ACTIVATION
    clip: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds:
            raise SchemeError("rounds (the polish) is not available with quik and sparsegpt; leave it out")
        if not self.static_groups:
            raise SchemeError("static_groups=false is not available with quik and sparsegpt; leave it out")


@dataclass(frozen=True)
class SparseGPTOptions(QUIKOptions):
    """The same for 2:4 (sparsegpt.py): the linears behind the activation function are treated as all others."""

    after_activation: str = SAME


@dataclass(frozen=True)
class InputProfile:
    """What calibration saw of one input: largest |x| and mean square per column, fp32 [K], and some of its tokens
    x [n, K] to choose a clip by."""

    largest: Tensor
    energy: Tensor
    sample: Tensor


@dataclass(frozen=True)
class SplitResult:
    """tensor; loss [N]: tr((T - Q) H (T - Q)^T) per row on the undamped H; energy [N]: the same of T alone;
    damp_percent used; dead_columns; fallback: None or the reason for rounding to nearest."""

    tensor: SplitTensor
    loss: Tensor
    energy: Tensor
    damp_percent: float
    dead_columns: int = 0
    fallback: str | None = None


def choose_split(profile: InputProfile, scheme: Scheme, options: QUIKOptions, layer: str) -> InputSplit:
    """Base and outlier columns of an input for a scheme whose outliers are a count; clip is left at 1.

    Ties go to the lower column. Base columns are stored in their original order, for 2:4 with act_order by falling
    energy (the order of the sweep). SchemeError names `layer` if no base column would remain.
    """
    K = len(profile.largest)
    count = 0 if scheme.outliers is None else scheme.outliers.columns(K)
    check_columns(K, scheme, layer)
    if float(profile.largest.amax()) <= options.threshold:
        count = 0
    key = profile.largest if options.measure == "max" else profile.energy
    outliers = torch.argsort(key, descending=True, stable=True)[:count].sort().values
    base = torch.ones(K, dtype=torch.bool, device=key.device)
    base[outliers] = False
    columns = base.nonzero()[:, 0]
    if scheme.sparse and options.act_order:
        columns = columns[torch.argsort(profile.energy[columns], descending=True, stable=True)]
    return _split(columns, outliers, scheme)


def plain_split(K: int, scheme: Scheme, device: torch.device) -> InputSplit:
    """No outliers, original order: where nothing is known of the input."""
    return _split(torch.arange(K, device=device), torch.arange(0, device=device), scheme)


def check_columns(K: int, scheme: Scheme, layer: str) -> None:
    """SchemeError unless a width-K input leaves base columns, a multiple of four for 2:4 (with outliers and without,
    as an input under the threshold takes none)."""
    count = 0 if scheme.outliers is None else scheme.outliers.columns(K)
    if count >= K:
        raise SchemeError(
            f"{layer}: {count} outlier columns ({scheme}) leave no other in an input of {K}; ask for a smaller number "
            f"of them (a share is at least {OUTLIER_STEP} columns), or keep the layer"
        )
    if scheme.sparse and (K % GROUP or count % GROUP):
        raise SchemeError(
            f"{layer}: 2:4 needs base columns in groups of {GROUP}, and an input of {K} with {count} outlier columns "
            f"({scheme}) leaves others; choose a count divisible by {GROUP}, or keep the layer"
        )


def choose_clip(split: InputSplit, profile: InputProfile, W: Tensor) -> float:
    """The share of the range that a 4-bit grid should span: the least relative output error over the sample, with the
    weight W [N, K] of all linears that read the input. 1.0 at other widths."""
    if split.bits != 4 or not len(profile.sample):
        return 1.0
    Wz = split.arrange_weight(W)
    exact = split.arrange(profile.sample)
    energy = (exact @ Wz.T).square().sum(1).clamp_min(1e-30)
    best, least = 1.0, float("inf")
    for clip in CLIPS:
        tried = InputSplit(split.base_idx, split.outlier_idx, split.bits, split.block, clip)
        error = float((((tried.seen(profile.sample) - exact) @ Wz.T).square().sum(1) / energy).mean())
        if error < least:
            best, least = clip, error
    return best


def quik(
    Wz: Tensor,
    H: Tensor,
    scheme: Scheme,
    split: InputSplit,
    options: QUIKOptions = QUIKOptions(),
    *,
    correction: Tensor | None = None,
    dead: Tensor | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> SplitResult:
    """Quantize W_z [N, K] (arranged as `split` says) against H [K, K], the mean z^T z of the inputs as seen.

    correction: D [N, K] = mean d z^T for the asymmetric target (see gptq), or None. dead: bool [K], arranged columns
    whose exact inputs were all zero; their weights become 0. H does not say: a column that is small beside the others
    has code 0 at every token, so H_jj = 0, and yet it carries something. It is rounded with the damping as its
    diagonal. None: none is dead. Rounds to nearest, and says so, where no damping up to 1 makes H factorizable.
    """
    Wz = Wz.float()
    B = len(split.base_idx)
    perm = _order(H, B, options.act_order is not False and not scheme.sparse)
    dead = torch.zeros(len(perm), dtype=torch.bool, device=H.device) if dead is None else dead
    factor = factorize(H, perm, options.damp_percent, options.shrinkage, dead)
    if factor is None:
        why = "rtn: the Hessian has no factor with damping up to 1"
        tensor = round_to_nearest(Wz, scheme, split, options.search, scale_dtype)
        return SplitResult(tensor, *_loss(tensor, Wz, H), DAMP_CEILING, fallback=why)
    T = Wz
    if correction is not None and options.target_strength > 0:
        T = T + options.target_strength * times_inverse(correction, factor)
    T = torch.where(factor.dead, torch.zeros_like(T), T)

    grid = None
    if scheme.weight.bits != UNQUANTIZED_BITS:
        weight = column_weight(H, factor, options.weighting)
        grid = choose_grid(T[:, :B], scheme.weight, options.search, None if weight is None else weight[:B], scale_dtype)
    S = None if grid is None else spread(grid.scale, scheme.weight.group_size or B, B)[:, perm[:B]].T.contiguous()
    low, high = float(scheme.weight.qmin), float(scheme.weight.qmax)

    def project(j: int, Wt: Tensor) -> Tensor:
        if j >= B or S is None:
            return Wt[j].to(scale_dtype).float()
        return torch.div(Wt[j], S[j]).round_().clamp_(low, high).mul_(S[j])

    step: Project = project
    starts: Sequence[int] | None = None
    if scheme.sparse:
        step, starts = pruning(project, factor.U, B)
    Q, _ = column_sweep(T[:, perm], factor.U, step, block_size=options.block_size, starts=starts)
    out = torch.empty_like(Q)
    out[:, perm] = Q
    tensor = _tensor(out, grid, scheme, split, scale_dtype)
    return SplitResult(tensor, *_loss(tensor, T, H), factor.damp_percent, int(factor.dead.sum()))


def round_to_nearest(
    Wz: Tensor, scheme: Scheme, split: InputSplit, search: Search = "mse", scale_dtype: torch.dtype = torch.bfloat16
) -> SplitTensor:
    """W_z [N, K] rounded to the nearest; with 2:4 the two smallest of every four are pruned first."""
    B = len(split.base_idx)
    Q = Wz.float().clone()
    if scheme.sparse:
        fours = Q[:, :B].reshape(-1, GROUP).T
        kept = kept_of_four(fours, torch.ones(GROUP, device=Wz.device))
        Q[:, :B] = torch.where(kept, fours, 0.0).T.reshape(-1, B)
    grid = None
    if scheme.weight.bits != UNQUANTIZED_BITS:
        grid = choose_grid(Q[:, :B], scheme.weight, search, scale_dtype=scale_dtype)
    return _tensor(Q, grid, scheme, split, scale_dtype)


def _tensor(Q: Tensor, grid: Grid | None, scheme: Scheme, split: InputSplit, scale_dtype: torch.dtype) -> SplitTensor:
    B = len(split.base_idx)
    outliers = Q[:, B:].to(scale_dtype).contiguous()
    if grid is None:
        return SplitTensor(Q[:, :B].to(scale_dtype).contiguous(), outliers, split, scheme)
    return SplitTensor(quantized(encode(Q[:, :B], grid), grid, scale_dtype), outliers, split, scheme)


def _split(base: Tensor, outliers: Tensor, scheme: Scheme) -> InputSplit:
    block = rotation_block(len(base)) if scheme.rotated else 0
    return InputSplit(base, outliers, scheme.activation_bits, block)


def _order(H: Tensor, B: int, by_energy: bool) -> Tensor:
    """Base columns first, by falling diag(H) or as they are stored, then the outliers."""
    K = H.shape[0]
    order = torch.arange(K, device=H.device)
    if by_energy:
        order[:B] = torch.argsort(H.diagonal()[:B], descending=True, stable=True)
    return order


def _loss(tensor: SplitTensor, T: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    return proxy_loss(tensor.arranged(), T, H), proxy_loss(torch.zeros_like(T), T, H)
