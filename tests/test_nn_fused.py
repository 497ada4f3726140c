"""The decode step out of fused kernels (their plain twins here) against transformers' own; which models get none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import save_tokenizer
from torch import Tensor, nn

import bitwright as bw
from bitwright.algorithms.rtn import rtn
from bitwright.kernels import attention, fragments
from bitwright.kernels.cuda import GluonWeight, HopperWeight, TritonWeight, one_after_the_other
from bitwright.kernels.dispatch import Choice
from bitwright.kernels.problem import Problem
from bitwright.models.discover import discover
from bitwright.models.experts import unfuse
from bitwright.nn import graphs
from bitwright.nn.anatomy import anatomy, together
from bitwright.nn.experts import QuantExperts
from bitwright.nn.fused import Experts, Unknown
from bitwright.nn.graphs import StaticDecoder
from bitwright.nn.linear import QuantLinear
from bitwright.nn.load import load
from bitwright.scheme import Scheme

SIZES = dict(
    vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    rms_norm_eps=1e-3, initializer_range=0.2,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
FAR = dict(
    rope_type="yarn", rope_theta=1e6, factor=16.0, original_max_position_embeddings=32, beta_fast=32.0, beta_slow=1.0,
    mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.5,
)  # fmt: skip
DYNAMIC = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager")
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**SIZES),
    "llama-bias": lambda: tf.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama3": lambda: tf.LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "mistral": lambda: tf.MistralConfig(**SIZES, sliding_window=None),
    "qwen2": lambda: tf.Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
    "qwen3": lambda: tf.Qwen3Config(**SIZES),
    "mixtral": lambda: tf.MixtralConfig(**SIZES, **EXPERTS, sliding_window=None),
    "opt": lambda: opt(),
    "opt-gelu": lambda: opt(activation_function="gelu", enable_bias=False),
}


def opt(**how: Any) -> Any:
    sizes = dict(vocab_size=160, hidden_size=64, word_embed_proj_dim=64, ffn_dim=96, num_hidden_layers=3)
    return tf.OPTConfig(**sizes, num_attention_heads=4, max_position_embeddings=128, init_std=0.2, **how)


def model_of(config: Any) -> Any:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, p in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            p.data = torch.randn_like(p) * 0.3 + ("norm" in name)
    return model


def decode(decoder: StaticDecoder, ids: Tensor, steps: int) -> Tensor:
    logits = [decoder.prefill(ids)]
    for _ in range(steps):
        logits.append(decoder.step(logits[-1].argmax(dim=-1)).clone())
    return torch.stack(logits)


@pytest.mark.parametrize("name", MODELS)
def test_a_fused_step_is_that_of_transformers(name: str) -> None:
    model = model_of(MODELS[name]())
    ids = torch.randint(2, 160, (2, 5), generator=torch.Generator().manual_seed(1))
    fused = StaticDecoder(model, 64, batch=2, parts=anatomy(model))
    assert fused.fused
    expected = decode(StaticDecoder(model, 64, batch=2), ids, 20)
    torch.testing.assert_close(decode(fused, ids, 20), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(decode(fused, ids[:, :3], 4), decode(fused, ids[:, :3], 4)), "nothing of the run before is left"


def test_no_more_positions_than_there_are() -> None:
    config = opt()
    config.max_position_embeddings = 32
    model = model_of(config)
    assert StaticDecoder(model, 256, parts=anatomy(model)).fused


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_roundings_to_16_bits_refuse_nothing(name: str, batch: int) -> None:
    config = MODELS[name]()
    config.num_hidden_layers, config.initializer_range = 8, 0.05
    if hasattr(config, "layer_types"):
        config.layer_types = ["full_attention"] * 8
    model = model_of(config).to(torch.bfloat16)
    assert StaticDecoder(model, 64, batch, parts=anatomy(model)).fused


def test_a_quantized_model(tmp_path: Path) -> None:
    model_of(MODELS["llama-bias"]()).save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    bw.quantize(tmp_path / "source", tmp_path / "packed", scheme="w4a16-g32", algorithm="rtn")
    model = load(tmp_path / "packed", dtype=torch.float32)
    ids = torch.randint(2, 160, (1, 5), generator=torch.Generator().manual_seed(1))
    fused = StaticDecoder(model, 64, parts=anatomy(model))
    assert fused.fused
    expected = decode(StaticDecoder(model, 64), ids, 20)
    torch.testing.assert_close(decode(fused, ids, 20), expected, rtol=1e-3, atol=1e-3)


def qwen3_moe(**how: Any) -> Any:
    sizes = dict(moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, experts_implementation="eager")
    return tf.Qwen3MoeConfig(**SIZES, **sizes, **how)


@pytest.mark.parametrize(
    ("config", "taken"),
    [
        (lambda: tf.MixtralConfig(**(SIZES | dict(intermediate_size=128)), **EXPERTS, sliding_window=None), True),
        (lambda: qwen3_moe(norm_topk_prob=True), True),
        (lambda: tf.MixtralConfig(**SIZES, **EXPERTS, sliding_window=None), False),  # 96 rows of gate, then a gap
        (lambda: qwen3_moe(norm_topk_prob=False), False),
    ],
)
def test_experts_in_stacks(config: Callable[[], Any], taken: bool) -> None:
    """Fused with what is around them, or as their own module; the step is right either way."""
    model = model_of(config())
    for layer in model.model.layers:
        layer.mlp.experts = stacked(model, layer)
    parts = anatomy(model)
    assert {isinstance(block.mlp, Experts) for block in parts.blocks} == {taken}
    ids = torch.randint(2, 160, (2, 5), generator=torch.Generator().manual_seed(1))
    fused = StaticDecoder(model, 64, batch=2, parts=parts)
    assert fused.fused
    expected = decode(StaticDecoder(model, 64, batch=2), ids, 20)
    torch.testing.assert_close(decode(fused, ids, 20), expected, rtol=1e-3, atol=1e-3)


def stacked(model: Any, layer: Any) -> QuantExperts:
    """The experts of a layer at 8 bits, as stacks of fragments in float32."""
    block = next(b for b in discover(model).blocks if model.get_submodule(b.name) is layer)
    experts = QuantExperts.adopt(unfuse(layer, block.experts[0]))
    scheme = Scheme.parse("w8a16")
    for e in range(experts.num_experts):
        one = experts.get_submodule(str(e))
        for leaf, linear in list(one.named_children()):
            qt = rtn(linear.weight.detach(), scheme.weight)
            problem = Problem.of(qt, scheme, torch.float32, "cpu", frozenset())
            weight = TritonWeight(problem, fragments.pack(qt, torch.float32))
            setattr(one, leaf, QuantLinear(weight, scheme, Choice(TritonWeight, "for a test")))
    experts.stack()
    assert experts.unstacked is None
    return experts


# --- models without one


def test_models_built_otherwise(fixture_model: Callable[[str], Path]) -> None:
    with pytest.raises(Unknown, match="other names than those of Llama"):
        anatomy(load(fixture_model("falcon")))


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (lambda: tf.MistralConfig(**SIZES, sliding_window=8), "sees a window"),
        (lambda: tf.LlamaConfig(**SIZES, rope_parameters=DYNAMIC), "depend on the length"),
        (lambda: tf.Olmo2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}), "its blocks are made of"),
        (lambda: tf.LlamaConfig(**(SIZES | dict(head_dim=24))), "of 24 numbers"),
        (lambda: tf.GraniteConfig(**SIZES, attention_multiplier=0.5), "scales by 0.5"),
        (lambda: tf.GraniteConfig(**SIZES, attention_multiplier=0.25, logits_scaling=2.0), "asks for logits_scaling"),
        (lambda: opt(do_layer_norm_before=False), "other names than those of Llama and OPT"),
        (lambda: opt(layer_norm_elementwise_affine=False), "is no LayerNorm with weight"),
    ],
)
def test_what_no_kernel_takes(config: Callable[[], Any], why: str) -> None:
    with pytest.raises(Unknown, match=why):
        anatomy(model_of(config()))


def test_hooks_would_not_be_called() -> None:
    model = model_of(MODELS["llama"]())
    model(torch.tensor([[3, 4]]))
    anatomy(model)
    mlp = model.model.layers[1].mlp
    handle = mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(Unknown, match=r"hooks on model\.layers\.1\.mlp"):
        anatomy(model)
    handle.remove()
    mlp.forward = mlp.forward  # what accelerate does
    with pytest.raises(Unknown, match=r"hooks on model\.layers\.1\.mlp"):
        anatomy(model)


OTHERS: dict[str, Callable[[], Any]] = {
    "gemma": lambda: tf.GemmaConfig(**SIZES, hidden_activation="silu"),  # norms of 1 + weight
    "granite": lambda: tf.GraniteConfig(**SIZES, attention_multiplier=0.25, residual_multiplier=0.5),
    "ministral3": lambda: tf.Ministral3Config(**SIZES, sliding_window=None, rope_parameters=FAR),  # from position 32 on
    "smollm3": lambda: tf.SmolLM3Config(**SIZES, no_rope_layers=[1, 1, 0], use_sliding_window=False),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_names_do_not_tell_the_logits_do(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(OTHERS[name]())
    if name != "gemma":
        with pytest.raises(Unknown, match="it asks for"):
            anatomy(model)
        monkeypatch.setattr("bitwright.nn.anatomy._extras", lambda config: [])
    with caplog.at_level(logging.INFO):
        decoder = StaticDecoder(model, 64, parts=anatomy(model))
    assert not decoder.fused and "its logits or its cache differ" in caplog.text
    ids = torch.randint(2, 160, (1, 5), generator=torch.Generator().manual_seed(1))
    assert torch.equal(decode(decoder, ids, 5), decode(StaticDecoder(model, 64), ids, 5))


@pytest.mark.parametrize("sequence", [0, 1])
def test_one_wrong_sequence_is_seen(sequence: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.decode

    def wrong(*given: Any) -> Tensor:
        y = right(*given).clone()
        y[sequence] = 0.0
        return y

    monkeypatch.setattr(attention, "decode", wrong)
    model = model_of(MODELS["llama"]())
    assert not StaticDecoder(model, 64, batch=2, parts=anatomy(model)).fused


def test_whatever_a_kernel_raises_transformers_modules_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    class OutOfResources(Exception):
        """As Triton's, no RuntimeError."""

    def fail(*given: Any) -> Tensor:
        raise OutOfResources

    monkeypatch.setattr(attention, "decode", fail)
    model = model_of(MODELS["llama"]())
    assert not StaticDecoder(model, 64, parts=anatomy(model)).fused


