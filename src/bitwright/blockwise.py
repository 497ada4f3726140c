"""One block after the other: its linears to codes, with calibration or without, as parts that a run keeps.

With calibration, statistics of what every linear reads are taken while the samples go through the block, and what
leaves the block, computed with its quantized weights, enters the next.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.calibrate.capture import Call, Group, block_calls, first_tensor, sharing, trace
from bitwright.calibrate.memory import fits_one_pass
from bitwright.calibrate.simulate import SimulatedLinear
from bitwright.calibrate.stream import Needs, Statistics, Streams, run_block
from bitwright.evidence import Clock, run_record, stored_dtype
from bitwright.models.load import SourceModel
from bitwright.models.structure import Block
from bitwright.numerics import check_finite
from bitwright.plan import Entry, Plan
from bitwright.qtensor import QuantizedTensor
from bitwright.recipe import CALIBRATED
from bitwright.run_folder import RunFolder
from bitwright.smoothing import smooth
from bitwright.solve import choose_splits, install, replace_module, solve_data_free, solve_group
from bitwright.split import InputSplit, SplitTensor

Progress = Callable[[str, int, int, str], None]
# Tokens that go through a block together: enough to keep the multiplications efficient, little enough to stay small.
MICRO_BATCH_TOKENS = 2048


def data_free_blocks(
    source: SourceModel,
    plan: Plan,
    run: RunFolder,
    device: torch.device,
    report: Progress,
    clock: Clock,
    earlier: dict[str, Any],
) -> None:
    blocks = source.structure.blocks
    for index in range(run.finished, len(blocks)):
        report("quantize", index, len(blocks), blocks[index].name)
        done = Done(plan)
        for x in blocks[index].all_linears:
            if x.name in plan.entries:
                W = source.checkpoint.get(f"{x.disk_name}.weight")
                check_finite(f"{x.disk_name}.weight", W)
                done.add(plan.entries[x.name], *solve_data_free(plan.entries[x.name], W.to(device), plan.dtype))
        run.save_part(index, done.tensors, done.records)
        run.save_spent(run_record(clock, device, earlier))
    report("quantize", len(blocks), len(blocks), "")


class Done:
    """Packed tensors and records of one block, as they come."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.tensors: dict[str, Tensor] = {}
        self.records: dict[str, Any] = {}

    def add(self, entry: Entry, tensor: QuantizedTensor | SplitTensor, record: dict[str, Any]) -> None:
        packed = self.plan.format.pack(tensor, entry.scheme, entry.linear.name)
        self.tensors |= {f"{entry.linear.disk_name}.{key}": value for key, value in packed.items()}
        self.records[entry.linear.name] = record

    def note_smoothing(self, smoothed: Mapping[str, Any]) -> None:
        """Add to the records, by linear, what `smooth` says of it."""
        for name, what in smoothed.items():
            self.records[name]["smooth"] = what


# --------------------------------------------------------------------------------------------------- with calibration


@torch.no_grad()
def calibrated_blocks(
    source: SourceModel,
    plan: Plan,
    samples: Tensor,
    run: RunFolder,
    device: torch.device,
    max_memory: str | None,
    clock: Clock,
    report: Progress,
    earlier: dict[str, Any],
) -> None:
    blocks = source.structure.blocks
    compute = torch.float32 if device.type == "cpu" else source.dtype
    with clock.phase("embed"):
        streams, calls = _enter(source, plan, samples, device, compute)
        if run.finished:
            streams = run.load_streams(device)
    known: dict[tuple[str, ...], list[Group]] = {}
    for index in range(run.finished, len(blocks)):
        report("calibrate", index, len(blocks), blocks[index].name)
        done = _one_block(
            source, plan, blocks[index], streams, [call[index] for call in calls], known, compute, max_memory, clock
        )
        with clock.phase("save"):
            run.save_part(index, done.tensors, done.records)
            run.save_streams(index + 1, streams)
            run.save_spent(run_record(clock, device, earlier))
    report("calibrate", len(blocks), len(blocks), "")


