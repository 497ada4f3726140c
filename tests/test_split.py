"""Split inputs and weights: what they promise, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from split_cases import random_split_tensor

from bitwright.errors import FormatError
from bitwright.kernels.reference import split_linear
from bitwright.scheme import Scheme
from bitwright.split import InputSplit, SplitTensor

SCHEMES = ["w4a4", "w4a4-o16", "w4a8-o16", "w8a8-o32-24", "w4a4-o16-rot", "w4a16-g32-o16", "w4a16-24", "w16a16-24"]


@pytest.mark.parametrize("text", SCHEMES)
def test_arranged_and_original_forms_agree(text: str) -> None:
    """W x = W_z z, both ways round, in float32 up to rounding."""
    tensor = random_split_tensor(24, 96, text)
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(1))
    split = tensor.split
    torch.testing.assert_close(split.arrange(x) @ tensor.arranged().T, x @ tensor.dequantize().T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(split.arrange_weight(tensor.dequantize()), tensor.arranged(), rtol=1e-5, atol=1e-6)
    assert tensor.shape == (24, 96)
    outliers = tensor.dequantize()[:, split.outlier_idx]
    assert torch.equal(outliers, tensor.outliers.float())


@pytest.mark.parametrize("text", ["w4a4-o16", "w8a8-o32-24", "w4a4-o16-rot"])
def test_what_calibration_sees_is_what_the_reference_computes(text: str) -> None:
    """seen(x) times the arranged weight, in float64, is the integer product up to float32 rounding."""
    tensor = random_split_tensor(24, 96, text, clip=0.8 if text.startswith("w4a4") else 1.0)
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(2)) * 3
    y = tensor.split.seen(x).double() @ tensor.arranged(torch.float64).T
    torch.testing.assert_close(split_linear(x, tensor).double(), y, rtol=1e-5, atol=1e-5)
    exact = tensor.split.arrange(x)
    assert torch.equal(tensor.split.seen(x)[:, -16:], exact[:, -16:])  # outliers are left alone
    assert not torch.equal(tensor.split.seen(x), exact)


def test_indices_must_name_every_column_once() -> None:
    columns = torch.arange(8)
    with pytest.raises(FormatError, match="each of the 8 input columns once"):
        InputSplit(columns[:6], columns[5:7], 4)
    with pytest.raises(FormatError, match="blocks of 4 does not fit 6"):
        InputSplit(columns[:6], columns[6:], 4, block=4)


def test_parts_that_do_not_belong_together() -> None:
    tensor = random_split_tensor(8, 48, "w4a4-o16")
    with pytest.raises(FormatError, match="do not belong together"):
        SplitTensor(tensor.base, tensor.outliers[:, :8], tensor.split, tensor.scheme)
    with pytest.raises(FormatError, match="do not belong together"):
        replace(tensor, scheme=Scheme.parse("w4a4-o24"))
    with pytest.raises(FormatError, match="not on the grid"):
        replace(tensor, scheme=Scheme.parse("w8a8-o16"))
    with pytest.raises(FormatError, match="not split as"):
        replace(tensor, scheme=Scheme.parse("w4a8-o16"))
    with pytest.raises(FormatError, match="multiple of 4"):
        replace(random_split_tensor(8, 46, "w4a4"), scheme=Scheme.parse("w4a4-24"))


def test_an_input_without_outliers_is_no_contradiction() -> None:
    """Under the threshold an input takes none, whatever its scheme allows; bits count what is there."""
    tensor = random_split_tensor(8, 48, "w4a4")
    none = replace(tensor, scheme=Scheme.parse("w4a4-o16"))
    assert none.bits_per_weight == tensor.bits_per_weight == 4 + 16 / 48


def test_a_base_with_an_order_of_its_own_is_refused() -> None:
    tensor = random_split_tensor(8, 48, "w4a4")
    with pytest.raises(FormatError, match="order of its own"):
        replace(tensor, base=replace(tensor.base, order=torch.randperm(48)))


def test_a_mask_of_columns_goes_with_them() -> None:
    split = InputSplit(torch.tensor([3, 0, 1, 5]), torch.tensor([2, 4]), 4)
    mask = torch.tensor([True, False, True, True, False, False])
    assert split.arrange_mask(mask).tolist() == [True, True, False, False, True, False]
    rotated = InputSplit(torch.tensor([3, 0, 1, 5]), torch.tensor([2, 4]), 4, block=2)
    assert rotated.arrange_mask(mask).tolist() == [True, True, False, False, True, False]
    assert replace(rotated, block=4).arrange_mask(mask).tolist() == [False, False, False, False, True, False]
