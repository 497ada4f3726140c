"""What is caught of a model's forward: the blocks' arguments, groups of linears, and forwards that stop and go on."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import pytest
import torch
from algorithm_oracles import rng
from calibrate_rig import B, L, no_hooks_left, rig_of, wrap_for
from conftest import FAMILIES, build_tiny
from torch import Tensor, nn

from bitwright.calibrate.capture import Call, Forward, Group, block_calls, first_tensor, stopping, trace
from bitwright.errors import StructureError
from bitwright.models.discover import discover


@pytest.mark.parametrize("family", FAMILIES)
def test_block_calls_lead_through_the_model_as_it_runs(tiny_model, family: str) -> None:
    """Hidden states and arguments caught while the blocks are passed by are those of an ordinary forward."""
    model = tiny_model(family)
    blocks = [model.get_submodule(b.name) for b in discover(model).blocks]
    ids = torch.randint(2, 320, (B, L), generator=rng(3))
    entered: list[Tensor] = []
    handles = [
        block.register_forward_pre_hook(
            lambda m, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for block in blocks
    ]
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    hidden, calls = block_calls(model.base_model, blocks, ids, wrap_for(model))
    assert torch.equal(hidden, entered[0]) and len(calls) == len(blocks)
    with torch.no_grad():
        for block, call, want in zip(blocks, calls, [*entered[1:], None], strict=True):
            hidden = first_tensor(block(hidden, *call.args, **call.kwargs))
            assert want is None or torch.equal(hidden, want)
        assert all("forward" not in block.__dict__ for block in blocks)
        assert torch.equal(model(ids, use_cache=False).logits, logits)


def test_block_calls_compute_nothing_and_take_blocks_on_meta(tiny_model) -> None:
    model = tiny_model("llama")
    blocks = list(model.model.layers)
    ids = torch.randint(2, 320, (1, 5), generator=rng(0))
    want, calls = block_calls(model.base_model, blocks, ids, lambda h: h)
    for block in blocks:
        block.to("meta")
    hidden, again = block_calls(model.base_model, blocks, ids, lambda h: h)
    assert torch.equal(hidden, want)
    for a, b in zip(calls[1].kwargs["position_embeddings"], again[1].kwargs["position_embeddings"], strict=True):
        assert torch.equal(a, b)


def test_models_that_skip_blocks_are_refused(tiny_model) -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    blocks = list(model.model.layers)
    own = blocks[1]
    model.model.layers = nn.ModuleList([blocks[0], blocks[2]])
    with pytest.raises(StructureError, match="2 of 3 blocks were called"):
        block_calls(model.base_model, [blocks[0], own, blocks[2]], torch.zeros(1, 4, dtype=torch.long), lambda h: h)
    assert all("forward" not in block.__dict__ for block in blocks)


# ------------------------------------------------------------------------------------------------- trace

ATTENTION = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), False)
EXPERTS = [((f"mlp.experts.{e}.gate_proj", f"mlp.experts.{e}.up_proj"), False) for e in range(4)] + [
    ((f"mlp.experts.{e}.down_proj",), False) for e in range(4)
]
GROUPS = {
    "llama": [
        ATTENTION,
        (("self_attn.o_proj",), True),
        (("mlp.gate_proj", "mlp.up_proj"), False),
        (("mlp.down_proj",), True),
    ],
    "opt": [ATTENTION, (("self_attn.out_proj",), True), (("fc1",), False), (("fc2",), True)],
    "falcon": [
        (("self_attention.query_key_value",), False),
        (("self_attention.dense",), True),
        (("mlp.dense_h_to_4h",), False),
        (("mlp.dense_4h_to_h",), True),
    ],
    "gpt_neox": [
        (("attention.query_key_value",), False),
        (("attention.dense",), True),
        (("mlp.dense_h_to_4h",), False),
        (("mlp.dense_4h_to_h",), True),
    ],
    "mixtral": [ATTENTION, (("self_attn.o_proj",), True), *EXPERTS],
    "qwen3_moe": [ATTENTION, (("self_attn.o_proj",), True), *EXPERTS],
    "qwen2_moe": [
        ATTENTION,
        (("self_attn.o_proj",), True),
        (("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"), False),
        (("mlp.shared_expert.down_proj",), False),  # gated before it is added
        *EXPERTS,
    ],
}


def plain(groups: Sequence[Group]) -> list[tuple[tuple[str, ...], bool]]:
    return [(g.names, g.writes) for g in groups]


def leaf_names(groups: Sequence[tuple], leaves: dict[str, str]) -> list[tuple[tuple[str, ...], bool]]:
    """The expected groups with a family's own names of experts' linears."""

    def rename(name: str) -> str:
        head, _, leaf = name.rpartition(".")
        return f"{head}.{leaves.get(leaf, leaf)}" if ".experts." in name else name

    return [(tuple(rename(n) for n in names), writes) for names, writes in groups]


@pytest.mark.parametrize("family", FAMILIES)
def test_trace_finds_shared_inputs_and_writers(tiny_model, family: str) -> None:
    rig = rig_of(tiny_model(family))
    leaves = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"} if family == "mixtral" else {}
    before = {k: v.clone() for k, v in rig.modules[-1].state_dict().items()}
    assert plain(rig.groups(-1)) == leaf_names(GROUPS[family], leaves)
    assert no_hooks_left(rig.modules[-1])
    assert all(torch.equal(v, before[k]) for k, v in rig.modules[-1].state_dict().items())


@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("family", ["llama", "falcon", "gpt_neox", "opt"])
def test_trace_does_not_depend_on_the_weights(tiny_model, family: str, seed: int) -> None:
    rig = rig_of(tiny_model(family, seed=seed), seed)
    for i in range(2):
        assert plain(rig.groups(i)) == GROUPS[family]


@pytest.mark.parametrize(
    "family,changes,writers",
    [
        ("opt", {"do_layer_norm_before": False}, set()),  # a norm follows each addition
        ("gpt_neox", {"use_parallel_residual": False}, {"attention.dense", "mlp.dense_4h_to_h"}),
        ("falcon", {"parallel_attn": False}, {"self_attention.dense", "mlp.dense_4h_to_h"}),
        ("falcon", {"new_decoder_architecture": True}, {"self_attention.dense", "mlp.dense_4h_to_h"}),
        ("llama", {"intermediate_size": 32, "num_key_value_heads": 4}, {"self_attn.o_proj", "mlp.down_proj"}),
    ],
)
def test_writers_of_variants(tiny_model, family: str, changes: dict, writers: set[str]) -> None:
    rig = rig_of(tiny_model(family, **changes))
    assert {g.names[0] for g in rig.groups(0) if g.writes} == writers


@pytest.mark.parametrize("kind", ["Gemma2", "Granite"])
def test_outputs_that_are_normed_or_scaled_first_do_not_write(kind: str) -> None:
    """Gemma 2 norms what attention and MLP return, Granite scales it: the stream does not hold it as it is."""
    import transformers as tf

    common = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 1}
    own = {"head_dim": 8} if kind == "Gemma2" else {"residual_multiplier": 0.22}
    rig = rig_of(build_tiny(getattr(tf, f"{kind}Config")(**common, **heads, **own)))
    assert [g.names for g in rig.groups(0)] == [names for names, _ in GROUPS["llama"]]
    assert not any(g.writes for g in rig.groups(0))


# ------------------------------------------------------------------------------------------------- forwards that stop


class Twice(nn.Module):
    """Calls one linear twice and another in between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, str]:
        return self.a(self.b(self.a(x)) * scale) + x, "more"


