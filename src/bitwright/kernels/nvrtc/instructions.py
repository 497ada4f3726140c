"""The products whose operand lists grow with the tile, as CUDA C++: `instructions.cuh`, made for a number of tokens."""

from __future__ import annotations

_PRODUCT = """
// d += a b: {what}.
__device__ __forceinline__ void {name}({kind} (&d)[{registers}], {parameters}) {{
    asm volatile(
        "{before}{instruction} "
        "{{{of_d}}}, {operands}{after}"
        : {outputs}
        : {inputs});
}}
"""
_FILE = '#pragma once\n#include "hopper.cuh"\n'


def sparse_header(tokens: int, float16: bool) -> str:
    """`sparse_product` of 64 sparse rows x 64 columns and `outlier_product` of 64 x 16, both by `tokens` tokens."""
    registers = tokens // 2
    sparse = _product(
        "sparse_product",
        tokens,
        "int",
        what="a kept bytes in four registers, `where` the columns of two that are kept of every four",
        parameters="const u32 (&a)[4], u64 b, u32 where",
        instruction=f"wgmma.mma_async.sp.sync.aligned.m64n{tokens}k64.s32.s8.s8",
        operands=f"{_four(registers)}, %{registers + 4}, %{registers + 5}, 0, 1",
        inputs=", ".join([*(f'"r"(a[{i}])' for i in range(4)), '"l"(b)', '"r"(where)']),
    )
    outliers = _product(
        "outlier_product",
        tokens,
        "float",
        what="both in shared memory, 16-bit",
        parameters="u64 a, u64 b",
        instruction=_of_halves(tokens, float16),
        operands=f"%{registers}, %{registers + 1}, 1, 1, 1, 0, 0",
        inputs='"l"(a), "l"(b)',
    )
    return _FILE + sparse + outliers


def weight_header(tokens: int, float16: bool) -> str:
    """`weight_product` of 64 rows x 16 columns by `tokens` tokens in rows of 128 bytes."""
    registers = tokens // 2
    return _FILE + _product(
        "weight_product",
        tokens,
        "float",
        what="a pairs of 16-bit floats in four registers, b the low word of an operand",
        parameters="const u32 (&a)[4], u32 b",
        before=f"{{ .reg .b64 right; mov.b64 right, {{%{registers + 4}, %{registers + 5}}}; ",
        instruction=_of_halves(tokens, float16),
        operands=f"{_four(registers)}, right, 1, 1, 1, 0",
        after="; }",
        inputs=", ".join([*(f'"r"(a[{i}])' for i in range(4)), '"r"(b)', '"n"(operand_high(128))']),
    )


def _of_halves(tokens: int, float16: bool) -> str:
    half = "f16" if float16 else "bf16"
    return f"wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.{half}.{half}"


def _four(first: int) -> str:
    """Four registers from operand `first` on."""
    return f"{{{', '.join(f'%{first + i}' for i in range(4))}}}"


def _product(name: str, tokens: int, kind: str, before: str = "", after: str = ";", **rest: str) -> str:
    registers = tokens // 2
    return _PRODUCT.format(
        name=name,
        kind=kind,
        registers=registers,
        before=before,
        after=after,
        of_d=", ".join(f"%{i}" for i in range(registers)),
        outputs=", ".join(f'"+{"f" if kind == "float" else "r"}"(d[{i}])' for i in range(registers)),
        **rest,
    )
