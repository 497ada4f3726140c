"""compressed-tensors: the format that transformers, vLLM and SGLang load with no bitwright installed.

Weight-only schemes are written as `pack-quantized` (layout in `dense`), w8a8 as `int-quantized` (int8 weight [N, K],
scale [N, 1], activations quantized per token at run time). What decides who can load a folder is its config, and the
rules below were found by loading with transformers 5.23 + compressed-tensors 0.20 and by reading vLLM's loader:

* A target is matched exact name first, then regex, then class. vLLM tries the class *before* it takes fused layers
  (q/k/v) apart, so "Linear" beside a second scheme inside the blocks would claim all of them: "Linear" is written only
  when one scheme covers the blocks, patterns otherwise. "Linear" also claims every linear that `ignore` forgets.
* transformers takes the experts' scheme from the first group whose pattern mentions them, else from the first group
  with a class target, and the dense scheme from the first group: the largest group comes first.
* A module outside the blocks (lm_head) has to be named; vLLM's head is no "Linear".
* A quantized embedding fails to load in transformers, as does a quantized lm_head tied to one.

Reading accepts other writers' checkpoints: 3-bit words padded to ten values (before 0.18), unpacked int8 weights,
per-tensor scales, groups in activation order (`weight_g_idx`, written before 0.20; columns are sorted by group and the
tensor keeps their `order`). What would be computed wrongly (rotations, quantized KV caches, static activation scales)
is refused. Activation order is read, not written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import FormatError, SchemeError
from bitwright.formats import dense, targets
from bitwright.packing import pack_rows, packed_words
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import Scheme, WeightScheme
from bitwright.split import SplitTensor

NAME = "compressed-tensors"
WRITTEN_VERSION = "0.20.0"  # the release whose layout is written; before 0.18, 3-bit words were padded

PACK_QUANTIZED = "pack-quantized"
INT_QUANTIZED = "int-quantized"
MIXED = "mixed-precision"
READ_FORMATS = (PACK_QUANTIZED, INT_QUANTIZED, "naive-quantized", MIXED)

LINEAR = "Linear"
EMBEDDING = "Embedding"
_INT8_WEIGHT = "weight"
_GROUP_INDEX = "weight_g_idx"
_PADDED_PER_WORD = 10  # 3-bit values in a word before 0.18


def can_express(scheme: Scheme, K: int, class_name: str = LINEAR) -> str | None:
    """None if a width-K module of this class can be stored so that others load it, else the reason and the way out."""
    if not scheme.plain:
        return f"{scheme}: no reader takes outlier columns, rotations, 2:4 or such activations; use native"
    g = scheme.weight.group_size
    if g is not None and K % g:
        divisors = [d for d in (32, 64, 128, 256) if K % d == 0 and d != g]
        other = f"a group size that divides {K} ({', '.join(map(str, divisors))})" if divisors else "one scale per row"
        return (
            f"group size {g} does not divide the width {K}, and no reader takes a ragged group; use {other}, or native"
        )
    if class_name == EMBEDDING:
        return "transformers cannot load a quantized embedding; leave it unquantized, or use native"
    return None


def objections(
    schemes: Mapping[str, Scheme], widths: Mapping[str, int], classes: Mapping[str, str] | None = None
) -> list[str]:
    """Every reason why this assignment of schemes cannot be stored here; empty if it can.

    Besides `can_express` per module: experts of one stack that differ in scheme, which every reader would get wrong.
    """
    classes = classes or {}
    reasons = []
    for name, scheme in schemes.items():
        reason = can_express(scheme, widths[name], classes.get(name, LINEAR))
        if reason is not None:
            reasons.append(f"{name}: {reason}")
    stacks: dict[str, dict[Scheme, None]] = {}
    for name, scheme in schemes.items():
        stack = targets.expert_stack(name)
        if stack is not None:
            stacks.setdefault(stack, {})[scheme] = None
    for stack, kinds in stacks.items():
        if len(kinds) > 1:
            reasons.append(
                f"{stack}: experts with different schemes ({', '.join(map(str, kinds))}), and every reader takes one "
                "scheme for a stack; give all experts of a block the same scheme, or use native"
            )
    return reasons


def pack(qt: QuantizedTensor | SplitTensor, scheme: Scheme, layer: str = "") -> dict[str, Tensor]:
    """Local tensors of one linear: `dense` keys, or int8 ``weight`` and ``weight_scale`` for 8-bit activations.

    `layer` only names it in errors. Raises FormatError for a ragged last group, a scale that is not 16-bit, or columns
    in activation order.
    """
    if isinstance(qt, SplitTensor):
        raise FormatError(f"{layer or 'weight'}: {can_express(qt.scheme, qt.shape[1])}")
    if qt.scheme != scheme.weight:
        raise FormatError(f"{layer or 'weight'}: quantized at {Scheme(qt.scheme)}, but the config would say {scheme}")
    reason = can_express(scheme, qt.shape[1])
    if reason is not None:
        raise FormatError(f"{layer or 'weight'}: {reason}")
    if scheme.activation_bits == 8:
        dense.check_scale(qt.scale, layer)
        dense.refuse_order(qt, layer)
        return {_INT8_WEIGHT: qt.codes.contiguous(), dense.SCALE: qt.scale.contiguous()}
    return dense.pack(qt, layer)


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme, layer: str = "") -> QuantizedTensor:
    """The QuantizedTensor of one linear's local tensors, whoever wrote them.

    3-bit words padded to ten values a word are told from dense ones by their number; where the two agree in number
    (only widths below 160 that are no multiple of 32) they are read as dense.
    """
    weight = scheme.weight
    if dense.PACKED not in tensors:
        return _unpack_int8(tensors, weight, layer)
    N, K = dense.stored_shape(tensors, layer)
    whole = dict(tensors)
    if dense.SCALE in whole:
        whole[dense.SCALE] = _per_row(whole[dense.SCALE], N, weight.num_groups(K))
    if weight.bits == 3:
        whole[dense.PACKED] = _without_padding(whole[dense.PACKED], K)
        if dense.ZERO_POINT in whole:
            whole[dense.ZERO_POINT] = _without_padding(whole[dense.ZERO_POINT].t(), N).t()
    return _by_group(dense.unpack(whole, weight, layer), tensors, layer)


def write_config(schemes: Mapping[str, Scheme], ignore: Sequence[str], classes: Mapping[str, str]) -> dict[str, Any]:
    """The quantization_config for config.json.

    schemes: scheme per quantized module. ignore: *every* other linear of the model, routers and a tied lm_head
    included: what is missing here is claimed by a "Linear" target and loads as garbage. classes: class name per
    quantized module; not listed = "Linear".
    """
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme, []).append(name)
    ordered = sorted(groups, key=lambda scheme: -len(groups[scheme]))
    inside = [scheme for scheme in ordered if any(targets.in_block(name) for name in groups[scheme])]
    if len(inside) == 1 and all(classes.get(name, LINEAR) == LINEAR for name in groups[inside[0]]):
        named = {scheme: [name for name in names if not targets.in_block(name)] for scheme, names in groups.items()}
        named[inside[0]].append(LINEAR)
        ordered = [inside[0], *(scheme for scheme in ordered if scheme != inside[0])]
    else:
        named = targets.compact(groups, (name for name in ignore if not name.startswith(targets.REGEX)))
    formats = {_format(scheme) for scheme in ordered}
    return {
        "quant_method": NAME,
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": _write_group(scheme, named[scheme]) for i, scheme in enumerate(ordered)},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "global_compression_ratio": None,
        "version": WRITTEN_VERSION,
    }


def read_config(
    config: Mapping[str, Any], names: Sequence[str], classes: Mapping[str, str] | None = None
) -> dict[str, Scheme]:
    """Scheme per quantized module among `names`; modules that no target matches, or that are ignored, are left out.

    classes: class name per module, for targets such as "Linear"; not listed = a linear. Raises FormatError for what
    cannot be computed faithfully: other number types, rotations, static activation scales, quantized KV caches.
    """
    if config.get("quant_method", NAME) != NAME:
        raise FormatError(f"quant_method {config['quant_method']!r} is not {NAME}")
    _refuse_unsupported(config)
    classes = classes or {}
    by_target: dict[str, Scheme] = {}
    for key, group in config["config_groups"].items():
        scheme = _read_group(key, group, config.get("format"))
        for target in group.get("targets", []):
            by_target.setdefault(target, scheme)
    ignore = dict.fromkeys(config.get("ignore") or [])
    result: dict[str, Scheme] = {}
    for name in names:
        class_name = classes.get(name, LINEAR)
        if _matching(ignore, name, class_name) is None:
            target = _matching(by_target, name, class_name)
            if target is not None:
                result[name] = by_target[target]
    return result


def _matching(listed: Mapping[str, object], name: str, class_name: str) -> str | None:
    """The target that decides, in compressed-tensors' own order: the exact name, patterns alphabetically, the class."""
    if name in listed:
        return name
    patterns = sorted(target for target in listed if target.startswith(targets.REGEX))
    found = next((target for target in patterns if targets.matches(name, target)), None)
    return found or next((target for target in sorted(listed) if _is_class(class_name, target)), None)


