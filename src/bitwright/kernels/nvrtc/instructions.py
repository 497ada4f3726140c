"""The products whose operand lists grow with the tile, as CUDA C++: `instructions.cuh`, made for a number of tokens."""

from __future__ import annotations

_PRODUCT = """
// d += a b: {what}.
__device__ __forceinline__ void {name}({kind} (&d)[{registers}], {parameters}) {{
    asm volatile(
        "{instruction} "
        "{{{of_d}}}, {operands};"
        : {outputs}
        : {inputs});
}}
"""


def header(tokens: int, float16: bool) -> str:
    """`sparse_product` of 64 sparse rows x 64 columns and `outlier_product` of 64 x 16, both by `tokens` tokens."""
    registers = tokens // 2
    half = "f16" if float16 else "bf16"

    def product(name: str, kind: str, **rest: str) -> str:
        return _PRODUCT.format(
            name=name,
            kind=kind,
            registers=registers,
            of_d=", ".join(f"%{i}" for i in range(registers)),
            outputs=", ".join(f'"+{"f" if kind == "float" else "r"}"(d[{i}])' for i in range(registers)),
            **rest,
        )

    a, b, where = f"{{{', '.join(f'%{registers + i}' for i in range(4))}}}", f"%{registers + 4}", f"%{registers + 5}"
    sparse = product(
        "sparse_product",
        "int",
        what="a kept bytes in four registers, `where` the columns of two that are kept of every four",
        parameters="const u32 (&a)[4], u64 b, u32 where",
        instruction=f"wgmma.mma_async.sp.sync.aligned.m64n{tokens}k64.s32.s8.s8",
        operands=f"{a}, {b}, {where}, 0, 1",
        inputs=", ".join([*(f'"r"(a[{i}])' for i in range(4)), '"l"(b)', '"r"(where)']),
    )
    outliers = product(
        "outlier_product",
        "float",
        what="both in shared memory, 16-bit",
        parameters="u64 a, u64 b",
        instruction=f"wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.{half}.{half}",
        operands=f"%{registers}, %{registers + 1}, 1, 1, 1, 0, 0",
        inputs='"l"(a), "l"(b)',
    )
    return f"#pragma once\n{sparse}{outliers}"
