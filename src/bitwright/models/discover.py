"""What is in a model, found by structure: decoder blocks, linears, expert stacks, routers, embeddings.

No model is known by name. The decoder blocks are the nn.ModuleList that holds most matrix weights; an expert stack is a
module with two 3-D parameters whose shapes fit gate/up and down; a router is the matrix beside a stack with one row
per expert. What is found is either complete or an error: matrices that nothing here understands (Conv1D of GPT-2,
transposed or interleaved expert stacks) raise StructureError, because a job that leaves most of a model out in
silence is worse than none. What is left out on purpose stands in the result with its reason.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor, nn

from bitwright.errors import StructureError
from bitwright.models.naming import expert_leaves
from bitwright.models.structure import Block, ExpertStack, Kept, Linear, Structure, describe

__all__ = ["Block", "ExpertStack", "Kept", "Linear", "Structure", "describe", "discover"]

# Matrices inside the blocks that are neither linears nor of a known other kind may hold at most this share of the
# matrix weights (positional biases, state matrices); beyond it, the model is not understood.
_MAX_UNKNOWN_SHARE = 0.05


def discover(model: nn.Module) -> Structure:
    """Structure of a transformers causal LM; its parameters may be on meta. StructureError if it is not understood.

    `disk_name` of every linear is set to its module path; `load.open_model` replaces it by the real one.
    """
    blocks_name, block_list = _block_list(model)
    hidden = _hidden_size(model)
    blocks = tuple(_block(model, f"{blocks_name}.{i}", m, hidden) for i, m in enumerate(block_list))
    if not any(block.all_linears for block in blocks):
        raise StructureError(f"{blocks_name}: no linear found in its {len(blocks)} blocks; nothing could be quantized")
    _refuse_shared(model, blocks)
    paths = {id(m): name for name, m in model.named_modules()}
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if embedding is None or id(embedding) not in paths or getattr(embedding, "weight", None) is None:
        raise StructureError(
            f"{type(model).__name__}: no input embedding found; only causal language models are supported"
        )
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head_name = None if head is None else paths.get(id(head))
    tied = head is not None and head.weight is embedding.weight
    others = _others(model, blocks_name, paths[id(embedding)], head_name, tied)
    return Structure(
        model_class=type(model).__name__,
        blocks_name=blocks_name,
        blocks=blocks,
        embedding=paths[id(embedding)],
        embedding_shape=tuple(embedding.weight.shape),
        lm_head=head_name,
        head=_linear(head_name, head) if head_name is not None and isinstance(head, nn.Linear) else None,
        tied=tied,
        others=others,
        parameters=sum(p.numel() for p in model.parameters()),
    )


def _linear(name: str, module: nn.Linear) -> Linear:
    N, K = module.weight.shape
    return Linear(name, N, K, module.bias is not None, type(module).__name__, disk_name=name)


def _matrix_weights(module: nn.Module) -> int:
    """Values of all linears and 3-D parameters inside a module."""
    total = 0
    for m in module.modules():
        for p in m.parameters(recurse=False):
            if (p.ndim == 2 and isinstance(m, nn.Linear)) or (p.ndim == 3 and not _is_convolution(m)):
                total += p.numel()
    return total


def _is_matrix(p: Tensor) -> bool:
    """Two or more dimensions that are real: [1, 1, C] scales and [1, E] offsets are vectors."""
    return sum(size > 1 for size in p.shape) >= 2


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The outermost ModuleList among those that hold most matrix weights; its modules must be of one class."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    best_name, best, most = "", None, 0
    for name, candidate in lists:  # outer lists come first, so a tie keeps the outermost
        weights = _matrix_weights(candidate)
        if weights > most:
            best_name, best, most = name, candidate, weights
    if best is None:
        found = Counter(type(m).__name__ for m in model.modules() for p in m.parameters(recurse=False) if p.ndim >= 2)
        held = ", ".join(f"{n} {kind}" for kind, n in found.most_common(4)) or "nothing"
        raise StructureError(
            f"{type(model).__name__}: no list of blocks with nn.Linear layers found (matrices are held by: {held}); "
            "models built from other layers, such as GPT-2's Conv1D, are not supported"
        )
    classes = sorted({type(m).__name__ for m in best})
    if len(classes) > 1:
        raise StructureError(
            f"{best_name}: its {len(best)} blocks are of different classes ({', '.join(classes)}), which receive "
            "different inputs; only models whose decoder blocks are of one class are supported"
        )
    return best_name, best


def _hidden_size(model: nn.Module) -> int | None:
    """Width of what goes from block to block: as the config states it (embeddings may be narrower), else that of the
    embedding."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    stated = getattr(config, "hidden_size", None)
    if isinstance(stated, int):
        return stated
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(embedding, "weight", None)
    return None if weight is None else weight.shape[-1]