def _one_block(
    source: SourceModel,
    plan: Plan,
    block: Block,
    streams: Streams,
    calls: Sequence[Call],
    known: dict[tuple[str, ...], list[Group]],
    compute: torch.dtype,
    max_memory: str | None,
    clock: Clock,
) -> Done:
    """Take the streams through one block while its linears are replaced. known: traces by layout, added to."""
    device = streams.quantized[0].device
    with clock.phase("load"):
        source.unfuse(block.name)
        original = source.materialize(block.name, compute, device)
    done = Done(plan)
    with clock.phase("trace"):
        local, routed = _local_names(block), _routed(block)
        layout = tuple(f"{n}:{original.get_submodule(n).weight.shape}" for n in local)
        if layout not in known:
            known[layout] = trace(original, streams.quantized[0], calls[0], local, routed)
        groups = _calibrated_groups(known[layout], block, plan)
    with clock.phase("smooth"):
        smoothed, moved = smooth(source, original, block, plan, known[layout], streams.quantized, calls)
    done.tensors |= moved
    module = _copy_as_stored(source, original, block, plan)
    with clock.phase("profile"):
        local_entries = {n: plan.entries[f"{block.name}.{n}"] for group in groups for n in group.names}
        splits = choose_splits(groups, local_entries, original, streams.quantized, calls)
    for name, split in splits.items():
        replace_module(module, name, SimulatedLinear.of(module.get_submodule(name), split))
    _install_data_free(block, module, plan, done, groups)
    tokens = sum(h.shape[0] * h.shape[1] for h in streams.quantized)
    with clock.phase("calibrate"):
        run_block(
            block.name,
            module,
            original if streams.reference is not None else None,
            streams,
            calls,
            groups,
            partial(_needs, block=block, plan=plan, splits=splits),
            partial(_solve, block=block, original=original, module=module, plan=plan, done=done, clock=clock),
            one_pass=fits_one_pass(groups, routed, tokens, streams, max_memory, device),
            true_sequential=_sequential(block, plan),
            routed=routed,
            writers=[group.names[0] for group in known[layout] if group.writes],
        )
    source.release(block.name)
    done.note_smoothing(smoothed)
    return done


