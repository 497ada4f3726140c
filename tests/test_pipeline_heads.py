"""Output head and embedding at 8 bits, alone and together, in models that tie them and in models that do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_oracle import WIDE, logits, module_name, read, twin, weights

from bitwright.errors import RecipeError
from bitwright.nn.load import load
from bitwright.pipeline import Result, quantize

# Which of the two is quantized, at what.
WHICH = {
    "head": {"lm_head": "w8a16"},
    "embedding": {"embedding": "w8a16-g32"},
    "both": {"lm_head": "w8a16", "embedding": "w8a16"},
    "apart": {"lm_head": "w8a16", "embedding": "w8a16-g32-asym"},
}
NAMES = {
    "llama": "model.embed_tokens",
    "opt": "model.decoder.embed_tokens",
    "gpt_neox": "gpt_neox.embed_in",
    "falcon": "transformer.word_embeddings",
}


def run(source: Path, tmp_path: Path, schemes: dict[str, str], **more: Any) -> Result:
    """Blocks at w4 and the special matrices as told, by a recipe file."""
    rules = [f'[[rule]]\nmatch = "^{name}$"\nscheme = "{scheme}"\n' for name, scheme in schemes.items()]
    rules.append('[[rule]]\nmatch = "."\nscheme = "w4a16-g32"\nalgorithm = "rtn"\n')
    (tmp_path / "recipe.toml").write_text("\n".join(rules))
    return quantize(source, tmp_path / "out", recipe=tmp_path / "recipe.toml", **more)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", NAMES)
def test_head_and_embedding(
    tiny_folder: Callable[..., Path], tmp_path: Path, family: str, tied: bool, which: str
) -> None:
    from transformers import AutoModelForCausalLM

    source = tiny_folder(family, torch.bfloat16, **WIDE[family], tie_word_embeddings=tied)
    result = run(source, tmp_path, WHICH[which])
    found, original = read(result.out), weights(source)
    once = tied and which == "both"
    matrices = {module_name(n): qt for n, qt in found.matrices.items()}
    kept = {module_name(n.removesuffix(".weight")): t for n, t in found.kept.items()}
    original = {module_name(n.removesuffix(".weight")): t for n, t in original.items()}
    embedding, head = NAMES[family], "lm_head"
    # what is stored: the asked ones quantized from the source's own matrix, the other one plain
    for name, key in ((embedding, "embedding"), (head, "lm_head")):
        W = original.get(name, original[embedding])
        if key not in WHICH[which]:
            assert torch.equal(kept[name], W)
            assert name in {k["name"].removesuffix(".weight") for k in result.record["kept"]}
        elif not (once and name == head):
            assert (matrices[name].dequantize() - W.float()).norm() < 0.01 * W.float().norm()
            layer = result.record["layers"][name]
            assert (layer["scheme"], layer["algorithm"]) == (WHICH[which][key], "rtn")
    # two different matrices must not be tied by the config
    assert found.config["tie_word_embeddings"] is once
    assert len(result.record["layers"]) == result.record["quantized_layers"] == len(found.matrices)
    # whoever loads it computes the model of the dequantized matrices
    expected = logits(twin(source, found, tmp_path / "twin"))
    torch.testing.assert_close(logits(load(result.out, torch.bfloat16, packed=False)), expected, rtol=0, atol=0)
    wide = logits(load(result.out, torch.float32, packed=False))
    torch.testing.assert_close(logits(load(result.out, torch.float32)), wide, rtol=1e-4, atol=1e-4)
    note = result.record["portability"][1]
    if which == "head":
        assert note.startswith("transformers")
        if "loads it as it is" in note:
            torch.testing.assert_close(
                logits(AutoModelForCausalLM.from_pretrained(result.out)), expected, rtol=0, atol=0
            )
    else:
        assert result.record["format"] == "native"


def test_a_tied_pair_at_one_scheme_is_stored_once(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_folder("llama", torch.bfloat16, **WIDE["llama"], tie_word_embeddings=True)
    result = run(source, tmp_path, WHICH["both"])
    assert json.loads((result.out / "config.json").read_text())["tie_word_embeddings"] is True
    assert not [n for n in weights(result.out) if n.startswith("lm_head.")]
    assert "lm_head" not in result.record["layers"]
    reason = next(k["reason"] for k in result.record["kept"] if k["name"] == "lm_head")
    assert "embed_tokens" in reason


def test_only_eight_bits_by_rounding(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_folder("llama", torch.bfloat16, **WIDE["llama"])
    with pytest.raises(RecipeError, match=r"lm_head.*8-bit"):
        run(source, tmp_path, {"lm_head": "w4a16-g32"})
    assert not (tmp_path / "out.partial").exists()


def test_a_stored_head_that_differs_from_its_embedding_unties_the_config(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """config.json says tied, the checkpoint has two different matrices: transformers unties them, and so must a folder
    in which one of the two is quantized."""
    import shutil

    source = shutil.copytree(
        tiny_folder("llama", torch.bfloat16, **WIDE["llama"], tie_word_embeddings=False), tmp_path / "model"
    )
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    result = run(source, tmp_path, WHICH["head"])
    assert json.loads((result.out / "config.json").read_text())["tie_word_embeddings"] is False
    found = read(result.out)
    expected = logits(twin(source, found, tmp_path / "twin"))
    torch.testing.assert_close(logits(load(result.out, torch.bfloat16, packed=False)), expected, rtol=0, atol=0)


def test_projections_around_the_blocks_stay_what_they_are(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """OPT with narrow embeddings has linears outside its blocks; readers that look for "Linear" must let them be."""
    from transformers import AutoModelForCausalLM

    source = tiny_folder("opt", torch.bfloat16, **WIDE["opt"] | {"word_embed_proj_dim": 32})
    result = run(source, tmp_path, {})
    assert result.record["format"] == "compressed-tensors"
    found = read(result.out)
    expected = logits(twin(source, found, tmp_path / "twin"))
    theirs = AutoModelForCausalLM.from_pretrained(result.out)
    original = weights(source)
    for leaf in ("project_in", "project_out"):
        weight = theirs.model.decoder.get_submodule(leaf).weight
        assert torch.equal(weight, next(t for n, t in original.items() if n.endswith(f"{leaf}.weight")))
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=0)
    torch.testing.assert_close(logits(load(result.out, torch.bfloat16, packed=False)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("stored", ["both", "head"])
@pytest.mark.parametrize("which", WHICH)
def test_a_tied_head_that_is_stored(tiny_folder: Callable[..., Path], tmp_path: Path, which: str, stored: str) -> None:
    """Some checkpoints hold the tied matrix twice, or under the head's name alone."""
    import shutil

    from safetensors.torch import save_file

    tied = tiny_folder("llama", torch.bfloat16, **WIDE["llama"], tie_word_embeddings=True)
    source = shutil.copytree(tied, tmp_path / "model")
    tensors = weights(source)
    matrix = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = matrix.clone()
    if stored == "head":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    result = run(source, tmp_path, WHICH[which])
    found = read(result.out)
    quantized = {n for n in ("lm_head", "model.embed_tokens") if n in found.matrices}
    plain = {n for n in ("lm_head", "model.embed_tokens") if f"{n}.weight" in found.kept}
    assert (quantized, plain) == {
        "head": ({"lm_head"}, {"model.embed_tokens"}),
        "embedding": ({"model.embed_tokens"}, {"lm_head"}),
        "both": ({"model.embed_tokens"}, set()),
        "apart": ({"lm_head", "model.embed_tokens"}, set()),
    }[which]
    assert all(torch.equal(found.kept[f"{n}.weight"], matrix) for n in plain)
    for n in quantized:
        assert (found.matrices[n].dequantize() - matrix.float()).norm() < 0.01 * matrix.float().norm()
    expected = logits(twin(source, found, tmp_path / "twin"))
    torch.testing.assert_close(logits(load(result.out, torch.bfloat16, packed=False)), expected, rtol=0, atol=0)
