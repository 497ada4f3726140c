"""Gluon kernels assembled for sm_90 on a machine without a GPU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget


class Assembled(NamedTuple):
    """What ptxas made: its messages, spilled bytes, bytes of shared memory."""

    ptx: str
    said: str
    spilled: int
    shared: int
    cubin: bytes


def tensor(dtype: str, shape: list[int], layout: Any) -> str:
    """The type of a TMA descriptor in a signature."""
    return f"tensordesc<{dtype}[{', '.join(map(str, shape))}],{layout!r}>"


def assemble(
    kernel: Any, signature: dict[str, str], config: Any, aligned: tuple[str, ...], options: dict[str, Any], folder: Path
) -> Assembled:
    """A kernel with parameters C and num_warps last.

    aligned: arguments that are multiples of 16.
    """
    from triton.experimental.gluon._runtime import GluonASTSource

    signature = {**signature, "C": "constexpr", "num_warps": "constexpr"}
    names = list(signature)
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    constants: dict[tuple[int], Any] = {(names.index("C"),): config, (names.index("num_warps"),): 4}
    source = GluonASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, **options})
    ptx = made.asm["ptx"]
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    (folder / "kernel.ptx").write_text(ptx)
    command = [ptxas, "-v", "--gpu-name=sm_90a", folder / "kernel.ptx", "-o", folder / "kernel.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert spilled is not None
    return Assembled(ptx, said, int(spilled[1]), made.metadata.shared, made.asm["cubin"])