def _is_class(class_name: str, target: str) -> bool:
    """A "Linear" target means subclasses too; all that is ever quantized and is no embedding is one."""
    return target == class_name or (target == LINEAR and class_name != EMBEDDING)


def _format(scheme: Scheme) -> str:
    return PACK_QUANTIZED if scheme.activation_bits == 16 else INT_QUANTIZED


def _write_group(scheme: Scheme, named: list[str]) -> dict[str, Any]:
    w = scheme.weight
    weights = {
        "num_bits": w.bits,
        "type": "int",
        "symmetric": w.symmetric,
        "strategy": "channel" if w.group_size is None else "group",
        "group_size": w.group_size,
        "dynamic": False,
    }
    per_token = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
    }
    return {
        "targets": named,
        "format": _format(scheme),
        "weights": weights,
        "input_activations": None if scheme.activation_bits == 16 else per_token,
        "output_activations": None,
    }


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise FormatError("quantization_config has no config_groups; nothing says how the weights are stored")
    status = config.get("quantization_status", "compressed")
    if status != "compressed":
        raise FormatError(f"quantization_status is {status!r}, not 'compressed': save the model compressed first")
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        if config.get(key):
            raise FormatError(f"quantization_config sets {key}, which bitwright does not compute; load it with vLLM")
    if config.get("format") not in (None, *READ_FORMATS):
        raise FormatError(f"format {config['format']!r} is not read; bitwright reads {', '.join(READ_FORMATS)}")


