"""Every kernel once on tiny problems, for a checker that slows programs down a hundredfold:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=src:tests compute-sanitizer --error-exitcode 9 python -m gpu.tiny

Without the caching allocator every tensor has its own allocation, so that a byte read beyond its end is found.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import torch

from bitwright.kernels.problem import GLUON, HOPPER, cuda_features
from bitwright.kernels.triton import int8
from gpu import cases, int8_cases
from gpu.cases import BITS, Case

# Ragged in M, N and K; several programs to a tile; tiles of many tokens.
CASES = [
    case
    for bits in BITS
    for case in (
        Case(bits, 128, symmetric=False, M=1, N=72, K=424, bias=True),
        Case(bits, 64, M=17, N=40, K=1032),
        Case(bits, None, M=130, N=24, K=200),
    )
]
COUNTS = (3, 0, 18, 1)
INT8_CASES = [
    int8_cases.Case(4, 4, M=1, N=72, B=424, O=40, bias=True),
    int8_cases.Case(8, 8, M=17, N=40, B=1032, O=16),
    int8_cases.Case(4, 8, M=130, N=24, B=200, O=80),
]


def main() -> None:
    """Run all of them; AssertionError at the first wrong bit."""
    kernels = ["triton"]
    if {HOPPER, GLUON} <= cuda_features():
        kernels.append("gluon")
    ran = 0
    for name in kernels:
        linear = import_module(f"bitwright.kernels.{name}.gemm").linear
        module = "experts" if name == "triton" else "gemm"
        experts = import_module(f"bitwright.kernels.{name}.{module}")
        for case in CASES:
            cases.check_exact(linear, case)
            ran += 1
        for bits in BITS:
            grouped = experts.linear if name == "triton" else experts.experts
            cases.check_experts(grouped, Case(bits, 64, N=40, K=200), COUNTS, beyond=2)
            ran += 1
        cases.check_exact(linear, replace(CASES[0], dtype=torch.float16))
        ran += 1
    for problem in INT8_CASES:
        int8_cases.check(int8.linear, problem)
        ran += 1
        if "gluon" in kernels:
            int8_cases.check(import_module("bitwright.kernels.gluon.int8").linear, problem)
            ran += 1
    int8_cases.check_finish(int8.finish, INT8_CASES[0])
    ran += 1
    torch.cuda.synchronize()
    print(f"{ran} problems by {', '.join(kernels)} and int8: exact")


if __name__ == "__main__":
    main()
