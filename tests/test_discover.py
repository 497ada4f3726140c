"""Structure found in tiny models of seven families, against lists written by hand, and models that are refused."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf
from conftest import FAMILIES, build_tiny
from torch import nn

from bitwright.errors import StructureError
from bitwright.models.discover import describe, discover

LLAMA = [
    *(f"self_attn.{p}_proj" for p in "qkvo"),
    *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
]
EXPECTED = {
    "llama": ("model.layers", LLAMA, "model.embed_tokens", "lm_head", True),
    "opt": (
        "model.decoder.layers",
        ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"],
        "model.decoder.embed_tokens",
        "lm_head",
        True,
    ),
    "falcon": (
        "transformer.h",
        ["self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
        "transformer.word_embeddings",
        "lm_head",
        True,
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
        "gpt_neox.embed_in",
        "lm_head",
        False,
    ),
    "mixtral": ("model.layers", LLAMA[:4], "model.embed_tokens", "lm_head", False),
    "qwen2_moe": (
        "model.layers",
        [*LLAMA[:4], *(f"mlp.shared_expert.{p}_proj" for p in ("gate", "up", "down"))],
        "model.embed_tokens",
        "lm_head",
        False,
    ),
    "qwen3_moe": ("model.layers", LLAMA[:4], "model.embed_tokens", "lm_head", False),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_linears_embedding_and_head(tiny_model, family: str) -> None:
    model = tiny_model(family)
    structure = discover(model)
    blocks, linears, embedding, head, tied = EXPECTED[family]
    assert structure.blocks_name == blocks
    assert [b.name for b in structure.blocks] == [f"{blocks}.0", f"{blocks}.1"]
    last = structure.blocks[-1]
    assert [x.name for x in last.linears] == [f"{last.name}.{x}" for x in linears]
    for linear in last.linears:
        module = model.get_submodule(linear.name)
        assert (module.out_features, module.in_features) == (linear.N, linear.K)
        assert linear.bias == (module.bias is not None) and linear.class_name == type(module).__name__
        assert linear.disk_name == linear.name
    assert (structure.embedding, structure.lm_head, structure.tied) == (embedding, head, tied)
    assert structure.embedding_shape == (320, 32)
    assert structure.parameters == model.num_parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_is_a_linear_or_kept_with_a_reason(tiny_model, family: str) -> None:
    model = tiny_model(family)
    structure = discover(model)
    kept = [k for b in structure.blocks for k in b.kept] + list(structure.others)
    assert all(k.reason for k in kept)
    named = {k.name for k in kept} | {f"{x.name}.weight" for b in structure.blocks for x in b.linears}
    fused = {s.name for b in structure.blocks for s in b.experts}
    for name, p in model.named_parameters(remove_duplicate=False):
        assert p.ndim < 2 or name in named or name.rpartition(".")[0] in fused, name
    vectors = sum(b.vector_params for b in structure.blocks)
    assert vectors == sum(p.numel() for n, p in model.named_parameters() if p.ndim < 2 and structure.blocks_name in n)


def test_falcon_linears_are_a_subclass(tiny_model) -> None:
    assert {x.class_name for x in discover(tiny_model("falcon")).linears} == {"FalconLinear"}


@pytest.mark.parametrize(
    ("family", "leaves", "inner", "block"),
    [
        ("mixtral", ("w1", "w3", "w2"), 48, 0),
        ("qwen2_moe", ("gate_proj", "up_proj", "down_proj"), 24, 1),
        ("qwen3_moe", ("gate_proj", "up_proj", "down_proj"), 24, 0),
    ],
)
def test_expert_stacks(tiny_model, family: str, leaves: tuple[str, str, str], inner: int, block: int) -> None:
    found = discover(tiny_model(family)).blocks[block]
    (stack,) = found.experts
    assert (stack.name, stack.path, stack.num_experts) == (f"{found.name}.mlp.experts", "mlp.experts", 4)
    for part, leaf, shape in zip(
        (stack.gate, stack.up, stack.down), leaves, [(inner, 32), (inner, 32), (32, inner)], strict=True
    ):
        assert [(x.name, x.N, x.K) for x in part] == [(f"{stack.name}.{e}.{leaf}", *shape) for e in range(4)]
    assert found.routers == (f"{found.name}.mlp.gate.weight",)
    assert [k.reason for k in found.kept if k.name in found.routers] == ["router: its outputs choose the experts"]
    assert found.all_linears == found.linears + stack.linears


def test_dense_block_among_moe_blocks(tiny_model) -> None:
    first, second = discover(tiny_model("qwen2_moe")).blocks
    assert not first.experts and not first.routers
    assert [x.name.split(".mlp.")[-1] for x in first.linears[4:]] == ["gate_proj", "up_proj", "down_proj"]
    assert second.experts


def test_gate_of_the_shared_expert_is_kept(tiny_model) -> None:
    block = discover(tiny_model("qwen2_moe")).blocks[1]
    (gate,) = [k for k in block.kept if "shared_expert_gate" in k.name]
    assert gate.shape == (1, 32) and "one output" in gate.reason


def test_shared_expert_as_wide_as_there_are_experts_is_no_router(tiny_model) -> None:
    block = discover(tiny_model("qwen2_moe", shared_expert_intermediate_size=4)).blocks[1]
    assert block.routers == (f"{block.name}.mlp.gate.weight",)
    assert f"{block.name}.mlp.shared_expert.gate_proj" in [x.name for x in block.linears]


class Block(nn.Module):
    """A block with experts that were never fused and a plain nn.Linear router, as custom code has them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(8, 8)
        self.moe = nn.Module()
        self.moe.router = nn.Linear(8, 3)
        self.moe.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8)) for _ in range(3))


