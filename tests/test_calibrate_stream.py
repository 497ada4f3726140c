"""Calibration streams against ordinary forwards of the same blocks, hooked by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from algorithm_oracles import rng
from calibrate_rig import BATCHES, B, L, no_hooks_left, observed, rig_of
from conftest import FAMILIES
from torch import Tensor, nn

from bitwright.algorithms.rtn import rtn
from bitwright.calibrate.capture import Group, first_tensor
from bitwright.calibrate.stream import Needs, Statistics, Streams, run_block
from bitwright.errors import NumericsError, StructureError
from bitwright.scheme import WeightScheme
from bitwright.split import InputSplit


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
            hidden = [first_tensor(block(h, *c.args, **c.kwargs)) for h, c in zip(hidden, rig.calls_of(i), strict=True)]
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
                weight = reference.get_submodule(linear).weight.detach().double()
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
                        d = target - (present + xs[k] @ weight.T + (0 if bias is None else bias.detach().double()))
                    D += (d * w[k][:, None]).T @ xs[k] / tokens
                assert D.abs().max() > 1e-3
                got = stats.corrections[linear].detach().double()
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
    run_block("layer", block, None, streams, rig.calls_of(0), groups, lambda g: Needs(), keeping(seen), one_pass=False)
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


def test_dead_columns_are_those_that_were_zero_before_rounding(tiny_model: Callable) -> None:
    """What is small beside the other columns of its token has code 0 and leaves no trace in H, and is not dead."""
    rig = rig_of(tiny_model("llama"))
    module = rig.modules[0]
    with torch.no_grad():
        module.input_layernorm.weight[3] = 0.0
        module.input_layernorm.weight[5] = 1e-6
    columns = torch.arange(32)
    split = InputSplit(columns[columns != 8].flip(0), columns[8:9], 4)
    found: list[Statistics] = []
    (group,) = [g for g in rig.groups(0) if "self_attn.q_proj" in g.names]
    run_block(
        "blk",
        module,
        None,
        Streams(list(rig.hidden)),
        rig.calls_of(0),
        [group],
        lambda g: Needs(split=split),
        lambda g, stats: found.append(stats),
        one_pass=True,
        true_sequential=True,
        routed=set(),
        writers=[],
    )
    (stats,) = found
    assert stats.dead is not None
    assert split.order[stats.dead].tolist() == [3]
    assert sorted(split.order[stats.H.diagonal() == 0].tolist()) == [3, 5]
