"""Calibration streams against ordinary forwards of the same blocks, hooked by hand."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from algorithm_oracles import rng
from conftest import FAMILIES, build_tiny
from torch import Tensor, nn

from bitwright.algorithms.rtn import rtn
from bitwright.calibrate.capture import Call, Forward, Group, block_calls, first_tensor, stopping, trace
from bitwright.calibrate.stream import Needs, Statistics, Streams, run_block
from bitwright.errors import NumericsError, StructureError
from bitwright.models.discover import discover
from bitwright.models.experts import unfuse
from bitwright.scheme import WeightScheme

B, L, BATCHES = 2, 9, 3


@dataclass
class Rig:
    """A tiny model with unfused experts, and its blocks' inputs for a few micro-batches."""

    model: Any
    modules: list[nn.Module]
    blocks: tuple[Any, ...]
    hidden: list[Tensor]
    calls: list[list[Call]]

    def names(self, i: int) -> list[str]:
        prefix = self.blocks[i].name + "."
        return [x.name.removeprefix(prefix) for x in self.blocks[i].all_linears]

    def routed(self, i: int) -> set[str]:
        prefix = self.blocks[i].name + "."
        return {x.name.removeprefix(prefix) for stack in self.blocks[i].experts for x in stack.linears}

    def calls_of(self, i: int) -> list[Call]:
        return [call[i] for call in self.calls]

    def groups(self, i: int) -> list[Group]:
        return trace(self.modules[i], self.hidden[0], self.calls[0][i], self.names(i), self.routed(i))


def rig_of(model: Any, seed: int = 0) -> Rig:
    structure = discover(model)
    modules = [model.get_submodule(block.name) for block in structure.blocks]
    for module, block in zip(modules, structure.blocks, strict=True):
        for stack in block.experts:
            unfuse(module, stack)
    ids = torch.randint(2, 320, (BATCHES, B, L), generator=rng(seed))
    with torch.no_grad():
        passes = [block_calls(model.base_model, modules, batch, wrap_for(model)) for batch in ids]
    return Rig(model, modules, structure.blocks, [h for h, _ in passes], [calls for _, calls in passes])


def wrap_for(model: Any) -> Callable[[Tensor], Any]:
    """Blocks of these families return a tuple."""
    tuples = ("Falcon", "OPT")
    return (lambda h: (h, None)) if type(model).__name__.startswith(tuples) else (lambda h: h)


@torch.no_grad()
def observed(block: nn.Module, hidden: Tensor, call: Call, names: Sequence[str]) -> tuple[Tensor, dict, dict]:
    """An ordinary forward of the block: its output, and the inputs and outputs of the submodules `names`."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = []
    for name in names:

        def hook(module: nn.Module, args: tuple, output: Any, name: str = name) -> None:
            inputs[name], outputs[name] = args[0], output

        handles.append(block.get_submodule(name).register_forward_hook(hook))
    result = first_tensor(block(hidden, *call.args, **call.kwargs))
    for handle in handles:
        handle.remove()
    return result, inputs, outputs


def rounding(block: nn.Module) -> Callable[[Group, Statistics], None]:
    """A solver that makes large errors: three bits, to the nearest."""

    def solve(group: Group, stats: Statistics) -> None:
        for name in group.names:
            linear = block.get_submodule(name)
            tensor = rtn(linear.weight.detach(), WeightScheme(3))
            linear.weight = nn.Parameter(tensor.dequantize(linear.weight.dtype), requires_grad=False)

    return solve


def keeping(seen: dict[str, Statistics], then: Callable[[Group, Statistics], None] | None = None) -> Callable:
    """A solver that notes the statistics by the group's first linear."""

    def solve(group: Group, stats: Statistics) -> None:
        seen[group.names[0]] = stats
        if then is not None:
            then(group, stats)

    return solve


def idle(group: Group, stats: Statistics) -> None:
    """A solver that leaves the weights alone."""


def no_hooks_left(block: nn.Module) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())