def test_decoders_of_a_model_share_what_it_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def parts(model: Any) -> Any:
        made.append(anatomy(model))
        return made[-1]

    monkeypatch.setattr(graphs, "_parts", parts)
    model = model_of(MODELS["llama"]())
    first = graphs.decoder(model, 60)
    assert first.fused and graphs.decoder(model, 60) is first and graphs.decoder(model, 600).fused
    assert len(made) == 1
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.data.clone())
    assert graphs.decoder(model, 60).fused and len(made) == 2, "another head, another step"
    other = model_of(OTHERS["gemma"]())
    assert not graphs.decoder(other, 60).fused and not graphs.decoder(other, 600).fused
    assert len(made) == 3 and graphs._kept[other].parts is None, "refused once"


def test_other_modules_under_the_same_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "cuda_features", lambda device: {"triton"})
    model = model_of(MODELS["llama"]())
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert graphs._parts(model) is not None
    del model.model.layers[1].self_attn.scaling
    assert graphs._parts(model) is None
    monkeypatch.setattr(graphs, "cuda_features", lambda device: set())
    assert graphs._parts(model_of(MODELS["llama"]())) is None


@pytest.mark.parametrize(
    "where", ["norm", "layers.0.self_attn.k_proj", "layers.1.self_attn.o_proj", "layers.2.mlp.up_proj", "embed_tokens"]
)
def test_a_wrong_part_is_seen(where: str) -> None:
    right, wrong = (model_of(MODELS["llama"]()) for _ in range(2))
    weight = wrong.model.get_submodule(where).weight
    weight.data *= torch.linspace(1, 2, weight.shape[-1])
    assert StaticDecoder(right, 64, parts=anatomy(right)).fused
    assert not StaticDecoder(right, 64, parts=anatomy(wrong)).fused


