"""A program like `triton_interpreter.py`, for the activation quantizer."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from gpu import quantize_cases as cases
from gpu.cases import poisoned
from gpu.quantize_cases import Case
from triton_interpreter import accept_numpy

from bitwright.kernels import split_ops
from bitwright.kernels.triton.quantize import QuantizeConfig, quantize

PARTS = [
    Case(4, 1300, 40, order="shuffled", clip=0.9),
    Case(8, 1300, 0, dtype=torch.float32),
    Case(4, 3072, 17, 1024, "ascending"),
    Case(8, 2560, 5, 512, "first", dtype=torch.float16),
]


def run(*arguments: object, tiles: QuantizeConfig | None = None) -> tuple[Tensor, ...]:
    """The kernel on CPU tensors, called like the operator."""
    x, base_idx, outlier_idx, bits, block, clip = arguments
    out = split_ops._allocated(x, base_idx, outlier_idx)
    quantize(x, base_idx, outlier_idx, bits, block, clip, out, tiles)
    return out


def main() -> None:
    accept_numpy()
    narrow = [case for case in cases.shapes() if case.M * case.K < 1 << 17]
    checks = {f"matrix {case}": partial(cases.check, run, case) for case in cases.matrix()}
    checks |= {f"shape {case}": partial(cases.check, run, case) for case in narrow}
    for case in PARTS:
        tiles = QuantizeConfig(2 if case.block < 1024 else 1, max(1, case.block // 512), whole=False)
        checks[f"part {case}"] = partial(cases.check, partial(run, tiles=tiles), case)
    checks["empty"] = partial(cases.check, run, Case(4, 96, 8, M=0))
    results = {}
    for name, check in checks.items():
        try:
            with poisoned():
                check()
            results[name] = ""
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(results))


if __name__ == "__main__":
    main()