# ------------------------------------------------------------------------------------------------- block_calls


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
        block_calls(model.base_model, [blocks[0], own, nn.Identity()], torch.zeros(1, 4, dtype=torch.long), lambda h: h)
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
    assert plain(trace(twice, x, call, ["a", "b"])) == [(("a",), True), (("b",), False)]
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
        x = torch.randn(1, 3, 8)
        watched = weakref.ref(x)
        forward = Forward(twice, x, Call((), {}), ["a", "b"])
        stop = forward.advance()
        assert stop is not None
        forward.close()
        del x, stop
        gc.collect()
        assert watched() is None or forward.output is None
        forward.close()  # closing again, or one that never started, is harmless
        Forward(twice, torch.randn(1, 3, 8), Call((), {}), ["a"]).close()
    del forward
    gc.collect()
    assert watched() is None


def test_errors_of_the_block_reach_the_caller(twice: Twice) -> None:
    with stopping(twice, ["a"]):
        forward = Forward(twice, torch.randn(1, 3, 8), Call((), {"scale": "much"}), ["a"])
        forward.advance()
        with pytest.raises(TypeError):
            forward.advance()
    with pytest.raises(StructureError, match="returned dict"):
        first_tensor({"hidden": torch.zeros(1)})


# ------------------------------------------------------------------------------------------------- run_block


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_streams_of_an_idle_solver_are_the_plain_forward(tiny_model, family: str, one_pass: bool) -> None:
    rig = rig_of(tiny_model(family))
    streams = Streams(list(rig.hidden), list(rig.hidden))
    hidden = list(rig.hidden)
    for i, block in enumerate(rig.modules):
        reference = copy.deepcopy(block)
        run_block(
            rig.blocks[i].name,
            block,
            reference,
            streams,
            rig.calls_of(i),
            rig.groups(i),
            lambda g: Needs(),
            idle,
            one_pass=one_pass,
            routed=rig.routed(i),
        )
        with torch.no_grad():
            hidden = [
                first_tensor(block(h, *c.args, **c.kwargs)) for h, c in zip(hidden, rig.calls_of(i), strict=True)
            ]
        assert streams.reference is not None
        for h, ours, theirs in zip(hidden, streams.quantized, streams.reference, strict=True):
            assert torch.equal(ours, h) and torch.equal(theirs, h)
        assert no_hooks_left(block) and no_hooks_left(reference)
        assert not any(h.requires_grad for h in streams.quantized)


def row_weights(x: Tensor, sink_weight: float, routed: bool) -> Tensor:
    """What each row of x [rows, K] weighs: a sequence's first token more, unless rows are a router's subset."""
    weight = torch.ones(len(x), dtype=torch.float64)
    if not routed:
        weight[::L] = sink_weight
    return weight


