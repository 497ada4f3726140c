"""What ptxas made of a kernel, read from its SASS: registers that change while the tensor cores still read them.

A product with its left operand in registers (HGMMA, IGMMA) goes on while the warps do; PTX forbids to change those
registers before a wait for the product's group. Triton decides where to wait, ptxas which registers to use again.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import triton

Instruction = tuple[str, str]  # operation, operands

_PRODUCT = re.compile(r"[HIQ]GMMA")
_NO_RESULT = ("ST", "LDGSTS", "BAR", "BRA", "RED")
_LEFT = 4  # registers of a left operand: 16 x 16 of 16 bits or 16 x 32 of 8 bits, by a warp


def disassembled(cubin: bytes, folder: Path) -> str:
    """SASS, by Triton's own nvdisasm."""
    (folder / "kernel.cubin").write_bytes(cubin)
    command = [triton.knobs.nvidia.nvdisasm.path, "kernel.cubin"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def overwritten(sass: str) -> list[str]:
    """Instructions of loops with products that write registers which a product may be reading.

    A loop is taken as straight and gone through twice: products of one turn can be in flight in the next.
    """
    return [found for body in loops(sass) for found in _overwritten(body)]


def loops(sass: str) -> list[list[Instruction]]:
    """Bodies of the innermost loops that hold a product; branches within are passed over."""
    instructions: list[Instruction] = []
    found_loops: list[tuple[int, int]] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line):
            instructions.append((found[1], found[2]))
            target = re.search(r"\.L_x_\d+", found[2]) if found[1].startswith("BRA") else None
            if target and target[0] in labels:
                found_loops.append((labels[target[0]], len(instructions)))
    holding = [
        (begin, end)
        for begin, end in found_loops
        if any(_PRODUCT.match(operation) for operation, _ in instructions[begin:end])
    ]
    innermost = [a for a in holding if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in holding)]
    return [instructions[begin:end] for begin, end in innermost]


def _overwritten(body: list[Instruction]) -> Iterator[str]:
    flying: list[set[int]] = []  # left operands of groups not waited for, oldest first
    group: set[int] = set()  # of the products since the last group ended
    for turn in range(2):
        for operation, operands in body:
            if _PRODUCT.match(operation):
                if left := re.match(r"R(\d+)", operands.split(",")[1].strip()):
                    group |= set(range(int(left[1]), int(left[1]) + _LEFT))
                if ".SP." in operation:
                    where = re.search(r"R(\d+)(?:, gsb0)?$", operands)  # which columns are kept
                    assert where, f"no metadata in {operation} {operands}"
                    group.add(int(where[1]))
                if "gsb0" in operands:
                    flying.append(group)
                    group = set()
            elif operation.startswith("WARPGROUP.DEPBAR"):
                pending = int(operands.split(",")[1], 16)
                flying = flying[len(flying) - pending :] if pending < len(flying) else flying
            elif turn and not operation.startswith(_NO_RESULT) and (result := re.match(r"R(\d+)\b", operands)):
                written = set(range(int(result[1]), int(result[1]) + _width(operation)))
                if written & set().union(group, *flying):
                    yield f"{operation} {operands}"


def _width(operation: str) -> int:
    """Registers that the result of an operation takes."""
    if ".128" in operation or operation.endswith(".4"):
        return 4
    return 2 if ".64" in operation or "WIDE" in operation or operation.startswith("CS2R") else 1
