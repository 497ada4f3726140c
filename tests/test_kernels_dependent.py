"""Programmatic dependent launch of the kernels between linears: what they do before they wait, read in their PTX."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from bitwright.kernels.problem import PDL

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="reads the PTX of Triton 3.6")

NORM = {
    "x": "*bf16",
    "places": "*i32",
    "shares": "*fp32",
    "residual": "*bf16",
    "weight": "*bf16",
    "bias": "*bf16",
    "normed": "*bf16",
    "total": "*bf16",
    "H": "i32",
    "eps": "fp32",
}
CHOOSE = {
    "x": "*bf16",
    "residual": "*bf16",
    "weight": "*bf16",
    "bias": "*bf16",
    "router": "*bf16",
    "normed": "*bf16",
    "total": "*bf16",
    "choices": "*i32",
    "shares": "*fp32",
    "offsets": "*i32",
    "tokens": "*i32",
    "H": "i32",
    "eps": "fp32",
}
SEND = {
    "normed": "*bf16",
    "choices": "*i32",
    "rows": "*bf16",
    "offsets": "*i32",
    "tokens": "*i32",
    "places": "*i32",
    "count": "i32",
    "H": "i32",
}
ROPE = {
    "qkv": "*bf16",
    "cos": "*fp32",
    "sin": "*fp32",
    "start": "*i32",
    "q": "*bf16",
    "keys": "*bf16",
    "values": "*bf16",
    "T": "i32",
    "S": "i32",
}
DECODE = {
    "qkv": "*bf16",
    "cos": "*fp32",
    "sin": "*fp32",
    "positions": "*i32",
    "keys": "*bf16",
    "values": "*bf16",
    "out": "*bf16",
    "partial": "*fp32",
    "stats": "*fp32",
    "counters": "*i32",
    "scale_log2": "fp32",
    "S": "i32",
}
ROUTE = {"logits": "*bf16", "offsets": "*i32", "tokens": "*i32", "places": "*i32", "shares": "*fp32", "M": "i32"}
ROWS = {"x": "*bf16", "offsets": "*i32", "weight": "*bf16", "out": "*bf16", "N": "i32", "K": "i32"}

HEADS = dict(KV=8, R=4, D=128, ROPE=True, ROWS=16, KEYS=64, MERGE_ROWS=4, CHUNK=8)
ROUTER = dict(E=8, TOP=2, CENTER=False, BIAS=False, BLOCK=4096, BE=8, BT=2)
OLD = {"positions", "cos", "sin", "keys", "values"}  # written in earlier steps, or never
# module, kernel, its signature, constants, what it may read before it waits
KERNELS: list[tuple[str, str, dict[str, str], dict[str, Any], set[str]]] = [
    (
        "kernels.triton.elementwise",
        "_add_norm",
        NORM,
        dict(ADD=True, TOP=0, BT=1, CENTER=True, BIAS=True, BLOCK=4096),
        {"weight", "bias"},
    ),
    (
        "kernels.triton.elementwise",
        "_add_norm",
        NORM,
        dict(ADD=False, TOP=0, BT=1, CENTER=False, BIAS=False, BLOCK=4096),
        {"weight"},
    ),
    (
        "kernels.triton.elementwise",
        "_add_norm",
        NORM,
        dict(ADD=True, TOP=2, BT=2, CENTER=False, BIAS=False, BLOCK=4096),
        {"weight"},
    ),
    ("kernels.triton.router", "_norm_choose", CHOOSE, ROUTER | dict(ALONE=True), {"weight", "router"}),
    ("kernels.triton.router", "_norm_choose", CHOOSE, ROUTER | dict(ALONE=False), {"weight", "router"}),
    ("kernels.triton.router", "_send", SEND, dict(E=8, TOP=2, BLOCK=4096, BC=32, BE=16), set()),
    ("kernels.triton.elementwise", "_rope_cache", ROPE, dict(HEADS=32, KV=8, HALF=64, ROPE=True, ROWS=8), set()),
    (
        "kernels.triton.elementwise",
        "_silu_mul",
        {"gate_up": "*bf16", "out": "*bf16", "I": "i32"},
        dict(BLOCK=1024),
        set(),
    ),
    ("kernels.triton.elementwise", "_relu", {"x": "*bf16", "out": "*bf16", "count": "i32"}, dict(BLOCK=1024), set()),
    ("kernels.triton.attention", "_decode", DECODE, HEADS | dict(SPLITS=1), OLD),
    ("kernels.triton.attention", "_decode", DECODE, HEADS | dict(SPLITS=33), OLD),
    ("kernels.triton.route", "_route", ROUTE, dict(E=8, TOP=2, BE=8, BM=16), set()),
    ("kernels.triton.route", "_rows", ROWS, dict(E=8, BN=8, BK=512, BE=8), set()),
]


def compiled(module: str, kernel: str, signature: dict[str, str], constants: dict[str, Any], pdl: bool) -> str:
    """PTX for Hopper."""
    from importlib import import_module

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn = getattr(import_module(f"bitwright.{module}"), kernel)
    names = fn.arg_names
    constants = constants | {"PDL": pdl}
    assert set(names) == set(signature) | set(constants)
    source = ASTSource(
        fn=fn,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n, kind in signature.items() if kind != "fp32"},
    )
    options = {"num_warps": 4} | ({"launch_pdl": True} if pdl else {})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def before_the_wait(ptx: str) -> list[str]:
    """The statements of the kernel up to its only griddepcontrol.wait."""
    lines = (re.sub(r"//.*", "", line).strip() for line in ptx[ptx.index(".entry") :].splitlines())
    statements = [line.rstrip("; ") for line in lines if line and line[0] not in ".${}()"]
    waits = [i for i, s in enumerate(statements) if "griddepcontrol.wait" in s]
    assert len(waits) == 1 and not statements[waits[0]].startswith("@")
    return statements[: waits[0]]


def parameters_read(statements: list[str], names: list[str]) -> set[str]:
    """Kernel arguments from which the addresses of these statements' loads are made."""
    made: dict[str, set[str]] = {}
    read: set[str] = set()
    for s in statements:
        s = re.sub(r"^@!?%\w+ ", "", s)
        registers = re.findall(r"%[a-z]+\d+", s)
        sources = set().union(*(made.get(r, set()) for r in registers))
        if found := re.search(r"_param_(\d+)\]", s):
            sources |= {names[int(found[1])]} if int(found[1]) < len(names) else set()
        if re.match(r"(ld|ldu)\.global|ld\.volatile|cp\.async|prefetch", s):
            address = re.findall(r"%[a-z]+\d+", s[s.rindex("[") :])
            read |= set().union(*(made.get(r, set()) for r in address))
        if registers:
            made[registers[0]] = made.get(registers[0], set()) | sources
    return read