@pytest.mark.parametrize("sink_weight", [1.0, 9.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_ordinary_forwards(tiny_model, family: str, sink_weight: float) -> None:
    """Every group is calibrated on inputs made by quantized predecessors. What reaches a group depends on earlier
    groups only, so one ordinary forward of the finished block shows the inputs of all."""
    rig = rig_of(tiny_model(family))
    streams = Streams(list(rig.hidden), [h + 0.3 * torch.randn(h.shape, generator=rng(1)) for h in rig.hidden])
    for i, block in enumerate(rig.modules):
        reference, groups = copy.deepcopy(block), rig.groups(i)
        entered = [list(streams.quantized), list(streams.reference or [])]
        seen: dict[str, Statistics] = {}
        run_block(
            rig.blocks[i].name,
            block,
            reference,
            streams,
            rig.calls_of(i),
            groups,
            lambda g: Needs(sink_weight, correction=True),
            keeping(seen, rounding(block)),
            one_pass=True,
            routed=rig.routed(i),
        )
        assert list(seen) == [g.names[0] for g in groups]
        leaders = [g.names[0] for g in groups]
        ours, theirs = (
            [observed(module, h, c, leaders) for h, c in zip(hs, rig.calls_of(i), strict=True)]
            for module, hs in zip((block, reference), entered, strict=True)
        )
        for k in range(BATCHES):
            assert torch.equal(streams.quantized[k], ours[k][0])
            assert torch.equal(streams.reference[k], theirs[k][0])
        earlier: list[str] = []  # writers before this group
        for group in groups:
            name, stats = group.names[0], seen[group.names[0]]
            routed = name in rig.routed(i)
            K = block.get_submodule(name).weight.shape[1]
            xs, ys = ([got[1][name].reshape(-1, K).double() for got in stream] for stream in (ours, theirs))
            w = [row_weights(x, sink_weight, routed) for x in xs]
            tokens = sum(len(x) for x in xs)
            assert stats.tokens == tokens and (routed or tokens == BATCHES * B * L)
            H = sum((x * v[:, None]).T @ x for x, v in zip(xs, w, strict=True)) / max(1, tokens)
            torch.testing.assert_close(stats.H.double(), H, rtol=1e-4, atol=1e-5 * float(H.diagonal().mean()))
            if routed:
                assert stats.corrections == {}
                continue
            assert set(stats.corrections) == set(group.names)
            for linear in group.names:
                weight = reference.get_submodule(linear).weight.double()
                D = torch.zeros(weight.shape, dtype=torch.float64)
                for k in range(BATCHES):
                    d = (ys[k] - xs[k]) @ weight.T
                    if group.writes:  # what the stream after this linear should be, minus what it will be
                        wide = d.shape[-1]
                        target = entered[1][k].reshape(-1, wide).double()
                        present = entered[0][k].reshape(-1, wide).double()
                        for writer in [*earlier, name]:
                            target = target + theirs[k][2][writer].reshape(-1, wide).double()
                        for writer in earlier:
                            present = present + ours[k][2][writer].reshape(-1, wide).double()
                        bias = reference.get_submodule(linear).bias
                        d = target - (present + xs[k] @ weight.T + (0 if bias is None else bias.double()))
                    D += (d * w[k][:, None]).T @ xs[k] / tokens
                assert D.abs().max() > 1e-3
                got = stats.corrections[linear].double()
                torch.testing.assert_close(got, D, rtol=1e-3, atol=1e-5 * float(D.abs().max()) + 1e-6)
            if group.writes:
                earlier.append(name)
        if {g.names[0] for g in groups if g.writes} >= {"mlp.down_proj"} or family in ("opt", "falcon", "gpt_neox"):
            total = entered[1][0] + sum(theirs[0][2][n].reshape(entered[1][0].shape) for n in earlier)
            torch.testing.assert_close(total, theirs[0][0])  # nothing else is added to the stream


def test_drift_is_the_difference_of_the_residual_streams(tiny_model) -> None:
    """The same for Llama with the stream itself: what enters the second norm, and what leaves the block."""
    rig = rig_of(tiny_model("llama"))
    block, reference = rig.modules[0], copy.deepcopy(rig.modules[0])
    start = [h + 0.3 * torch.randn(h.shape, generator=rng(1)) for h in rig.hidden]
    seen: dict[str, Statistics] = {}
    run_block(
        "layer",
        block,
        reference,
        Streams(list(rig.hidden), list(start)),
        rig.calls_of(0),
        rig.groups(0),
        lambda g: Needs(4.0, True),
        keeping(seen, rounding(block)),
        one_pass=False,
    )
    norm, o, down = "post_attention_layernorm", "self_attn.o_proj", "mlp.down_proj"
    wanted = {o: torch.zeros(32, 32).double(), down: torch.zeros(32, 48).double()}
    for h, r, call in zip(rig.hidden, start, rig.calls_of(0), strict=True):
        _, x, _ = observed(block, h, call, [norm, o, down])
        end, y, _ = observed(reference, r, call, [norm, o, down])
        for name, before, target in ((o, h, y[norm]), (down, x[norm], end)):
            weight = reference.get_submodule(name).weight.double()
            rows = x[name].reshape(B * L, -1).double()
            d = (target - before).reshape(B * L, -1).double() - rows @ weight.T
            wanted[name] += (d * row_weights(rows, 4.0, False)[:, None]).T @ rows / (BATCHES * B * L)
    for name, D in wanted.items():
        torch.testing.assert_close(seen[name].corrections[name].double(), D, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt", "falcon", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("reference", [True, False])
def test_one_pass_and_several_give_the_same_bits(tiny_model, family: str, reference: bool) -> None:
    results = []
    for one_pass in (True, False):
        rig = rig_of(tiny_model(family))
        noisy = [h + 0.3 * torch.randn(h.shape, generator=rng(1)) for h in rig.hidden]
        streams = Streams(list(rig.hidden), noisy if reference else None)
        found: list[Tensor] = []
        for i, block in enumerate(rig.modules):
            seen: dict[str, Statistics] = {}
            run_block(
                "layer",
                block,
                copy.deepcopy(block) if reference else None,
                streams,
                rig.calls_of(i),
                rig.groups(i),
                lambda g: Needs(16.0, True),
                keeping(seen, rounding(block)),
                one_pass=one_pass,
                routed=rig.routed(i),
            )
            for name, stats in seen.items():
                found += [stats.H, torch.tensor(stats.tokens), *stats.corrections.values()]
                assert bool(stats.corrections) == (reference and name not in rig.routed(i))
            found += [p.detach() for p in block.parameters()]
        found += streams.quantized + (streams.reference or [])
        results.append(found)
    assert len(results[0]) == len(results[1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_first_tokens_weigh_exactly_what_was_asked(tiny_model) -> None:
    """H(w) - H(1) = (w - 1) * the sum over first tokens alone."""
    seen: list[dict[str, Statistics]] = []
    for weight in (1.0, 16.0):
        rig = rig_of(tiny_model("llama"))
        seen.append({})
        run_block(
            "layer",
            rig.modules[0],
            None,
            Streams(list(rig.hidden)),
            rig.calls_of(0),
            rig.groups(0),
            lambda g, weight=weight: Needs(weight),
            keeping(seen[-1]),
            one_pass=True,
        )
    rig = rig_of(tiny_model("llama"))
    for name in seen[0]:
        first = torch.cat(
            [
                observed(rig.modules[0], h, c, [name])[1][name][:, 0].double()
                for h, c in zip(rig.hidden, rig.calls_of(0), strict=True)
            ]
        )
        assert len(first) == BATCHES * B
        want = 15 * first.T @ first / (BATCHES * B * L)
        got = seen[1][name].H.double() - seen[0][name].H.double()
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * float(seen[1][name].H.abs().max()))


def test_an_expert_that_sees_every_token_has_no_first_tokens(tiny_model) -> None:
    """With all experts chosen, as many rows come as there are tokens, but not in their order."""
    rig = rig_of(tiny_model("mixtral", num_experts_per_tok=4))
    seen: list[dict[str, Statistics]] = [{}, {}]
    for into, weight in zip(seen, (1.0, 16.0), strict=True):
        run_block(
            "layer",
            rig.modules[0],
            None,
            Streams(list(rig.hidden)),
            rig.calls_of(0),
            rig.groups(0),
            lambda g, weight=weight: Needs(weight),
            keeping(into),
            one_pass=True,
            routed=rig.routed(0),
        )
    for name in seen[0]:
        assert seen[0][name].tokens == BATCHES * B * L
        assert torch.equal(seen[0][name].H, seen[1][name].H) == (name in rig.routed(0))


def test_tokens_of_experts_add_up(tiny_model) -> None:
    rig = rig_of(tiny_model("mixtral"))
    seen: dict[str, Statistics] = {}
    run_block(
        "layer",
        rig.modules[0],
        None,
        Streams(list(rig.hidden)),
        rig.calls_of(0),
        rig.groups(0),
        lambda g: Needs(),
        keeping(seen),
        one_pass=True,
        routed=rig.routed(0),
    )
    counts = [seen[f"mlp.experts.{e}.w1"].tokens for e in range(4)]
    assert sum(counts) == 2 * BATCHES * B * L
    assert counts == [seen[f"mlp.experts.{e}.w2"].tokens for e in range(4)]


def test_part_of_a_group_and_some_linears_only(tiny_model) -> None:
    """Linears that nobody solves are run through; a group may be led by any of its members."""
    rig = rig_of(tiny_model("llama"))
    seen: dict[str, Statistics] = {}
    groups = [Group(("self_attn.v_proj",), False), Group(("mlp.down_proj",), True)]
    streams = Streams(list(rig.hidden))
    block = rig.modules[0]
    run_block(
        "layer", block, None, streams, rig.calls_of(0), groups, lambda g: Needs(), keeping(seen), one_pass=False
    )
    out, x, _ = observed(block, rig.hidden[0], rig.calls_of(0)[0], ["self_attn.q_proj"])
    assert torch.equal(streams.quantized[0], out)
    assert set(seen) == {"self_attn.v_proj", "mlp.down_proj"}
    assert x["self_attn.q_proj"].shape[-1] == seen["self_attn.v_proj"].H.shape[0]


def test_sixteen_bit_blocks_gather_in_float32(tiny_model) -> None:
    rig = rig_of(tiny_model("llama").to(torch.bfloat16))
    seen: dict[str, Statistics] = {}
    block = rig.modules[0]
    run_block(
        "layer",
        block,
        copy.deepcopy(block),
        Streams(list(rig.hidden), list(rig.hidden)),
        rig.calls_of(0),
        rig.groups(0),
        lambda g: Needs(1.0, True),
        keeping(seen),
        one_pass=True,
    )
    rows = torch.cat(
        [
            observed(block, h, c, ["mlp.down_proj"])[1]["mlp.down_proj"].reshape(-1, 48)
            for h, c in zip(rig.hidden, rig.calls_of(0), strict=True)
        ]
    )
    assert rows.dtype == torch.bfloat16 and seen["mlp.down_proj"].H.dtype == torch.float32
    want = rows.double().T @ rows.double() / len(rows)
    torch.testing.assert_close(seen["mlp.down_proj"].H.double(), want, rtol=1e-5, atol=1e-6)
    assert not seen["mlp.down_proj"].corrections["mlp.down_proj"].any()


# ------------------------------------------------------------------------------------------------- trouble


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e25])
def test_activations_that_are_not_finite_name_their_layer(tiny_model, bad: float, one_pass: bool) -> None:
    rig = rig_of(tiny_model("llama"))
    block = rig.modules[1]
    with torch.no_grad():
        block.mlp.up_proj.weight[3, 4] = bad  # the squares of 1e25 overflow float32
    groups = rig_of(tiny_model("llama")).groups(1)
    with pytest.raises(NumericsError, match=r"entering model\.layers\.1\.mlp\.down_proj hold NaN or Inf"):
        run_block(
            rig.blocks[1].name,
            block,
            None,
            Streams(list(rig.hidden)),
            rig.calls_of(1),
            groups,
            lambda g: Needs(),
            idle,
            one_pass=one_pass,
        )
    assert no_hooks_left(block)
    with torch.no_grad():
        block.mlp.up_proj.weight[3, 4] = 0.0
        out = block(rig.hidden[0], *rig.calls_of(1)[0].args, **rig.calls_of(1)[0].kwargs)
    assert torch.isfinite(first_tensor(out)).all()


def test_all_members_of_a_group_are_named(tiny_model) -> None:
    rig = rig_of(tiny_model("llama"))
    hidden = [h.clone() for h in rig.hidden]
    hidden[1][0, 3] = float("nan")
    with pytest.raises(NumericsError, match=r"model\.layers\.0\.self_attn\.q_proj, .*k_proj, .*v_proj hold NaN"):
        run_block(
            rig.blocks[0].name,
            rig.modules[0],
            None,
            Streams(hidden),
            rig.calls_of(0),
            rig.groups(0),
            lambda g: Needs(),
            idle,
            one_pass=True,
        )


@pytest.mark.parametrize("one_pass", [True, False])
def test_calls_out_of_order_are_refused(tiny_model, one_pass: bool) -> None:
    rig = rig_of(tiny_model("llama"))
    groups = rig.groups(0)
    for wrong, message in (
        ([groups[1], groups[0]], r"called self_attn\.q_proj where self_attn\.o_proj was expected"),
        ([*groups, Group(("input_layernorm",), False)], r"input_layernorm"),
    ):
        with pytest.raises((StructureError, ValueError), match=message):
            run_block(
                "layer",
                rig.modules[0],
                None,
                Streams(list(rig.hidden)),
                rig.calls_of(0),
                wrong,
                lambda g: Needs(),
                idle,
                one_pass=one_pass,
            )
        assert no_hooks_left(rig.modules[0])
