"""Launching the Hopper kernel for quantized activations: tiles, descriptors."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from hashlib import sha256

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from bitwright.kernels import tma
from bitwright.kernels.gluon.config import PIECE, SHARED_MEMORY
from bitwright.kernels.gluon.int8_kernel import int8_gemm
from bitwright.kernels.int8_fragments import STEP
from bitwright.kernels.machine import machine

WORDS = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
CODES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
RESULTS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)

NWG = 2  # warpgroups that multiply
_HALF_COST = 0.65  # time of a tile of 64 tokens over that of one of 128


@dataclass(frozen=True)
class Config:
    """Compile-time values of `int8_kernel.int8_gemm`.

    BITS of the weight's codes; OK outlier columns a step, 0 if there are none; BIAS with a bias. Tile: BM tokens,
    `BN` outputs of two warpgroups with REST * 64 rows each; NS stages; GM token tiles a band; TMA_OUT writes results
    through shared memory. REGISTERS of a warpgroup that is not the first, MAXNREG of a thread on average.
    EXPERTS: none, what `write` asks.
    """

    BITS: int
    OK: int
    BIAS: bool
    BM: int
    REST: int
    NS: int
    TMA_OUT: bool
    GM: int = 16
    REGISTERS: int = 232
    MAXNREG: int = 168
    EXPERTS: int = 0

    def __repr__(self) -> str:
        # Triton makes part of a symbol name of it: letters, digits and underscores only.
        digest = sha256(self.ASM.encode()).hexdigest()[:8]
        return "_".join([f"{f.name}{getattr(self, f.name)}" for f in fields(self)] + [digest])

    @property
    def BN(self) -> int:
        """Outputs a tile."""
        return 64 * self.REST * NWG

    @property
    def ASM(self) -> str:
        """PTX: four words of codes -> eight of bytes, 16 · those of the low and of the high nibbles of each."""
        lines = [
            f"shl.b32 t, ${8 + w}, 4; and.b32 ${2 * w}, t, m; and.b32 ${2 * w + 1}, ${8 + w}, m;" for w in range(4)
        ]
        return "\n".join(["{ .reg .b32 t, m; mov.b32 m, 0xf0f0f0f0;", *lines, "}"])

    @property
    def CONSTRAINTS(self) -> str:
        """Its operand constraints."""
        return ",".join(["=r"] * 8 + ["r"] * 4)

    @property
    def stages_that_fit(self) -> int:
        """Stages that shared memory holds beside the buffers for results."""
        stage = self.BN * STEP * self.BITS // 8 + self.BM * STEP + 16
        written = NWG * 64 * self.REST * min(self.BM, PIECE) * 2
        return (SHARED_MEMORY - written) // stage


@lru_cache(maxsize=4096)
def choose(M: int, N: int, O: int, bits: int, bias: bool, processors: int) -> Config:
    """Tiles for M tokens times N outputs with O outliers, from measurements on one H100 (dev/LOG.md)."""
    config = Config(
        BITS=bits,
        OK=0 if O == 0 else 32 if bits == 4 else 64,
        BIAS=bias,
        BM=128,
        REST=2,
        NS=2,
        TMA_OUT=N % 8 == 0,
    )

    def rounds(BM: int) -> int:
        return -(-(-(-M // BM) * -(-N // config.BN)) // processors)

    if _HALF_COST * rounds(64) < rounds(128):
        config = replace(config, BM=64)
    return replace(config, NS=min(8, config.stages_that_fit))


def fills(M: int, N: int, processors: int) -> bool:
    """Whether M tokens times N outputs are tiles enough. The Triton kernel shares the columns of a tile among programs,
    and ends first where tiles are few: 64 tokens of 8192 outputs are 32 tiles, 128 are 64, and there this one does.
    """
    return -(-M // 64) * -(-N // (128 * NWG)) >= processors // 3


def outlier_layout(columns: int) -> gl.NVMMASharedLayout:
    """Of a step of so many outliers in shared memory: rows as long as the swizzle."""
    return gl.NVMMASharedLayout(swizzle_byte_width=2 * columns, element_bitwidth=16, rank=2)


def linear(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    outliers: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    row_sums: Tensor,
    weight_outliers: Tensor,
    bias: Tensor | None,
    bits: int,
    N: int,
    B: int,
    dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """[M, N] in `dtype`; operands as `int8_ops` describes and checks them. config: instead of what `choose` gives."""
    M, O = codes.shape[0], outliers.shape[1]
    out = torch.empty(M, N, dtype=dtype, device=codes.device)
    if M == 0 or N == 0:
        return out
    processors = machine(codes.device)[1]
    c = config or choose(M, N, O, bits, bias is not None, processors)
    codes, weight, outliers, weight_outliers = map(tma.aligned, (codes, weight, outliers, weight_outliers))
    tokens = TensorDescriptor(codes, list(codes.shape), [codes.shape[1], 1], [c.BM, STEP], CODES)
    if bits == 4:
        words = weight.view(torch.int32).flatten(1)
        matrix = TensorDescriptor(words, list(words.shape), [words.shape[1], 1], [c.BN // 16, 4 * STEP // 2], WORDS)
    else:
        matrix = TensorDescriptor(weight, list(weight.shape), [weight.shape[1], 1], [c.BN, STEP], CODES)
    weight_columns = columns = tokens
    if c.OK:
        layout = outlier_layout(c.OK)
        columns = TensorDescriptor(outliers, [M, O], [O, 1], [c.BM, c.OK], layout)
        weight_columns = TensorDescriptor(weight_outliers, [N, O], [O, 1], [c.BN, c.OK], layout)
    results = tokens
    if c.TMA_OUT:
        results = TensorDescriptor(out, [M, N], [N, 1], [min(c.BM, PIECE), 64 * c.REST], RESULTS)
    tiles = -(-M // c.BM) * -(-N // c.BN)
    int8_gemm[(min(tiles, processors),)](
        matrix, tokens, weight_columns, columns, results, out, scale, zero, weight_scale, row_sums,
        out if bias is None else bias, M, N, codes.shape[1] // STEP, -(-O // c.OK) if c.OK else 0, c,
        num_warps=4, maxnreg=c.MAXNREG, enable_fp_fusion=False,
    )  # fmt: skip
    return out
