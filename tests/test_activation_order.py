"""Groups in activation order (`weight_g_idx`), from the file to the product, against a loop over g_idx."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitwright.errors import FormatError
from bitwright.formats import compressed_tensors as ct
from bitwright.formats import native
from bitwright.kernels import dispatch, reference
from bitwright.kernels.permuted import Permuted
from bitwright.kernels.problem import AVX512
from bitwright.nn.linear import QuantLinear
from bitwright.nn.load import load
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import Scheme

SCHEMES = ("w4a16-g32", "w4a16-g32-asym", "w3a16-g64", "w8a16-g32-asym")


def stored(text: str, N: int, K: int, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """(tensors of a checkpoint with scattered groups, its weight float64 [N, K] as g_idx defines it).

    Codes lie in the order of the inputs: w[n, k] = (q[n, k] - z[n, g_idx[k]]) * s[n, g_idx[k]].
    """
    scheme = Scheme.parse(text)
    w = scheme.weight
    generator = torch.Generator().manual_seed(seed)
    grid = (N, w.num_groups(K))
    codes = torch.randint(w.qmin, w.qmax + 1, (N, K), generator=generator).to(torch.int8)
    zero = torch.randint(w.qmin, w.qmax + 1, grid, generator=generator).to(torch.int8)
    scale = (torch.randn(grid, generator=generator) * 0.05).to(torch.bfloat16)
    g_idx = (torch.arange(K) // (w.group_size or K))[torch.randperm(K, generator=generator)]
    weight = torch.empty(N, K, dtype=torch.float64)
    for k, group in enumerate(g_idx.tolist()):
        z = 0 if w.symmetric else zero[:, group].double()
        weight[:, k] = (codes[:, k].double() - z) * scale[:, group].double()
    tensors = ct.pack(QuantizedTensor(codes, scale, None if w.symmetric else zero, w), scheme)
    return tensors | {"weight_g_idx": g_idx.to(torch.int32)}, weight


@pytest.mark.parametrize("text", SCHEMES)
def test_read(text: str) -> None:
    tensors, weight = stored(text, 40, 192)
    kept = {k: v.clone() for k, v in tensors.items()}
    qt = ct.unpack(tensors, Scheme.parse(text), "blk.up")
    assert qt.order is not None and not torch.equal(qt.order, torch.arange(192))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(qt.dequantize(dtype), weight.to(dtype))
    assert torch.equal(tensors["weight_g_idx"].long()[qt.order], torch.arange(192) // qt.scheme.group_size)
    assert all(torch.equal(tensors[k], v) for k, v in kept.items())


def test_unpacked_int8_weights_are_read_too() -> None:
    codes = torch.randint(-128, 128, (4, 64)).to(torch.int8)
    scale, g_idx = torch.rand(4, 2), (torch.arange(64) // 32).flip(0)
    qt = ct.unpack({"weight": codes, "weight_scale": scale, "weight_g_idx": g_idx}, Scheme.parse("w8a16-g32"))
    assert torch.equal(qt.dequantize(), codes.float() * scale[:, g_idx])


@pytest.mark.parametrize("actorder", ["group", "dynamic", True, "weight", None], ids=str)
def test_the_config_may_say_so(actorder: str | bool | None) -> None:
    name, scheme = "model.layers.0.up_proj", Scheme.parse("w4a16-g32")
    config = ct.write_config({name: scheme}, [], {})
    config["config_groups"]["group_0"]["weights"]["actorder"] = actorder
    assert ct.read_config(config, [name]) == {name: scheme}


@pytest.mark.parametrize("form", [ct, native], ids=["compressed-tensors", "native"])
def test_nothing_writes_it(form: Any) -> None:
    tensors, _ = stored("w4a16-g32", 8, 64)
    scheme = Scheme.parse("w4a16-g32")
    qt = ct.unpack(tensors, scheme)
    with pytest.raises(FormatError, match=r"^blk\.up: its columns are in activation order.*not written"):
        form.pack(qt, scheme, "blk.up")
    w8a8 = QuantizedTensor(qt.codes, qt.scale[:, :1], None, Scheme.parse("w8a8").weight, qt.order)
    with pytest.raises(FormatError, match="activation order"):
        form.pack(w8a8, Scheme.parse("w8a8"))


@pytest.mark.parametrize(
    "order",
    [
        torch.arange(63),
        torch.arange(64, dtype=torch.int32),
        torch.arange(64) // 2,
        torch.arange(1, 65),
        torch.arange(64)[None],
    ],
    ids=["short", "int32", "repeats", "off by one", "2-d"],
)
def test_an_order_is_a_permutation(order: Tensor) -> None:
    scheme = Scheme.parse("w4a16").weight
    codes, scale = torch.zeros(2, 64, dtype=torch.int8), torch.ones(2, 1)
    with pytest.raises(FormatError, match=r"order must be a permutation of 0 \.\. 63"):
        QuantizedTensor(codes, scale, None, scheme, order)


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_implementation_takes_it(text: str, dtype: torch.dtype) -> None:
    tensors, weight = stored(text, 40, 192)
    scheme = Scheme.parse(text)
    qt = ct.unpack(tensors, scheme)
    bias = torch.randn(40).to(dtype)
    bound = 3.5e-3 if dtype == torch.bfloat16 else 1e-6
    for features in (frozenset(), frozenset({AVX512})):
        packed, choice = dispatch.prepare(qt, scheme, dtype, features=features)
        assert isinstance(packed, Permuted) and "order of its columns" in choice.reason
        assert torch.equal(packed.dequantize(), weight.float())
        index = torch.tensor([39, 0, 7, 7])
        assert torch.equal(packed.rows(index), weight[index].to(dtype))
        assert packed.nbytes == packed.inner.nbytes + 2 * 192 * 8
        for M in (0, 1, 160):
            x = torch.randn(M, 192).to(dtype)
            kept, y = x.clone(), packed.linear(x, bias)
            assert (y.dtype, tuple(y.shape)) == (dtype, (M, 40)) and torch.equal(x, kept)
            assert torch.equal(y, packed(x) + bias)
            expected = x.double() @ weight.t()
            assert float((packed(x).double() - expected).norm()) <= bound * float(expected.norm())
        layer = QuantLinear(packed, scheme, choice, bias)
        assert torch.equal(layer(x[None]), packed.linear(x, bias)[None])
    assert torch.equal(reference.linear(x, qt, scheme), (x.double() @ weight.t()).to(dtype))


def test_int8_activations_stay_bit_exact() -> None:
    scheme = Scheme.parse("w8a8")
    codes = torch.randint(-128, 128, (16, 96)).to(torch.int8)
    plain = QuantizedTensor(codes, torch.rand(16, 1), None, scheme.weight)
    order = torch.randperm(96)
    permuted = replace(plain, codes=codes[:, order], order=order)
    x = torch.randn(5, 96)
    expected = reference.linear(x, plain, scheme)
    assert torch.equal(reference.linear(x, permuted, scheme), expected)
    assert torch.equal(dispatch.prepare(permuted, scheme, torch.float32, features=frozenset())[0](x), expected)


def test_load(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """A folder with g_idx in some of its linears runs as the plain folder with its weights does."""
    transformers = pytest.importorskip("transformers")
    source = tiny_folder("llama")
    weights = load_file(source / "model.safetensors")
    scheme = Scheme.parse("w4a16-g8")
    quantized, plain, schemes = {}, {}, {}
    for seed, (name, tensor) in enumerate(weights.items()):
        if ".layers." not in name or tensor.ndim != 2:
            quantized[name] = plain[name] = tensor.to(torch.bfloat16).float()
            continue
        prefix = name.removesuffix(".weight")
        tensors, weight = stored("w4a16-g8", *tensor.shape, seed)
        if "up_proj" in name:  # one kind of linear has neighbours for groups, and says so
            del tensors["weight_g_idx"]
            weight = ct.unpack(tensors, scheme).dequantize(torch.float64)
        quantized |= {f"{prefix}.{key}": value for key, value in tensors.items()}
        plain[name], schemes[prefix] = weight.float(), scheme
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = ct.write_config(schemes, ["lm_head"], {})
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    for kind, tensors in (("quantized", quantized), ("plain", plain)):
        shutil.copytree(source, tmp_path / kind)
        save_file(tensors, tmp_path / kind / "model.safetensors", {"format": "pt"})
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))

    prompt = torch.arange(2, 26).view(2, 12)
    model = load(tmp_path / "quantized", dtype=torch.float32)
    kinds = {
        name.rpartition(".")[2]: type(m.packed) is Permuted for name, m in model.named_modules() if hasattr(m, "packed")
    }
    assert kinds["up_proj"] is False and kinds["down_proj"] is True and kinds["q_proj"] is True
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = expected(prompt).logits
        torch.testing.assert_close(model(prompt).logits, logits, rtol=1e-4, atol=1e-4)
        unpacked = load(tmp_path / "quantized", dtype=torch.float32, packed=False)
        assert torch.equal(unpacked(prompt).logits, logits)