@pytest.mark.parametrize(
    ("module", "kernel", "signature", "constants", "allowed"),
    KERNELS,
    ids=[f"{k[1]}-{i}" for i, k in enumerate(KERNELS)],
)
def test_nothing_of_other_kernels_is_touched_before_the_wait(
    module: str, kernel: str, signature: dict[str, str], constants: dict[str, Any], allowed: set[str]
) -> None:
    ptx = compiled(module, kernel, signature, constants, True)
    early = before_the_wait(ptx)
    assert ptx.count("griddepcontrol.launch_dependents") == 1
    assert any(s.startswith("griddepcontrol.launch_dependents") for s in early)
    # Straight down to the wait: a program that ended or went round it would let the next kernel run too soon.
    for s in early:
        assert not re.search(r"\b(bra|brx|ret|exit|call|st\.global|atom|red|cp\.reduce)\b", s), s
    read = parameters_read(early, list(signature))
    assert {name for name in read if signature[name].startswith("*")} == allowed
    assert re.search(r"\b(st\.global|atom)\b", ptx)


@pytest.mark.parametrize("which", [0, 3, 10])
def test_elsewhere_the_instructions_are_left_out(which: int) -> None:
    module, kernel, signature, constants, _ = KERNELS[which]
    assert "griddepcontrol" not in compiled(module, kernel, signature, constants, False)


def test_a_read_that_comes_too_soon_is_found() -> None:
    early = [
        "ld.param.b64 %rd1, [_k_param_1]",
        "mul.wide.s32 %rd2, %r1, 2",
        "add.s64 %rd3, %rd1, %rd2",
        "@%p1 ld.global.v2.b32 { %r4, %r5 }, [ %rd3 + 16 ]",
    ]
    assert parameters_read(early, ["x", "y"]) == {"y"}


def test_options_follow_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitwright.kernels import dependent

    dependent.options.cache_clear()
    assert dependent.options(torch.device("cpu")) == {"PDL": False}
    for features, expected in (({PDL}, {"PDL": True, "launch_pdl": True}), (set(), {"PDL": False})):
        dependent.options.cache_clear()
        monkeypatch.setattr(dependent, "cuda_features", lambda device, found=features: frozenset(found))
        assert dependent.options(torch.device("cuda", 0)) == expected
    dependent.options.cache_clear()
