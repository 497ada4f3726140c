"""Which format is chosen, who can read it, and how names become targets."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

from bitwright.errors import FormatError
from bitwright.formats import choose, compressed_tensors, native, portability, reader
from bitwright.formats.targets import compact, expert_stack, matches
from bitwright.scheme import Scheme

BLOCK = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
BLOCK += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
DENSE = [f"model.layers.{i}.{name}" for i in range(2) for name in BLOCK]
MOE = [f"model.layers.{i}.{name}" for i in range(2) for name in BLOCK[:4]]
MOE += [f"model.layers.{i}.mlp.experts.{e}.{w}" for i in range(2) for e in range(3) for w in ("w1", "w2", "w3")]


def all_at(text: str, names: list[str] = DENSE, **changes: str) -> dict[str, Scheme]:
    """One scheme for all names but those whose part is in `changes`."""

    def scheme_of(name: str) -> str:
        return next((other for part, other in changes.items() if part in name.split(".")), text)

    return {name: Scheme.parse(scheme_of(name)) for name in names}


def widths(names: list[str], K: int = 256) -> dict[str, int]:
    return dict.fromkeys(names, K)


@pytest.mark.parametrize(
    ("schemes", "K", "expected"),
    [
        (all_at("w4a16-g64"), 256, compressed_tensors),
        (all_at("w3a16-g32-asym"), 256, compressed_tensors),
        (all_at("w8a8"), 100, compressed_tensors),
        (all_at("w4a16-g128"), 576, native),
        (all_at("w4a16-g64", MOE), 256, compressed_tensors),
        (all_at("w4a16-g64", MOE, w2="w8a16"), 256, native),
        (all_at("w4a16-g64", MOE, q_proj="w8a16"), 256, compressed_tensors),
    ],
)
def test_compressed_tensors_is_chosen_wherever_it_can(schemes: dict[str, Scheme], K: int, expected: ModuleType) -> None:
    assert choose(schemes, widths(list(schemes), K)) is expected


def test_a_requested_format_is_used_or_refused_with_reasons() -> None:
    schemes = all_at("w4a16-g128")
    assert choose(schemes, widths(DENSE), "native") is native
    with pytest.raises(FormatError, match=r"layers\.0\.self_attn\.q_proj: group size 128.*576 \(32, 64\).*11 more"):
        choose(schemes, widths(DENSE, 576), "compressed-tensors")
    with pytest.raises(FormatError, match=r"model\.layers\.0\.mlp\.experts: experts with different schemes"):
        choose(all_at("w4a16-g64", MOE, w2="w8a16"), widths(MOE), "compressed-tensors")
    with pytest.raises(FormatError, match=r"'awq'.*compressed-tensors, native"):
        choose(schemes, widths(DENSE), "awq")
    with pytest.raises(FormatError, match="no module"):
        choose({}, {})


def test_a_quantized_embedding_goes_native() -> None:
    schemes = all_at("w4a16-g64") | {"model.embed_tokens": Scheme.parse("w8a16")}
    classes = {"model.embed_tokens": "Embedding"}
    assert choose(schemes, widths(list(schemes)), classes=classes) is native
    with pytest.raises(FormatError, match=r"embed_tokens: transformers cannot load a quantized embedding"):
        choose(schemes, widths(list(schemes)), "compressed-tensors", classes)


def test_reader_goes_by_quant_method() -> None:
    for module in (compressed_tensors, native):
        assert reader(module.write_config(all_at("w4a16-g64"), ["lm_head"], {})) is module
    with pytest.raises(FormatError, match=r"'gptq'.*compressed-tensors, bitwright"):
        reader({"quant_method": "gptq"})


def notes(schemes: dict[str, Scheme], **options: object) -> dict[str, str]:
    return {line.split(" ")[0].strip(":,"): line for line in portability(schemes, **options)}  # type: ignore[arg-type]


def test_the_portable_choice_has_no_reservation() -> None:
    lines = portability(all_at("w4a16-g128"), ignore=["lm_head"], widths=widths(DENSE))
    assert [line for line in lines if "cannot" in line or "only" in line or "need" in line] == []
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("schemes", "options", "who", "said"),
    [
        (all_at("w4a16-g64-asym"), {}, "transformers", "only with quantization_config=CompressedTensorsConfig"),
        (all_at("w4a16-g64-asym", down_proj="w8a16"), {}, "transformers", "cannot load it: .*one scheme to all"),
        (all_at("w4a16-g64"), {"classes": {DENSE[0]: "FalconLinear"}}, "transformers", "FalconLinear"),
        (all_at("w4a16-g64-asym", MOE), {}, "transformers", "cannot load it: experts with zero points"),
        (all_at("w8a8", MOE), {}, "transformers", "cannot load it: int8 experts"),
        (all_at("w4a16-g64", MOE[:8]), {"ignore": MOE[8:]}, "transformers", "cannot load it: experts that stay"),
        (all_at("w8a8"), {}, "transformers", "127.5"),
        (all_at("w4a16-g64", down_proj="w8a16"), {}, "transformers", "loads it as it is"),
        (all_at("w4a16-g64", k_proj="w8a16"), {}, "vLLM", r"cannot .*q_proj w4a16-g64, k_proj w8a16"),
        (all_at("w4a16-g64", k_proj="w8a16"), {}, "SGLang", "cannot .*q_proj/k_proj/v_proj"),
        (all_at("w4a16-g64", DENSE[1:]), {"ignore": [DENSE[0]]}, "vLLM", "q_proj unquantized"),
        (all_at("w4a16-g64", up_proj="w8a16"), {}, "vLLM", "gate_proj/up_proj"),
        (all_at("w3a16-g64"), {}, "vLLM", "Humming"),
        (all_at("w3a16-g64-asym"), {}, "vLLM", "cannot load it: 2 and 3 bits with zero points"),
        (all_at("w2a16-g64"), {}, "SGLang", "cannot load it: only 4 and 8 bits"),
        (all_at("w4a16-g192"), {}, "vLLM", "group size 192 has no Marlin kernel"),
        (all_at("w4a16-g64") | {"lm_head": Scheme.parse("w8a16")}, {}, "vLLM", "quantized lm_head"),
        (all_at("w4a16-g64", down_proj="w8a16"), {}, "vLLM", "runs it packed; 8-bit weights under 16-bit .* a GPU"),
        (all_at("w8a8", MOE), {}, "vLLM", "runs it packed; experts need a GPU, or a CPU with AMX"),
        (all_at("w8a8"), {}, "vLLM", "runs it packed$"),
        (all_at("w4a16-g64"), {"widths": widths(DENSE, 100)}, "bitwright", "the only reader.*group size 64"),
        (all_at("w4a16-g64"), {"requested": "native"}, "vLLM", "cannot load it"),
    ],
)
def test_reservations_are_stated(schemes: dict[str, Scheme], options: dict[str, object], who: str, said: str) -> None:
    import re

    assert re.search(said, notes(schemes, **options)[who])


def test_expert_matrices_are_told_by_their_names() -> None:
    assert expert_stack("model.layers.3.mlp.experts.7.w1") == "model.layers.3.mlp.experts"
    for other in ("model.layers.3.mlp.up_proj", "lm_head", "experts.7.w1", "model.layers.3", "a.0.b.1.c.d"):
        assert expert_stack(other) is None


def test_patterns_select_nothing_else() -> None:
    groups = {"a": DENSE[:7], "b": ["model.layers.1.mlp.up_proj"]}
    others = [n for n in DENSE[7:] if n not in groups["b"]] + ["model.layers.10.mlp.up_proj", "lm_head"]
    chosen = compact(groups, others)
    for key, names in groups.items():
        every = [*groups["a"], *groups["b"], *others]
        assert [n for n in every if any(matches(n, t) for t in chosen[key])] == names


def test_importing_formats_is_light() -> None:
    code = "import sys, bitwright.formats; print(any(m in sys.modules for m in ('transformers', 'compressed_tensors')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