class Custom(nn.Module):
    """The least that discover asks of a model."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(8, 10, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_router_beside_a_list_of_experts() -> None:
    structure = discover(Custom(Block(), Block()))
    assert structure.blocks_name == "blocks"
    block = structure.blocks[0]
    assert block.routers == ("blocks.0.moe.router.weight",)
    assert [x.name for x in block.linears] == [
        "blocks.0.attention",
        *(f"blocks.0.moe.experts.{e}.{i}" for e in range(3) for i in range(2)),
    ]
    # Biases of the linears and of the router.
    assert block.vector_params == 8 + 3 * (6 + 8) + 3


def test_linear_shared_by_two_blocks_is_refused() -> None:
    one, two = Block(), Block()
    two.attention.weight = one.attention.weight
    with pytest.raises(StructureError, match=r"blocks\.1\.attention and blocks\.0\.attention share one weight"):
        discover(Custom(one, two))


def test_blocks_of_two_classes_are_refused() -> None:
    class Other(Block):
        pass

    with pytest.raises(StructureError, match=r"different classes \(Block, Other\)"):
        discover(Custom(Block(), Other()))


def test_mostly_unknown_matrices_are_refused() -> None:
    block = Block()
    block.mixer = nn.Module()
    block.mixer.kernel = nn.Parameter(torch.zeros(50, 50))
    with pytest.raises(StructureError, match=r"blocks\.0\.mixer\.kernel \[50, 50\]"):
        discover(Custom(block))


def test_few_unknown_matrices_are_kept_with_a_reason() -> None:
    block = Block()
    block.position = nn.Parameter(torch.zeros(2, 4))
    block.scale = nn.Parameter(torch.zeros(1, 1, 8))
    found = discover(Custom(block)).blocks[0]
    kept = {k.name: k.reason for k in found.kept}
    assert kept["blocks.0.position"] == "a 2-D parameter of Block, no linear"
    assert "blocks.0.scale" not in kept, "a vector, whatever its number of dimensions"


def test_no_linear_found() -> None:
    with pytest.raises(StructureError, match=r"no list of blocks with nn\.Linear"):
        discover(Custom(nn.LayerNorm(8), nn.LayerNorm(8)))


def test_gpt2_is_refused_with_its_reason() -> None:
    model = build_tiny(tf.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    with pytest.raises(StructureError, match=r"8 Conv1D.*not supported"):
        discover(model)


def test_transposed_expert_stack_with_biases_is_refused() -> None:
    config = tf.GptOssConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        pad_token_id=0,
    )
    with pytest.raises(StructureError, match=r"GptOssExperts.*not supported"):
        discover(build_tiny(config))


def test_stack_without_names_of_its_own_on_disk_is_refused() -> None:
    config = tf.GraniteMoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    with pytest.raises(StructureError, match="stored fused"):
        discover(build_tiny(config))


def test_model_without_an_embedding_is_refused() -> None:
    model = Custom(Block())
    model.get_input_embeddings = lambda: None
    with pytest.raises(StructureError, match="no input embedding"):
        discover(model)


def test_head_that_is_no_linear_is_not_offered_as_one() -> None:
    model = Custom(Block())
    head = nn.Module()
    head.weight = nn.Parameter(torch.zeros(10, 8))
    model.head = head
    structure = discover(model)
    assert structure.lm_head == "head" and structure.head is None


def test_description_is_plain_and_adds_up(tiny_model) -> None:
    structure = discover(tiny_model("qwen2_moe"))
    summary = json.loads(json.dumps(describe(structure, bytes_on_disk=123)))
    assert summary["num_blocks"] == 2 and summary["bytes_on_disk"] == 123
    assert summary["bytes_16bit"] == 2 * structure.parameters
    assert [kind["indices"] for kind in summary["block_kinds"]] == [[0], [1]]
    dense, sparse = summary["block_kinds"]
    assert dense["experts"] == [] and sparse["experts"][0]["num_experts"] == 4
    assert sparse["experts"][0]["down"] == [32, 24] and sparse["routers"] == ["mlp.gate.weight"]
    assert {k["reason"] for k in sparse["kept"]} == {
        "router: its outputs choose the experts",
        "a gate with one output: nothing to gain",
    }
    kept = sum(k.numel for b in structure.blocks for k in b.kept) + sum(k.numel for k in structure.others)
    vectors = sum(b.vector_params for b in structure.blocks) + 32  # and the final norm
    assert summary["parameters"]["linears"] + kept + vectors == structure.parameters
    assert summary["num_linears"] == 7 + 7 + 12 and summary["num_expert_linears"] == 12


def test_same_blocks_are_described_once(tiny_model) -> None:
    (kind,) = describe(discover(tiny_model("llama")))["block_kinds"]
    assert kind["indices"] == [0, 1]
    assert kind["linears"][0] == {"name": "self_attn.q_proj", "shape": [32, 32], "bias": False, "class": "Linear"}


def test_discover_works_on_meta() -> None:
    with torch.device("meta"):
        model = Custom(Block())
    assert discover(model).blocks[0].linears[0].N == 8


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_behind_the_activation_function(tiny_model, family: str) -> None:
    """By name here, by structure there; a square MLP, where shapes alone do not tell, too."""
    square = {"llama": {"intermediate_size": 32}, "opt": {"ffn_dim": 32}, "falcon": {"ffn_hidden_size": 32}}
    for changes in ({}, square.get(family, {})):
        found = discover(tiny_model(family, **changes)).linears
        after = {x.name for x in found if x.after_activation}
        ends = ("down_proj", "fc2", "dense_4h_to_h", ".w2")
        assert after == {x.name for x in found if x.name.endswith(ends)} and after


class MLP(nn.Module):
    """Linears of the given shapes beside an activation function, defined in the given order."""

    def __init__(self, **shapes: tuple[int, int]) -> None:
        super().__init__()
        self.attention = nn.Linear(8, 8)
        self.mlp = nn.Module()
        for leaf, (N, K) in shapes.items():
            setattr(self.mlp, leaf, nn.Linear(K, N))
        self.mlp.act = nn.SiLU()


@pytest.mark.parametrize("order", [("gate", "up", "down"), ("gate", "down", "up"), ("down", "up", "gate")])
@pytest.mark.parametrize("inner", [6, 12, 16])
def test_the_direction_tells_which_linear_is_behind_the_activation(order: tuple[str, ...], inner: int) -> None:
    shapes = {"gate": (inner, 8), "up": (inner, 8), "down": (8, inner)}
    found = discover(Custom(MLP(**{leaf: shapes[leaf] for leaf in order}))).blocks[0].linears
    assert [x.name for x in found if x.after_activation] == ["blocks.0.mlp.down"]


@pytest.mark.parametrize("inner", [4, 6, 8])
@pytest.mark.parametrize("down_first", [False, True])
def test_gate_and_up_in_one_matrix(inner: int, down_first: bool) -> None:
    """inner 4 makes the fused matrix square, 8 the other."""
    shapes = {"gate_up": (2 * inner, 8), "down": (8, inner)}
    order = reversed(shapes) if down_first else shapes
    found = discover(Custom(MLP(**{leaf: shapes[leaf] for leaf in order}))).blocks[0].linears
    assert [x.name for x in found if x.after_activation] == ["blocks.0.mlp.down"]


def test_linears_that_do_not_lead_back_are_not_behind_an_activation() -> None:
    found = discover(Custom(MLP(one=(6, 8), two=(10, 6), three=(8, 10)))).blocks[0].linears
    assert not any(x.after_activation for x in found)


def test_phi3() -> None:
    model = build_tiny(
        tf.Phi3Config(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=1,
        )
    )
    after = [x.name for x in discover(model).linears if x.after_activation]
    assert after == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]


def test_what_is_no_activation_function() -> None:
    """Dropout, norms without weights, rotary tables and modules that want other arguments are asked and declined."""
    from bitwright.models.discover import _is_activation

    class Rotary(nn.Module):
        def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return x.sin() + positions

    class Norm(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / x.norm()

    declined = [nn.Dropout(0.1).eval(), nn.Identity(), Rotary(), Norm(), nn.Linear(4, 4), nn.PReLU(), nn.Flatten(0)]
    assert not any(map(_is_activation, declined))
    assert all(map(_is_activation, [nn.ReLU(), nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Tanh(), nn.LeakyReLU()]))