@pytest.fixture
def twice() -> Twice:
    torch.manual_seed(0)
    return Twice()


def test_a_linear_called_twice_stops_once(twice: Twice) -> None:
    x, call = torch.randn(2, 3, 8), Call((), {"scale": 2.0})
    assert plain(trace(twice, x, call, ["a", "b"])) == [(("a",), False), (("b",), False)]
    with torch.no_grad(), stopping(twice, ["a", "b"]):
        forward = Forward(twice, x, call, ["a", "b"])
        first, second = forward.advance(), forward.advance()
        assert first is not None and first.name == "a" and first.x is x
        assert second is not None and second.name == "b"
        assert forward.output is None and forward.advance() is None
        assert forward.output is not None and torch.equal(forward.output, twice(x, 2.0)[0])
    assert no_hooks_left(twice)


def test_weights_replaced_at_a_stop_are_used(twice: Twice) -> None:
    x = torch.randn(1, 3, 8)
    with torch.no_grad(), stopping(twice, ["b"]):
        forward = Forward(twice, x, Call((), {}), ["b"])
        forward.advance()
        twice.b.weight = nn.Parameter(torch.zeros(8, 8))
        forward.advance()
        assert forward.output is not None
        assert torch.equal(forward.output, twice.a(torch.zeros(1, 3, 8)) + x)


def test_several_forwards_wait_at_once_and_plain_ones_pass(twice: Twice) -> None:
    xs = [torch.randn(1, 3, 8) for _ in range(3)]
    with torch.no_grad(), stopping(twice, ["a", "b"]):
        forwards = [Forward(twice, x, Call((), {}), ["a", "b"]) for x in xs]
        assert [f.advance().x is x for f, x in zip(forwards, xs, strict=True)] == [True] * 3
        assert torch.equal(twice(xs[0])[0], twice(xs[0])[0])  # hooks let other callers through
        for forward in reversed(forwards):
            assert forward.advance().name == "b" and forward.advance() is None
        assert all(torch.equal(f.output, twice(x)[0]) for f, x in zip(forwards, xs, strict=True))


def test_a_closed_forward_lets_its_tensors_go(twice: Twice) -> None:
    with torch.no_grad(), stopping(twice, ["a", "b"]):
        forward = Forward(twice, torch.randn(1, 3, 8), Call((), {}), ["a", "b"])
        forward.advance()
        stop = forward.advance()
        assert stop is not None and stop.name == "b"
        inner = weakref.ref(stop.x)
        del stop
        gc.collect()
        assert inner() is not None  # the waiting block holds it
        forward.close()
        gc.collect()
        assert inner() is None and forward.output is None
        forward.close()  # closing again, or one that never started, is harmless
        Forward(twice, torch.randn(1, 3, 8), Call((), {}), ["a"]).close()


def test_errors_of_the_block_reach_the_caller(twice: Twice) -> None:
    with stopping(twice, ["a"]):
        forward = Forward(twice, torch.randn(1, 3, 8), Call((), {"scale": "much"}), ["a"])
        forward.advance()
        with pytest.raises(TypeError):
            forward.advance()
    with pytest.raises(StructureError, match="returned dict"):
        first_tensor({"hidden": torch.zeros(1)})