def _block(model: nn.Module, name: str, block: nn.Module, hidden: int | None) -> Block:
    stacks = {path: m for path, m in block.named_modules() if _has_stack(m)}
    experts = tuple(_stack(model, f"{name}.{path}", path, m) for path, m in stacks.items())
    lists = {path: m for path, m in block.named_modules() if _is_expert_list(m)}
    routers = _routers(block, {p: s.num_experts for p, s in zip(stacks, experts, strict=True)})
    routers |= _routers(block, {path: len(m) for path, m in lists.items()})
    linears: list[Linear] = []
    kept: list[Kept] = []
    vector_params = unknown = 0
    for path, module in block.named_modules():
        if path in stacks:
            continue
        for leaf, p in module.named_parameters(recurse=False):
            full = ".".join(part for part in (name, path, leaf) if part)
            if p.ndim < 2 or (not _is_matrix(p) and not isinstance(module, nn.Linear)):
                vector_params += p.numel()
            elif path in routers:
                kept.append(Kept(full, tuple(p.shape), "router: its outputs choose the experts"))
            elif isinstance(module, nn.Linear):
                if p.shape[0] == 1:
                    kept.append(Kept(full, tuple(p.shape), "a gate with one output: nothing to gain"))
                else:
                    linears.append(_linear(f"{name}.{path}", module))
            elif _is_convolution(module):
                kept.append(Kept(full, tuple(p.shape), "a convolution kernel"))
            elif isinstance(module, nn.Embedding):
                kept.append(Kept(full, tuple(p.shape), "an embedding inside the block"))
            else:
                unknown += p.numel()
                kept.append(Kept(full, tuple(p.shape), f"a {p.ndim}-D parameter of {type(module).__name__}, no linear"))
    known = sum(x.numel for x in linears) + sum(x.numel for s in experts for x in s.linears)
    if unknown > _MAX_UNKNOWN_SHARE * (known + unknown):
        odd = [k for k in kept if k.reason.endswith("no linear")]
        raise StructureError(
            f"{name}: {100 * unknown / (known + unknown):.0f} % of its matrix weights are in parameters that are no "
            f"linears (first {odd[0].name} {list(odd[0].shape)}: {odd[0].reason}); this model is not supported"
        )
    after = {f"{name}.{path}" for path in _after_activation(block, hidden)}
    linears = [replace(x, after_activation=x.name in after) for x in linears]
    router_names = tuple(k.name for k in kept if k.reason.startswith("router"))
    return Block(name, type(block).__name__, tuple(linears), experts, router_names, tuple(kept), vector_params)


def _has_stack(module: nn.Module) -> bool:
    """Whether a module owns 3-D weights that could be expert matrices."""
    return (
        not _is_convolution(module)
        and sum(p.ndim == 3 and _is_matrix(p) for p in module.parameters(recurse=False)) >= 2
    )


def _stack(model: nn.Module, name: str, path: str, module: nn.Module) -> ExpertStack:
    """The linears inside a fused expert module; StructureError unless its layout is the one `UnfusedExperts` runs."""
    kind = type(module).__name__

    def refuse(why: str) -> StructureError:
        return StructureError(f"{name} ({kind}): {why}; this expert stack is not supported")

    own = list(module.named_parameters(recurse=False))
    shapes = ", ".join(f"{leaf} {list(p.shape)}" for leaf, p in own)
    if len(own) != 2 or any(p.ndim != 3 for _, p in own):
        raise refuse(f"expected two 3-D parameters, found {shapes}")
    if list(module.children()) and any(True for c in module.children() for _ in c.parameters()):
        raise refuse("it holds further modules with parameters")
    (up_leaf, up), (down_leaf, down) = own
    E, rows, hidden = up.shape
    inner = down.shape[2]
    gated = rows == 2 * inner
    if down.shape[0] != E or down.shape[1] != hidden or rows not in (inner, 2 * inner):
        raise refuse(f"{shapes} are not gate/up [E, 2I or I, H] and down [E, H, I] (transposed stacks are not)")
    # Set by transformers on every experts class whose forward follows the common contract.
    contract = {"is_transposed": False, "is_concatenated": True, "has_bias": False, "has_gate": gated}
    for flag, wanted in contract.items():
        value = getattr(module, flag, None)
        if value is not wanted:
            raise refuse(f"{flag} is {value}, expected {wanted}")
    if getattr(module, "has_post_expert_norm", False):
        raise refuse("it normalises every expert's output")
    upper = expert_leaves(model, f"{name}.{up_leaf}", kind)
    lower = expert_leaves(model, f"{name}.{down_leaf}", kind)
    if len(upper) != 1 + gated or len(lower) != 1:
        raise refuse(f"on disk an expert is made of {upper + lower}")

    def linears(leaf: str, N: int, K: int, after: bool = False) -> tuple[Linear, ...]:
        names = [f"{name}.{e}.{leaf}" for e in range(E)]
        return tuple(Linear(n, N, K, False, "Linear", disk_name=n, after_activation=after) for n in names)

    gate = linears(upper[0], inner, hidden) if gated else ()
    down = linears(lower[0], hidden, inner, after=True)
    return ExpertStack(name, path, kind, E, gate, linears(upper[-1], inner, hidden), down)