# --- linears that read one tensor


def packed(N: int, K: int, kernel: type = HopperWeight, seed: int = 0, **how: Any) -> QuantLinear:
    how = dict(bits=4, group_size=64, symmetric=True, dtype=torch.bfloat16) | how
    f = fragments.random(
        N, K, how["bits"], how["group_size"], how["symmetric"], how["dtype"], "cpu",
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    scheme = Scheme.parse("w4a16-g64")
    problem = Problem(N, K, scheme, how["dtype"], how["dtype"], "cuda", frozenset())
    module = QuantLinear(kernel(problem, f), scheme, None)
    if how.get("bias"):
        module.bias = nn.Parameter(torch.randn(N, dtype=how["dtype"]), requires_grad=False)
    return module


@pytest.mark.parametrize("how", [{}, dict(bits=3, symmetric=False), dict(bits=8, bias=True), dict(group_size=256)])
@pytest.mark.parametrize("rows", [(128, 64, 64), (64, 200)])
def test_joined_linears_give_what_each_gives(rows: tuple[int, ...], how: dict[str, Any]) -> None:
    linears = [packed(N, 256, seed=i, **how) for i, N in enumerate(rows)]
    before = [list(m.packed.tensors) for m in linears]
    x = torch.randn(5, 256, dtype=torch.bfloat16)
    expected = torch.cat([m(x) for m in linears], dim=-1)
    both = together(linears)
    assert torch.equal(both(x), expected)
    assert torch.equal(torch.cat([m(x) for m in linears], dim=-1), expected)
    for m, old in zip(linears, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(m.packed.tensors, old, strict=True))
    words = [m.packed.fragments.words[0] for m in linears]
    assert torch.equal(together(linears)(x), expected)
    again = [m.packed.fragments.words[0] for m in linears]
    assert [w.data_ptr() for w in again] == [w.data_ptr() for w in words], "what was joined stays where it is"
    whole, _ = one_after_the_other([m.packed for m in linears])
    held = {w.untyped_storage().data_ptr() for w in (*words, whole.fragments.words[0])}
    assert len(held) == 1, "held once"
    assert all(w.is_contiguous() for w in words)


@pytest.mark.parametrize(
    "pair",
    [
        (packed(100, 256), packed(64, 256)),
        (packed(64, 256), packed(64, 256, bits=8)),
        (packed(64, 256), packed(64, 256, group_size=32)),
        (packed(64, 256), packed(64, 256, symmetric=False)),
        (packed(64, 256, GluonWeight), packed(64, 256, TritonWeight)),
        (packed(64, 256), packed(64, 256, dtype=torch.float16)),
    ],
)
def test_linears_that_cannot_be_one(pair: tuple[QuantLinear, QuantLinear]) -> None:
    assert one_after_the_other([m.packed for m in pair]) is None


def test_linears_that_stay_apart() -> None:
    linears = [packed(64, 256, bias=True), packed(64, 256), nn.Linear(256, 32, dtype=torch.bfloat16)]
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    for some in (linears, linears[:2], linears[2:]):
        assert torch.equal(together(some)(x), torch.cat([m(x) for m in some], dim=-1))
