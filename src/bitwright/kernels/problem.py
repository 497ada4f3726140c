"""What a packed linear has to do, and what it looks like once prepared.

A `Problem` is everything a choice of implementation may depend on, as one frozen value: no implementation asks the
machine itself, so a choice can be explained, and tested, for a machine that is not at hand.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from bitwright.errors import BitwrightError
from bitwright.kernels.nvrtc import compile as nvrtc
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import Scheme
from bitwright.split import SplitTensor

AVX512 = "avx512"  # 512-bit vectors
NATIVE_BF16 = "native-bf16"  # bf16 dot products in hardware; otherwise bf16 GEMMs are emulated and slower than fp32
VNNI = "vnni"  # int8 dot products in hardware

HOPPER = "hopper"  # compute capability 9.0: wgmma and TMA
TRITON = "triton"  # Triton is installed, and the GPU is one it compiles for
CUSPARSELT = "cusparselt"  # torch brings cuSPARSELt: products with 2:4 weights
NVRTC = "nvrtc"  # CUDA's runtime compiler is there, for kernels in CUDA C++
NVRTC_MISSING = "needs NVRTC 12.4 or later, CUDA's runtime compiler, which torch's CUDA wheels bring"
GLUON = "gluon"  # that Triton's Gluon is one our kernels are written for
PDL = "pdl"  # programmatic dependent launch, by the GPU and by Triton

GLUON_VERSIONS = ((3, 6),)  # Gluon changes names with every minor release
_TRITON_CAPABILITY = (8, 0)  # the oldest GPU Triton supports, and the first with bfloat16
_PDL_CAPABILITY = (9, 0)
_PDL_TRITON = (3, 6)  # the oldest that was tried


@dataclass(frozen=True)
class Problem:
    """A linear [N, K] at `scheme`, fed with activations of `dtype`, on a machine with `features`.

    scale_dtype: dtype of the scales as given. device: "cpu" or "cuda".
    """

    N: int
    K: int
    scheme: Scheme
    dtype: torch.dtype
    scale_dtype: torch.dtype
    device: str
    features: frozenset[str]

    @classmethod
    def of(
        cls,
        qt: QuantizedTensor | SplitTensor,
        scheme: Scheme,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        features: frozenset[str] | None = None,
    ) -> Problem:
        """The problem of running `qt` at `scheme` on this machine (or on one with `features`)."""
        N, K = qt.shape
        kind = torch.device(device).type
        if features is None:
            features = cuda_features(device) if kind == "cuda" else cpu_features()
        return cls(N, K, scheme, dtype, qt.scale.dtype, kind, features)


class PackedWeight(ABC):
    """A weight [N, K] prepared for one implementation.

    Calling it with x [M, K] in the problem's dtype gives x Wᵀ [M, N] in the same dtype. The weight it stands for is
    `QuantizedTensor.dequantize` in float32 at every M; a path that multiplies in 16 bits rounds it to those at most
    once.
    """

    shape: tuple[int, int]
    dtype: torch.dtype

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """x [M, K] -> [M, N]."""

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [M, K] -> x Wᵀ + bias [M, N]; bias [N] or None. A kernel that adds the bias itself overrides this."""
        y = self(x)
        return y if bias is None else y + bias

    @abstractmethod
    def rows(self, index: Tensor) -> Tensor:
        """Rows of the weight as an embedding reads them: index [n] -> [n, K] in the problem's dtype."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole weight [N, K], formed in float32 and rounded once to `dtype`."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything held in memory."""

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        return self.tensors[0].device


class Implementation(PackedWeight):
    """An entry of the table in `dispatch`: says what it can run, and packs."""

    NAME: ClassVar[str]

    @classmethod
    @abstractmethod
    def refuse(cls, problem: Problem) -> str | None:
        """None if this implementation can run the problem, else why not."""

    @classmethod
    @abstractmethod
    def describe(cls, problem: Problem) -> str:
        """What it does for a problem it can run: operator, limits, bits per weight in memory."""

    @classmethod
    @abstractmethod
    def prepare(cls, qt: Any, problem: Problem) -> Self:
        """Pack `qt` (a QuantizedTensor, or a SplitTensor for schemes that are not plain), which stays as it is.

        Columns are taken as stored: `dispatch.prepare` sees to `qt.order`.
        """


@cache
def cpu_features() -> frozenset[str]:
    """What this machine's CPU offers, as torch reports it (lower `ATEN_CPU_CAPABILITY` is honoured)."""
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX512"):
        return frozenset()
    found = {AVX512}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported():
        found.add(NATIVE_BF16)
    if torch.cpu._is_vnni_supported() and _int_mm_is_exact():
        found.add(VNNI)
    return frozenset(found)


def cuda_features(device: torch.device | str = "cuda") -> frozenset[str]:
    """What a CUDA device and the installed Triton offer. BitwrightError if torch sees no such device."""
    index = torch.device(device).index
    if (index or 0) >= torch.cuda.device_count():
        raise BitwrightError(
            f"device {str(device)!r} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices; use cpu"
        )
    return _cuda_features(torch.cuda.current_device() if index is None else index)


@cache
def _cuda_features(index: int) -> frozenset[str]:
    capability = torch.cuda.get_device_capability(index)
    # ROCm calls its devices cuda too; our kernels hold PTX.
    if torch.version.cuda is None or capability < _TRITON_CAPABILITY or find_spec("triton") is None:
        return frozenset()
    found = {TRITON}
    if triton_version() in GLUON_VERSIONS:
        found.add(GLUON)
    if capability[0] == 9:
        found.add(HOPPER)
    if capability >= _PDL_CAPABILITY and (triton_version() or (0, 0)) >= _PDL_TRITON:
        found.add(PDL)
    if capability[0] == 9 and nvrtc.missing() is None:  # what we have in CUDA C++ is for Hopper
        found.add(NVRTC)
    if torch.backends.cusparselt.is_available():
        found.add(CUSPARSELT)
    return frozenset(found)


def triton_version() -> tuple[int, int] | None:
    """(major, minor) of the installed Triton, without importing it; None if there is none that states one."""
    for distribution in ("triton", "pytorch-triton"):  # nightly builds of torch bring the second
        try:
            major, minor = version(distribution).split(".")[:2]
            return int(major), int(minor)
        except (PackageNotFoundError, ValueError):
            continue
    return None


def _int_mm_is_exact() -> bool:
    """Without VNNI, torch._int_mm adds products in 16 bits that saturate, and says nothing; so it is tried once."""
    largest = torch.full((2, 64), 127, dtype=torch.int8)
    exact = 64 * 127 * 127
    return all(bool((torch._int_mm(largest[:m], largest.t()) == exact).all()) for m in (1, 2))