def _read_group(key: str, group: Any, default_format: str | None) -> Scheme:
    where = f"config_groups.{key}"
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise FormatError(f"{where} has no weights entry; presets and activation-only groups are not read")
    stored = group.get("format") or default_format
    if stored not in (None, *READ_FORMATS):
        raise FormatError(f"{where}: format {stored!r} is not read; bitwright reads {', '.join(READ_FORMATS)}")
    w = group["weights"]
    if w.get("type", "int") != "int" or w.get("dynamic", False):
        raise FormatError(f"{where}: weights of type {w.get('type')!r}, dynamic {w.get('dynamic')!r} are not read")
    g = w.get("group_size")
    group_size = None if g in (None, -1) else int(g)
    strategy = w.get("strategy") or ("group" if group_size else "channel")
    if strategy not in ("group", "channel", "tensor") or (strategy == "group") != (group_size is not None):
        raise FormatError(f"{where}: strategy {strategy!r} with group_size {g!r} is not read")
    try:
        weight = WeightScheme(int(w.get("num_bits", 8)), group_size, bool(w.get("symmetric", True)))
        scheme = Scheme(weight, _read_activations(where, group))
    except SchemeError as error:
        raise FormatError(f"{where}: {error}") from error
    if not scheme.plain:
        raise FormatError(
            f"{where}: {scheme} is not read from compressed-tensors; load the folder with vLLM, or dequantize it with "
            "transformers (CompressedTensorsConfig(dequantize=True)) and quantize it anew"
        )
    return scheme


