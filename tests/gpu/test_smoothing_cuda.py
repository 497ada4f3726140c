"""Smoothing on a GPU, where blocks are verified in 16 bits: the same links as on a CPU, the same function after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES
from pipeline_oracle import TEXT
from test_smoothing import EXPECTED, SMALL, logits, makers_of, skewed_folder

from bitwright.nn.load import load
from bitwright.pipeline import quantize

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_links_hold_in_sixteen_bits(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    source = skewed_folder(tmp_path / "source", family, dtype)
    (tmp_path / "text.txt").write_text(TEXT)
    text = str(tmp_path / "text.txt")
    call: dict[str, Any] = {"scheme": "w8a8", "calibration": text, "options": {"smooth": 0.5}, **SMALL}
    found = {}
    for device in ("cpu", "cuda"):
        result = quantize(source, tmp_path / device, device=device, **call)
        found[device] = makers_of(result)
        layers = result.record["layers"].values()
        assert not any("differ" in str(layer["smooth"]) or "changed" in str(layer["smooth"]) for layer in layers)
    assert found["cuda"] == found["cpu"] <= EXPECTED[family]
    exact = logits(load(source, torch.float32))
    limit = (0.5 if "mixtral" in family or "moe" in family else 0.3) * exact.norm()
    assert (logits(load(tmp_path / "cuda", torch.float32)) - exact).norm() < limit
