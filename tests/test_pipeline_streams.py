"""The activations that calibration works with are those of the models it says: the quantized stream is what the
finished folder computes, the reference stream what the source computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES
from pipeline_oracle import TEXT, WIDE, read, twin, weights

from bitwright import blockwise, pipeline
from bitwright.calibrate.data import calibration_samples, read_text
from bitwright.calibrate.stream import Streams
from bitwright.models.load import open_model
from bitwright.run_folder import RunFolder

NUM_SAMPLES, SEQ_LEN = 40, 64  # more than one micro-batch

RECIPE = r"""
    [[rule]]
    match = '(k_proj|up_proj|fc1|w3|dense_h_to_4h)$'
    keep = true
    [[rule]]
    match = '(v_proj|\.dense|w1)$'
    scheme = "w8a16"
    algorithm = "rtn"
    [[rule]]
    match = "."
    scheme = "w3a16-g32"
"""


@torch.no_grad()
def block_outputs(model: Any, blocks: list[str], ids: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states behind each block, by ordinary forward hooks on an ordinary model."""
    seen: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, out: seen.__setitem__(name, out[0] if isinstance(out, tuple) else out)

    for name in blocks:
        model.get_submodule(name).register_forward_hook(hook(name))
    model(ids)
    return [seen[name] for name in blocks]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", [False, True])
def test_streams_are_those_of_the_two_models(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, recipe: bool
) -> None:
    """From a float32 source, so that what stays unquantized is rounded in one stream and not in the other."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = tiny_folder(family, torch.float32, **WIDE[family])
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    kept: list[Streams] = []
    real = RunFolder.save_streams

    def keep(self: RunFolder, next_block: int, streams: Streams) -> None:
        kept.append(Streams([*streams.quantized], [*(streams.reference or [])]))
        real(self, next_block, streams)

    monkeypatch.setattr(RunFolder, "save_streams", keep)
    what: dict[str, Any] = {"recipe": tmp_path / "recipe.toml"} if recipe else {"scheme": "w4a16-g32"}
    text = str(tmp_path / "text.txt")
    out = pipeline.quantize(
        source, tmp_path / "out", calibration=text, num_samples=NUM_SAMPLES, seq_len=SEQ_LEN, seed=3, **what
    ).out
    ids = calibration_samples(AutoTokenizer.from_pretrained(source), read_text(text), NUM_SAMPLES, SEQ_LEN, 3)
    blocks = [b.name for b in open_model(source).structure.blocks]
    quantized = twin(source, read(out), tmp_path / "twin", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(source)
    assert len(kept) == len(blocks) and len(kept[0].quantized) > 1
    for i, (ours, theirs) in enumerate(
        zip(block_outputs(quantized, blocks, ids), block_outputs(plain, blocks, ids), strict=True)
    ):
        torch.testing.assert_close(torch.cat(kept[i].reference or []), theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.cat(kept[i].quantized), ours, rtol=1e-4, atol=1e-4)
        assert (ours - theirs).norm() > 1e-3 * theirs.norm()  # the two are not the same


def test_the_embeddings_of_the_quantized_stream_are_the_stored_ones(tiny_folder: Callable[..., Path]) -> None:
    """The test above would see it, if rounding the embeddings moved anything beyond its tolerance: it does."""
    W = weights(tiny_folder("llama", torch.float32, **WIDE["llama"]))["model.embed_tokens.weight"]
    assert (W.bfloat16().float() - W).abs().max() > 3e-4


def test_not_sequential(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """true_sequential=False: in the first block every linear's H comes from the block as it was, so its q/k/v equal
    those of a sequential run and its later linears do not."""
    source = tiny_folder("llama", torch.bfloat16)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    layers = {}
    for sequential in (True, False):
        options = {"true_sequential": sequential, "target_strength": 0.0}
        request = {"scheme": "w4a16-g32", "calibration": str(text), "num_samples": 4, "seq_len": 32}
        result = pipeline.quantize(source, tmp_path / f"{sequential}", options=options, **request)
        layers[sequential] = result.record["layers"]
    first = [name for name in layers[True] if ".layers.0." in name]
    same = {name.rpartition(".")[2]: layers[True][name] == layers[False][name] for name in first}
    assert same["q_proj"] and same["k_proj"] and same["v_proj"]
    assert not same["o_proj"] and not same["down_proj"]


def test_the_memory_plan_sees_the_widths(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What decides between one pass and several counts each group's own input, the widest being down_proj's."""
    seen: dict[str, float] = {}
    fits = blockwise.fits_one_pass

    def spy(groups: Any, *rest: Any) -> bool:
        seen.update({group.names[0]: group.values for group in groups})
        return fits(groups, *rest)

    monkeypatch.setattr(blockwise, "fits_one_pass", spy)
    source = tiny_folder("llama", torch.bfloat16)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    pipeline.quantize(source, tmp_path / "out", scheme="w4a16-g32", calibration=str(text), num_samples=4, seq_len=32)
    config = open_model(source).config
    assert seen["self_attn.q_proj"] == config.hidden_size
    assert seen["mlp.down_proj"] == config.intermediate_size