def _enter(
    source: SourceModel, plan: Plan, samples: Tensor, device: torch.device, compute: torch.dtype
) -> tuple[Streams, list[Sequence[Call]]]:
    """Both streams at the first block, and every block's other arguments per micro-batch."""
    structure = source.structure
    size = max(1, min(len(samples), MICRO_BATCH_TOKENS // samples.shape[1]))
    batches = [batch.to(device) for batch in samples.split(size)]
    base = source.model.base_model
    modules = [source.model.get_submodule(block.name) for block in structure.blocks]
    source.materialize_rest(compute, device)
    source.unfuse(structure.blocks[0].name)
    first = source.materialize(structure.blocks[0].name, compute, device)
    # One real call tells whether blocks return a tensor or a tuple.
    probe, calls = block_calls(base, modules[:1], batches[0][:1], lambda h: h)
    returned = first(probe, *calls[0].args, **calls[0].kwargs)
    first_tensor(returned)
    wrap = partial(_passed_by, rest=len(returned) - 1 if isinstance(returned, tuple) else None)
    source.release(structure.blocks[0].name)
    original: list[Tensor] = []
    every: list[list[Call]] = []
    for batch in batches:
        hidden, calls = block_calls(base, modules, batch, wrap)
        original.append(hidden)
        every.append(sharing(calls, every[0]) if every else calls)
    quantized = list(original)
    if plan.dtype.itemsize < source.dtype.itemsize:
        # The quantized stream starts from the embeddings as they will be stored.
        for p in source.model.parameters():
            if p.device.type != "meta" and p.is_floating_point():
                p.data = p.data.to(plan.dtype).to(p.dtype)
        quantized = [block_calls(base, modules, batch, wrap)[0] for batch in batches]
    source.release_rest()
    return Streams(quantized, original if plan.two_streams else None), every


def _passed_by(hidden: Tensor, rest: int | None) -> Any:
    """What a block that is passed by returns: hidden states, alone or as a tuple with `rest` further values."""
    return hidden if rest is None else (hidden, *[None] * rest)


def _copy_as_stored(source: SourceModel, original: nn.Module, block: Block, plan: Plan) -> nn.Module:
    """A copy of a block whose unquantized tensors are rounded to what will be stored. Weights to be quantized are not
    copied: both modules hold the same until they are replaced."""
    quantized = {f"{x.name}.weight" for x in block.all_linears if x.name in plan.entries}
    named = {f"{block.name}.{name}": p for name, p in original.named_parameters()}
    module = copy.deepcopy(original, {id(p): p for name, p in named.items() if name in quantized})
    for name, p in module.named_parameters():
        full = f"{block.name}.{name}"
        if full not in quantized and p.is_floating_point():
            p.data = p.data.to(stored_dtype(source, source.disk_names(full)[0], plan.dtype)).to(p.dtype)
    return module


def _local_names(block: Block) -> list[str]:
    return [x.name.removeprefix(f"{block.name}.") for x in block.all_linears]


def _routed(block: Block) -> set[str]:
    return {x.name.removeprefix(f"{block.name}.") for stack in block.experts for x in stack.linears}


def _calibrated_groups(groups: Sequence[Group], block: Block, plan: Plan) -> list[Group]:
    """The groups reduced to the linears that calibration solves, and parted where these see their input differently."""
    out = []
    for group in groups:
        parts: dict[Any, list[str]] = {}
        for n in group.names:
            entry = plan.entries.get(f"{block.name}.{n}")
            if entry is not None and entry.algorithm in CALIBRATED:
                parts.setdefault(None if entry.scheme.plain else (entry.scheme, entry.options), []).append(n)
        out += [replace(group, names=tuple(names)) for names in parts.values()]
    return out


def _sequential(block: Block, plan: Plan) -> bool:
    entries = [plan.entries[x.name] for x in block.all_linears if x.name in plan.entries]
    return all(e.options.true_sequential for e in entries if e.algorithm in CALIBRATED)


def _needs(group: Group, block: Block, plan: Plan, splits: Mapping[str, InputSplit]) -> Needs:
    options = [plan.entries[f"{block.name}.{n}"].options for n in group.names]
    return Needs(options[0].sink_weight, any(o.target_strength > 0 for o in options), split=splits.get(group.names[0]))


def _install_data_free(block: Block, module: nn.Module, plan: Plan, done: Done, groups: Sequence[Group]) -> None:
    """Quantize what needs no statistics before the block runs: data-free entries, and linears that calibration never
    calls."""
    reached = {n for group in groups for n in group.names}
    for x in block.all_linears:
        local = x.name.removeprefix(f"{block.name}.")
        entry = plan.entries.get(x.name)
        if entry is None or local in reached:
            continue
        tensor, record = solve_data_free(entry, module.get_submodule(local).weight, plan.dtype)
        if entry.algorithm in CALIBRATED:
            record["fallback"] = "rtn: the block never called this linear on the calibration text"
        install(module, local, tensor)
        done.add(entry, tensor, record)


def _solve(
    group: Group,
    stats: Statistics,
    block: Block,
    original: nn.Module,
    module: nn.Module,
    plan: Plan,
    done: Done,
    clock: Clock,
) -> None:
    with clock.phase("solve"):
        entries = [plan.entries[f"{block.name}.{n}"] for n in group.names]
        weights = {f"{block.name}.{n}": original.get_submodule(n).weight for n in group.names}
        stats.corrections = {f"{block.name}.{n}": c for n, c in stats.corrections.items()}
        for name, (tensor, record) in solve_group(entries, weights, stats, plan.dtype).items():
            install(module, name.removeprefix(f"{block.name}."), tensor)
            done.add(plan.entries[name], tensor, record)
