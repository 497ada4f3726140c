"""QuantLinear, QuantEmbedding and QuantExperts as drop-in modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitwright.errors import BitwrightError, OutputError, SchemeError
from bitwright.nn.embedding import QuantEmbedding
from bitwright.nn.linear import FlatLinear, QuantLinear
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import Scheme

W4 = Scheme.parse("w4a16-g32")


def random_weight(N: int, K: int, scheme: Scheme = W4) -> QuantizedTensor:
    w = scheme.weight
    generator = torch.Generator().manual_seed(N + K)
    codes = torch.randint(w.qmin, w.qmax + 1, (N, K), generator=generator).to(torch.int8)
    scale = (torch.randn(N, w.num_groups(K), generator=generator) * 0.05).to(torch.bfloat16)
    return QuantizedTensor(codes, scale, None, w)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64), (2, 0, 64)], ids=str)
def test_linear_is_nn_linear(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    qt, bias = random_weight(80, 64), torch.randn(80)
    packed = QuantLinear.from_quantized(qt, W4, bias, dtype=dtype)
    plain = nn.Linear(64, 80)
    plain.weight.data, plain.bias.data = qt.dequantize(), bias
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        y, expected = packed(x), plain(x.float())
    assert (y.dtype, y.shape) == (dtype, expected.shape)
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.06)


def test_linear_takes_any_dtype_and_stride() -> None:
    """Activations of another dtype are cast, and come back in their own."""
    layer = QuantLinear.from_quantized(random_weight(64, 64), W4)
    x = torch.randn(4, 128)
    y = layer(x[:, ::2])
    assert y.dtype == torch.float32
    assert torch.equal(y, layer(x[:, ::2].contiguous().bfloat16()).float())


def test_casting_a_model_leaves_packed_weights_alone() -> None:
    model = nn.Sequential(QuantLinear.from_quantized(random_weight(64, 64), W4, torch.randn(64)), nn.LayerNorm(64))
    x = torch.randn(3, 64).bfloat16()
    before = model[0](x)
    model.float()
    assert model[0].packed.dtype == torch.bfloat16
    assert model[0].bias.dtype == torch.float32
    assert torch.equal(model[0](x), before)


def test_packed_weights_neither_move_nor_save() -> None:
    model = nn.Sequential(QuantLinear.from_quantized(random_weight(64, 64), W4))
    with pytest.raises(BitwrightError, match="prepared for cpu and cannot move to meta"):
        model.to("meta")
    with pytest.raises(OutputError, match=r"^0: packed weights are laid out for this machine"):
        model.state_dict()
    assert list(model.parameters()) == []


def test_linear_says_what_it_is() -> None:
    layer = QuantLinear.from_quantized(random_weight(64, 96), W4, dtype=torch.float32)
    assert repr(layer) == "QuantLinear(96, 64, bias=False, w4a16-g32, dequantize)"
    assert layer.nbytes == 64 * 96 // 2 + 64 * 3 * 2
    assert torch.equal(layer.dequantize(), random_weight(64, 96).dequantize())
    with pytest.raises(SchemeError, match="w4a16-g64"):
        QuantLinear.from_quantized(random_weight(64, 64), Scheme.parse("w4a16-g64"))


@pytest.mark.parametrize("text", ["w8a16", "w4a16-g32", "w3a16"])
def test_embedding_is_nn_embedding(text: str) -> None:
    scheme = Scheme.parse(text)
    qt = random_weight(100, 64, scheme)
    index = torch.randint(0, 100, (2, 7))
    for dtype in (torch.bfloat16, torch.float32):
        rows = QuantEmbedding.from_quantized(qt, scheme, dtype=dtype)(index)
        assert torch.equal(rows, nn.functional.embedding(index, qt.dequantize(dtype)))


def test_flat_linear_is_nn_linear() -> None:
    linear = nn.Linear(24, 40)
    flat = FlatLinear.adopt(linear)
    x = torch.randn(2, 9, 24)
    assert flat.weight is linear.weight and isinstance(flat, nn.Linear)
    for part in (x, x[:, -1:], x[:1, -1:], x[0, 0], x[:, :0]):
        torch.testing.assert_close(flat(part), linear(part))