def _after_activation(block: nn.Module, hidden: int | None) -> set[str]:
    """Paths of the linears that read the output of an activation function.

    They are found beside it: in a module that owns an activation and linears, those [hidden, I] for which another maps
    there, [I, hidden], or [2I, hidden] where gate and up are one. Where I is the hidden size, shapes do not tell which
    way a matrix goes, and the last one defined is taken.
    """
    found = set()
    for path, module in block.named_modules():
        own = {leaf: m for leaf, m in module.named_children() if isinstance(m, nn.Linear)}
        if len(own) < 2 or not any(_is_activation(m) for m in module.children()):
            continue
        shapes = {leaf: tuple(m.weight.shape) for leaf, m in own.items()}
        back = [
            leaf
            for leaf, (N, K) in shapes.items()
            if hidden == N and any(shapes[other] in ((K, N), (2 * K, N)) for other in shapes if other != leaf)
        ]
        certain = [leaf for leaf in back if shapes[leaf][0] != shapes[leaf][1]]
        found |= {f"{path}.{leaf}" if path else leaf for leaf in certain or back[-1:]}
    return found


def _is_activation(module: nn.Module) -> bool:
    """Whether a module without parameters or children is a nonlinear function of each element: asked, not named."""
    if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
        return False
    if next(module.children(), None) is not None:
        return False
    x = torch.tensor([-2.0, -0.5, 0.25, 1.0], device="cpu")
    try:
        y, twice, negated = module(x), module(2 * x), module(-x)
        whole = torch.stack([module(x[i]) for i in range(len(x))])
    except Exception:  # whatever a module that wants other arguments raises
        return False
    if not isinstance(y, Tensor) or y.shape != x.shape or not torch.allclose(y, whole):
        return False
    return not (torch.allclose(twice, 2 * y) and torch.allclose(negated, -y))


def _is_expert_list(module: nn.Module) -> bool:
    """A ModuleList of alike modules with linears: experts that were never fused."""
    if not isinstance(module, nn.ModuleList) or len(module) < 2 or len({type(m) for m in module}) > 1:
        return False
    return all(any(isinstance(m, nn.Linear) for m in child.modules()) for child in module)


def _routers(block: nn.Module, experts: dict[str, int]) -> set[str]:
    """Paths of the modules whose only matrix has one row per expert, beside the experts or, failing that, anywhere
    directly under the block. A shared expert is no router even where its width equals the number of experts: it
    holds several matrices."""
    found: set[str] = set()
    for path, count in experts.items():
        parent_path = path.rpartition(".")[0]
        for root in dict.fromkeys((parent_path, "")):
            near = set()
            for child_name, child in block.get_submodule(root).named_children():
                child_path = f"{root}.{child_name}" if root else child_name
                if path == child_path or path.startswith(child_path + "."):
                    continue
                owners = [
                    (p, m) for p, m in child.named_modules() for w in m.parameters(recurse=False) if _is_matrix(w)
                ]
                if len(owners) == 1 and any(
                    w.ndim == 2 and w.shape[0] == count and count > 1 for w in owners[0][1].parameters(recurse=False)
                ):
                    near.add(f"{child_path}.{owners[0][0]}" if owners[0][0] else child_path)
            found |= near
            if near:
                break
    return found


def _refuse_shared(model: nn.Module, blocks: tuple[Block, ...]) -> None:
    """StructureError if one weight serves two linears: quantizing it twice would spoil it."""
    seen: dict[int, str] = {}
    for block in blocks:
        for linear in block.linears:
            weight = id(model.get_submodule(linear.name).weight)
            if weight in seen:
                raise StructureError(
                    f"{linear.name} and {seen[weight]} share one weight; models that share linears between blocks "
                    "are not supported"
                )
            seen[weight] = linear.name


def _others(model: nn.Module, blocks_name: str, embedding: str, head: str | None, tied: bool) -> tuple[Kept, ...]:
    """Matrices outside the blocks with the reason why they stay."""
    kept = []
    for path, module in model.named_modules():
        if path == blocks_name or path.startswith(blocks_name + "."):
            continue
        for leaf, p in module.named_parameters(recurse=False):
            if p.ndim < 2:
                continue
            if path == embedding:
                reason = "the input embedding" + (", tied to the output head" if tied else "")
            elif path == head:
                reason = "the output head" + (", tied to the input embedding" if tied else "")
            elif isinstance(module, nn.Embedding):
                reason = "another embedding"
            else:
                reason = "outside the decoder blocks"
            kept.append(Kept(f"{path}.{leaf}" if path else leaf, tuple(p.shape), reason))
    return tuple(kept)
