"""`load` against transformers itself, given a plain folder that holds the dequantized weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitwright.errors import CheckpointError, FormatError, NumericsError, StructureError
from bitwright.formats import FORMATS
from bitwright.nn.attention import NAME
from bitwright.nn.embedding import QuantEmbedding
from bitwright.nn.experts import QuantExperts
from bitwright.nn.linear import FlatLinear, QuantLinear
from bitwright.nn.load import explain, load
from bitwright.nn.packed import PackedModule
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import Scheme

transformers = pytest.importorskip("transformers")

FAMILIES = ("llama", "opt", "falcon", "gpt_neox", "mixtral", "qwen2_moe", "qwen3_moe")
W4 = Scheme.parse("w4a16-g8")  # 8 divides every width of the tiny models
PROMPT = torch.arange(2, 26).view(2, 12)


def is_linear(name: str, tensor: Tensor) -> bool:
    """By name on disk: a matrix inside the blocks that is no embedding, norm, router or gate of one output."""
    if tensor.ndim != 2 or name.endswith((".gate.weight", "shared_expert_gate.weight")):
        return False
    return any(part.isdigit() for part in name.split("."))


def quantize(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> QuantizedTensor:
    """Round to nearest; every third scale negative."""
    w = scheme.weight
    K = weight.shape[1]
    group = torch.arange(K) // (w.group_size or K)
    largest = torch.stack([weight[:, group == i].abs().amax(1) for i in range(w.num_groups(K))], dim=1)
    scale = (largest.clamp_min(1e-3) / w.qmax).to(scale_dtype)
    scale[::3] *= -1
    zero = None if w.symmetric else torch.ones_like(scale, dtype=torch.int8)
    codes = (weight / scale.float()[:, group]).round() + (0 if zero is None else 1)
    return QuantizedTensor(codes.clamp(w.qmin, w.qmax).to(torch.int8), scale, zero, w)


def make(
    source: Path,
    out: Path,
    scheme_of: Callable[[str, Tensor], Scheme | None] = lambda n, t: W4 if is_linear(n, t) else None,
    form: str = "compressed-tensors",
    scale_dtype: torch.dtype = torch.bfloat16,
) -> tuple[Path, Path]:
    """(quantized folder, plain float32 folder with the dequantized weights) of `source`."""
    tensors = load_file(source / "model.safetensors")
    stored, plain, schemes, classes = {}, {}, {}, {}
    for name, tensor in tensors.items():
        scheme = scheme_of(name, tensor)
        if scheme is None:
            stored[name] = plain[name] = tensor.to(torch.bfloat16).float()
            continue
        prefix = name.removesuffix(".weight")
        qt = quantize(tensor.float(), scheme, scale_dtype)
        stored |= {f"{prefix}.{key}": value for key, value in FORMATS[form].pack(qt, scheme).items()}
        plain[name] = qt.dequantize()
        schemes[prefix] = scheme
        classes[prefix] = "Embedding" if "embed" in name else "Linear"
    config = json.loads((source / "config.json").read_text())
    ignore = sorted({n.removesuffix(".weight") for n, t in stored.items() if t.ndim == 2} | {"lm_head"} - set(schemes))
    for kind, weights in (("quantized", stored), ("plain", plain)):
        shutil.copytree(source, out / kind)
        save_file(weights, out / kind / "model.safetensors", {"format": "pt"})
        if kind == "quantized":
            config["quantization_config"] = FORMATS[form].write_config(schemes, ignore, classes)
            (out / kind / "config.json").write_text(json.dumps(config))
    return out / "quantized", out / "plain"


def reference(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any, ids: Tensor = PROMPT) -> Tensor:
    return model(ids).logits.float()


@pytest.mark.parametrize("form", ["compressed-tensors", "native"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, form: str, tiny_folder: Any, tmp_path: Path) -> None:
    quantized, plain = make(
        tiny_folder(family), tmp_path, lambda n, t: Scheme.parse("w4a16") if is_linear(n, t) else None, form
    )
    expected = reference(plain)
    unpacked = load(quantized, dtype=torch.float32, packed=False)
    for (name, p), (other, q) in zip(expected.state_dict().items(), unpacked.state_dict().items(), strict=True):
        assert name == other and torch.equal(p, q), name
    for (name, p), (other, q) in zip(expected.named_buffers(), unpacked.named_buffers(), strict=True):
        assert name == other and torch.equal(p, q), name  # rotary frequencies are in no checkpoint
    packed = load(quantized, dtype=torch.float32)
    count = sum(is_linear(n, t) for n, t in load_file(plain / "model.safetensors").items())
    assert sum(isinstance(m, QuantLinear) for m in packed.modules()) == count >= 8
    assert any(isinstance(m, QuantExperts) for m in packed.modules()) == ("moe" in family or family == "mixtral")
    torch.testing.assert_close(logits(packed), logits(expected), rtol=0, atol=2e-5)
    assert not packed.training and not any(p.requires_grad for p in packed.parameters())
    half = load(quantized)
    assert half.dtype == torch.bfloat16
    wanted = logits(expected)
    # A router may send a token elsewhere after rounding, so experts get a looser bound.
    bound = 0.1 if "moe" in family or family == "mixtral" else 0.03
    assert float((logits(half) - wanted).norm() / wanted.norm()) < bound


def test_transformers_reads_the_same(tiny_folder: Any, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    quantized, _ = make(tiny_folder("llama"), tmp_path, lambda n, t: Scheme.parse("w4a16") if is_linear(n, t) else None)
    theirs = reference(quantized)
    torch.testing.assert_close(logits(load(quantized, torch.float32)), logits(theirs), rtol=0, atol=2e-5)


@pytest.mark.parametrize("text", ["w4a16-g32", "w4a16-g32-asym", "w3a16-g16", "w8a16", "w8a16-g32", "w2a16", "w8a8"])
def test_decoding_with_a_cache(text: str, tiny_folder: Any, tmp_path: Path) -> None:
    """Token by token, in bfloat16, through padding, against the whole sequence in float32."""
    scheme = Scheme.parse(text)
    quantized, plain = make(tiny_folder("llama"), tmp_path, lambda n, t: scheme if is_linear(n, t) else None, "native")
    model, expected = load(quantized), reference(plain)
    assert model.config._attn_implementation == NAME
    assert isinstance(model.lm_head, FlatLinear) and model.lm_head.weight is model.model.embed_tokens.weight
    mask = torch.ones_like(PROMPT)
    mask[0, :4] = 0
    cache, got = None, None
    with torch.no_grad():
        wanted = expected(PROMPT, attention_mask=mask).logits[:, -1]
        for t in range(PROMPT.shape[1]):
            step = {"attention_mask": mask[:, : t + 1], "past_key_values": cache, "use_cache": True}
            positions = (mask[:, : t + 1].cumsum(1) - 1).clamp_min(0)[:, -1:]
            output = model(PROMPT[:, t : t + 1], position_ids=positions, **step)
            cache, got = output.past_key_values, output.logits[:, -1].float()
    bound = 0.1 if text == "w8a8" else 0.03  # quantized activations are part of w8a8
    assert float((got[1] - wanted[1]).norm() / wanted[1].norm()) < bound


def test_nothing_is_dequantized(tiny_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, _ = make(tiny_folder("mixtral"), tmp_path)

    def fail(*_: Any) -> None:
        raise AssertionError("a whole matrix was dequantized")

    monkeypatch.setattr(QuantizedTensor, "dequantize", fail)
    model = load(quantized)
    held = sum(p.nbytes for p in model.parameters()) + sum(
        m.nbytes for m in model.modules() if isinstance(m, PackedModule)
    )
    assert not any(p.is_meta for p in model.parameters())
    with pytest.raises(AssertionError, match="whole matrix"):
        load(quantized, packed=False)
    assert held < 0.75 * sum(t.numel() * 2 for t in load_file(tiny_folder("mixtral") / "model.safetensors").values())


def test_tied_embedding_is_held_once(tiny_folder: Any, tmp_path: Path) -> None:
    scheme = Scheme.parse("w8a16")
    quantized, plain = make(
        tiny_folder("llama"), tmp_path, lambda n, t: scheme if "embed_tokens" in n else None, "native"
    )
    model = load(quantized)
    assert isinstance(model.model.embed_tokens, QuantEmbedding) and isinstance(model.lm_head, QuantLinear)
    assert model.lm_head.packed is model.model.embed_tokens.packed
    torch.testing.assert_close(logits(load(quantized, torch.float32)), logits(reference(plain)), rtol=0, atol=2e-5)
    assert [line.split(":")[0] for line in explain(model)] == ["1 QuantEmbedding w8a16", "1 QuantLinear w8a16"]
    assert explain(model)[1].endswith("0.0 MB")


def test_quantized_head_beside_a_plain_embedding(tiny_folder: Any, tmp_path: Path) -> None:
    source = tiny_folder("llama", tie_word_embeddings=False)
    scheme = Scheme.parse("w8a16")
    quantized, plain = make(source, tmp_path, lambda n, t: scheme if n == "lm_head.weight" else None, "native")
    model = load(quantized, torch.float32)
    assert isinstance(model.lm_head, QuantLinear) and not isinstance(model.model.embed_tokens, PackedModule)
    torch.testing.assert_close(logits(model), logits(reference(plain)), rtol=0, atol=2e-5)


def test_experts_of_different_schemes(tiny_folder: Any, tmp_path: Path) -> None:
    """One expert at 8 bits, one not quantized, the others at 4."""

    def scheme_of(name: str, tensor: Tensor) -> Scheme | None:
        if ".experts." not in name or ".experts.2." in name:
            return None
        return Scheme.parse("w8a16") if ".experts.1." in name else W4

    quantized, plain = make(tiny_folder("qwen3_moe"), tmp_path, scheme_of, "native")
    model = load(quantized, torch.float32)
    experts = model.model.layers[0].mlp.experts
    found = [getattr(experts.linear(e, "up_proj"), "scheme", None) for e in range(4)]
    assert [str(s) for s in found] == ["w4a16-g8", "w8a16", "None", "w4a16-g8"]
    torch.testing.assert_close(logits(model), logits(reference(plain)), rtol=0, atol=2e-5)


def test_float16_scales_are_rounded_once(tiny_folder: Any, tmp_path: Path) -> None:
    """A bfloat16 run rounds them for every path alike; a float32 run takes them as they are."""
    quantized, _ = make(tiny_folder("llama"), tmp_path, scale_dtype=torch.float16)
    name = "model.layers.1.mlp.up_proj"
    packed, plain = load(quantized), load(quantized, torch.bfloat16, packed=False)
    layer = packed.get_submodule(name)
    assert layer.choice.name in ("int4pack", "dequantize")
    assert torch.equal(layer.dequantize(torch.bfloat16), plain.get_submodule(name).weight)
    exact = load(quantized, torch.float32).get_submodule(name).dequantize()
    assert not torch.equal(exact, layer.dequantize())
    assert torch.equal(exact, load(quantized, torch.float32, packed=False).get_submodule(name).weight)


def test_plain_folder(tiny_folder: Any) -> None:
    folder = tiny_folder("llama", dtype=torch.bfloat16)
    assert load(folder).dtype == torch.bfloat16
    model = load(folder, dtype=torch.float32)
    assert torch.equal(logits(model), logits(reference(folder)))
    assert not any(isinstance(m, PackedModule) for m in model.modules())


def test_generation_config_comes_along(tiny_folder: Any, tmp_path: Path) -> None:
    quantized, _ = make(tiny_folder("llama"), tmp_path)
    (quantized / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 77]}))
    assert load(quantized).generation_config.eos_token_id == [1, 77]


def spoil(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.pop(f"{UP}.weight_scale"), FormatError, f"{UP}.weight_scale is missing"),
        (lambda t: t.pop(f"{UP}.weight_shape"), FormatError, f"{UP}.weight_shape is missing"),
        (lambda t: t.pop(f"{UP}.weight_packed"), Exception, "mlp.up_proj"),
        (lambda t: t[f"{UP}.weight_scale"].fill_(float("nan")), NumericsError, f"{UP}.weight_scale holds NaN"),
        (lambda t: t["model.norm.weight"].fill_(float("inf")), NumericsError, "model.norm.weight"),
        (lambda t: t.pop("model.norm.weight"), CheckpointError, "model.norm.weight"),
        (lambda t: t[f"{UP}.weight_shape"].copy_(torch.tensor([24, 64])), Exception, "up_proj"),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_damaged(
    change: Callable[[dict[str, Tensor]], None],
    error: type[Exception],
    message: str,
    packed: bool,
    tiny_folder: Any,
    tmp_path: Path,
) -> None:
    quantized, _ = make(tiny_folder("llama"), tmp_path)
    spoil(quantized, change)
    if error is Exception:
        error = (CheckpointError, FormatError, StructureError)  # type: ignore[assignment]
    with pytest.raises(error, match=message):
        load(quantized, packed=packed)


def test_quantized_tensors_without_a_scheme(tiny_folder: Any, tmp_path: Path) -> None:
    quantized, _ = make(tiny_folder("llama"), tmp_path)
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"]["ignore"].append(UP)
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=f"{UP} is stored quantized, but quantization_config gives it no scheme"):
        load(quantized)


def test_unknown_method(tiny_folder: Any, tmp_path: Path) -> None:
    quantized, _ = make(tiny_folder("llama"), tmp_path)
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "gptq"
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="'gptq' is not read"):
        load(quantized)


def test_generation(tiny_folder: Any, tmp_path: Path) -> None:
    from bitwright.generate import generate

    quantized, plain = make(tiny_folder("llama"), tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(quantized)
    results = [generate(m, tokenizer, "The state of", 12) for m in (load(quantized, torch.float32), reference(plain))]
    assert results[0].tokens == results[1].tokens
    assert len(generate(load(quantized), tokenizer, "The state of", 12).tokens) <= 12
