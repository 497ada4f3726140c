"""Every kernel once on tiny problems, for a checker that slows programs down a hundredfold:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=src:tests compute-sanitizer --error-exitcode 9 python -m gpu.tiny

Without the caching allocator every tensor has its own allocation, so that a byte read beyond its end is found.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import torch

from bitwright.kernels.problem import GLUON, HOPPER, NVRTC, cuda_features
from bitwright.kernels.triton import int8
from gpu import cases, int8_cases
from gpu.cases import BITS, Case, Experts, Linear

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
ANY = 1 << 30  # tokens
INT8_CASES = [
    int8_cases.Case(4, 4, M=1, N=72, B=424, O=40, bias=True),
    int8_cases.Case(8, 8, M=17, N=40, B=1032, O=16),
    int8_cases.Case(4, 8, M=130, N=24, B=200, O=80),
]


def main() -> None:
    """Run all of them; AssertionError at the first wrong bit."""
    kernels: dict[str, tuple[Linear, Experts | None, int]] = {}  # with the most tokens that each takes
    triton_gemm, triton_experts = (import_module(f"bitwright.kernels.triton.{name}") for name in ("gemm", "experts"))
    kernels["triton"] = triton_gemm.linear, triton_experts.linear, ANY
    if {HOPPER, GLUON} <= cuda_features():
        gluon = import_module("bitwright.kernels.gluon.gemm")
        kernels["gluon"] = gluon.linear, gluon.experts, ANY
    if {HOPPER, NVRTC} <= cuda_features():
        few = import_module("bitwright.kernels.nvrtc.few_tokens")
        kernels["few_tokens"] = few.linear, few.experts, few.MOST_TOKENS
        many = import_module("bitwright.kernels.nvrtc.many_tokens").linear
        kernels["many_tokens"] = many, None, ANY
        kernels["many_tokens in pieces"] = lambda x, f, bias=None: many(x, f, bias, cuts=2), None, ANY
    ran = 0
    for linear, experts, most in kernels.values():
        for case in CASES:
            cases.check_exact(linear, replace(case, M=min(case.M, most)))
            ran += 1
        for bits in BITS if experts is not None else ():
            cases.check_experts(experts, Case(bits, 64, N=40, K=200), COUNTS, beyond=2)
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