def _read_activations(where: str, group: Mapping[str, Any]) -> int:
    if group.get("output_activations"):
        raise FormatError(f"{where}: quantized output activations are not read")
    given = group.get("input_activations")
    if not given:
        return 16
    found = {key: given.get(key) for key in ("num_bits", "type", "strategy", "dynamic")}
    if found != {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True} or not given.get(
        "symmetric", True
    ):
        raise FormatError(
            f"{where}: input_activations {found}, symmetric {given.get('symmetric', True)} are not read; "
            "only 8-bit int, per token, dynamic, symmetric are"
        )
    return 8


def _unpack_int8(tensors: Mapping[str, Tensor], weight: WeightScheme, layer: str) -> QuantizedTensor:
    if _INT8_WEIGHT not in tensors:
        dense.take(tensors, dense.PACKED, layer)  # raises: neither packed nor unpacked weights are there
    codes = tensors[_INT8_WEIGHT]
    if codes.ndim != 2 or codes.dtype != torch.int8:
        raise FormatError(
            f"{dense.full(layer, _INT8_WEIGHT)} is {codes.dtype} {tuple(codes.shape)}, but the config says quantized: "
            f"needs int8 [N, K]; put the module into ignore if it is not quantized"
        )
    N, K = codes.shape
    groups = weight.num_groups(K)
    scale = _per_row(dense.take(tensors, dense.SCALE, layer), N, groups)
    dense.expect(scale, dense.SCALE, (N, groups), None, layer)
    zero_point = None
    if not weight.symmetric:
        zero_point = _per_row(dense.take(tensors, dense.ZERO_POINT, layer), N, groups)
        dense.expect(zero_point, dense.ZERO_POINT, (N, groups), torch.int8, layer)
    return _by_group(QuantizedTensor(codes, scale, zero_point, weight), tensors, layer)


def _per_row(values: Tensor, N: int, groups: int) -> Tensor:
    """[N, 1] of a per-tensor [1] or a flat [N] tensor; anything else as it is."""
    if groups == 1 and values.ndim < 2 and values.numel() in (1, N):
        return values.reshape(-1, 1).expand(N, 1).contiguous()
    return values


def _by_group(qt: QuantizedTensor, tensors: Mapping[str, Tensor], layer: str) -> QuantizedTensor:
    """`qt`, its columns as stored, with columns sorted by the group that ``weight_g_idx`` gives each, if there is one.

    Stored columns lie in the order of the inputs, whatever group they are in. All entries -1 is how the format says
    that the groups are neighbours after all. Raises FormatError where the groups are not of `group_size` columns each.
    """
    g_idx = tensors.get(_GROUP_INDEX)
    if g_idx is None:
        return qt
    K = qt.shape[1]
    name, group_size = dense.full(layer, _GROUP_INDEX), qt.scheme.group_size or K
    if tuple(g_idx.shape) != (K,) or g_idx.dtype.is_floating_point:
        raise FormatError(f"{name} is {g_idx.dtype} {tuple(g_idx.shape)}; it must hold one group number for {K} inputs")
    group = g_idx.long()
    if bool((group == -1).all()):
        return qt
    order = group.argsort(stable=True)
    whole = torch.arange(K, device=group.device) // group_size
    if not torch.equal(group[order], whole):
        raise FormatError(
            f"{name} does not give groups of {group_size} inputs, numbered 0 .. {int(whole[-1])}, as the config says; "
            "the config or the file is damaged"
        )
    if torch.equal(group, whole):
        return qt
    return replace(qt, codes=qt.codes[:, order], order=order)


def _without_padding(words: Tensor, C: int) -> Tensor:
    """Dense 3-bit words of words that hold ten values each; dense words come back as they are."""
    padded, given = -(-C // _PADDED_PER_WORD), words.shape[-1] if words.ndim == 2 else None
    if words.dtype != torch.int32 or given != padded or given == packed_words(C, 3):
        return words
    values = (words.unsqueeze(-1) >> (3 * torch.arange(_PADDED_PER_WORD, device=words.device))) & 0b111
    return pack_rows(values.reshape(words.shape[0], -1)[:, :C].to(torch.uint8), 3)
