"""Round to nearest: every weight to the closest point of its group's grid. Data-free."""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.numerics import Search, choose_grid, encode, quantized
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import WeightScheme


def rtn(
    W: Tensor, scheme: WeightScheme, *, search: Search = "mse", scale_dtype: torch.dtype = torch.bfloat16
) -> QuantizedTensor:
    """W [N, K] rounded to the nearest point of a min/max or MSE-searched grid."""
    grid = choose_grid(W, scheme, search, scale_dtype=scale_dtype)
    return quantized(encode(W, grid), grid, scale_dtype)
