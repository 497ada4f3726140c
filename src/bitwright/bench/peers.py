"""Who is measured: everything of ours that takes a problem, and what others offer for the same one.

Ours are the entries of the table in `kernels.dispatch`. On a GPU an entry is more than one program: up to some number
of tokens it calls its kernel, beyond that it dequantizes for cuBLAS. Here each kernel runs by itself at every number of
tokens, and dequantize + cuBLAS beside it, so that one can see where that number should lie; `chosen` says which of them
an ordinary call would take.

A `Contender` knows why it is absent, or how to prepare itself from a `QuantizedTensor`; preparing gives a callable
x [M, K] -> [M, N]. All of them start from the same weight, so all can be checked against the same reference. Packages
of others are imported when they are asked for and never installed; one that is not there says so.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from bitwright.bench.split import SplitLinear, expected_split, random_split
from bitwright.errors import BitwrightError
from bitwright.kernels import dispatch, ops
from bitwright.kernels.cuda import FragmentWeight, gemm_above
from bitwright.kernels.fragments import Fragments, pack
from bitwright.kernels.problem import Problem
from bitwright.kernels.reference import quantize_activations
from bitwright.kernels.split_cuda import Int8Weight
from bitwright.kernels.split_sparse import SparseValues
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import Scheme
from bitwright.split import SplitTensor

Weight = QuantizedTensor | SplitTensor
Linear = Callable[[Tensor], Tensor]

DENSE, DEQUANTIZED = "dense", "dequantize+dense"
TINYGEMM, HUMMING, GEMLITE = "tinygemm", "humming", "gemlite"
PEERS = (DENSE, TINYGEMM, HUMMING, GEMLITE)

# Relative Frobenius error allowed against float64. In 16 bits, weights and outputs are rounded once each; a path that
# does more than that is a bug.
LIMITS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_ROUNDED_TO_4 = 0.3  # what 4-bit codes of Gaussian activations may be off by: a step is about half a standard deviation
_REQUANTIZED = 5e-2  # of a peer that finds the grid of the dequantized weight again by itself
# tinygemm holds an activation tile of at most 16 tokens and reads the weight again for every one: not made for prefill.
_TINYGEMM_TOKENS = 64


@dataclass(frozen=True)
class Contender:
    """Somebody who may run the problem.

    kind: "ours", "dense" (16-bit weights, the baseline) or "peer". absent: why it cannot be measured, or None. note:
    what it does. limit: relative error against float64. max_tokens: M above which it is left out.
    """

    name: str
    kind: Literal["ours", "dense", "peer"]
    note: str
    absent: str | None
    prepare: Callable[[Any], Linear]
    limit: float
    max_tokens: int | None = None

    def bytes_per_call(self, N: int, K: int, scheme: Scheme, dtype: torch.dtype) -> float:
        """Bytes of weight that must be read once: 16-bit ones for the baseline, else what the scheme stores."""
        bits = 8 * dtype.itemsize if self.kind == "dense" else scheme.bits_per_weight(N, K)
        return N * K * bits / 8

    def copies(self, qt: Weight, count: int) -> list[Linear]:
        """`count` of it over different memory, the first prepared from `qt`."""
        first = self.prepare(qt)
        others: list[Linear] = []
        for _ in range(count - 1):
            try:
                others.append(copy.deepcopy(first))
            except (TypeError, RuntimeError):  # handles of other libraries need not be copyable
                others.append(self.prepare(qt))
        return [first, *others]


def contenders(
    qt: Weight, scheme: Scheme, dtype: torch.dtype, device: torch.device, peers: tuple[str, ...] = PEERS
) -> list[Contender]:
    """Ours in order of preference, then `peers` (names from `PEERS`)."""
    unknown = set(peers) - set(PEERS)
    if unknown:
        raise BitwrightError(f"no peer {sorted(unknown)[0]!r}; choose from {', '.join(PEERS)}")
    problem = Problem.of(qt, scheme, dtype, device)
    makers: dict[str, Callable[[Problem], Contender]] = {
        DENSE: _dense,
        TINYGEMM: _tinygemm,
        HUMMING: _humming,
        GEMLITE: _gemlite,
    }
    return [*_ours(problem), *(makers[name](problem) for name in peers)]


def chosen(problem: Problem, M: int) -> str:
    """Name of the contender that an ordinary call with M tokens runs."""
    choice = dispatch.choose(problem)
    if issubclass(choice.implementation, FragmentWeight):
        above = gemm_above(problem, choice.name)
        if above is not None and above < M:
            return DEQUANTIZED
    return choice.name


def random_weight(N: int, K: int, scheme: Scheme, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Weight:
    """A weight on the scheme's grid with codes over its whole range and outputs near 1, scales of both signs where no
    input is split."""
    if not scheme.plain:
        return random_split(N, K, scheme, dtype, device, seed)
    w = scheme.weight
    generator = torch.Generator(device).manual_seed(seed)
    grid = (N, w.num_groups(K))
    codes = torch.randint(w.qmin, w.qmax + 1, (N, K), dtype=torch.int8, device=device, generator=generator)
    size = (torch.rand(grid, device=device, generator=generator) + 0.5) * (2 * K**-0.5 / (w.qmax - w.qmin))
    sign = torch.randint(0, 2, grid, device=device, generator=generator) * 2 - 1
    stored = torch.bfloat16 if dtype == torch.float32 else dtype
    zero = None
    if not w.symmetric:
        zero = torch.randint(w.qmin, w.qmax + 1, grid, dtype=torch.int8, device=device, generator=generator)
    return QuantizedTensor(codes, (size * sign).to(stored), zero, w)


def expected(x: Tensor, qt: Weight, scheme: Scheme) -> Tensor:
    """float64 [m, N] of a few tokens x [m, K]; the weight goes through in pieces, so that it fits beside the rest."""
    if isinstance(qt, SplitTensor):
        return expected_split(x, qt)
    N, K = qt.shape
    step = max(1, (1 << 26) // K)
    codes = scale = None
    if scheme.activation_bits == 8:
        codes, scale = quantize_activations(x)
    pieces = []
    for n in range(0, N, step):
        rows = slice(n, n + step)
        if codes is not None and scale is not None:
            exact = codes.double() @ qt.codes[rows].double().t()
            pieces.append(exact * scale.double() * qt.scale[rows].double().t())
            continue
        zero = None if qt.zero_point is None else qt.zero_point[rows]
        part = QuantizedTensor(qt.codes[rows], qt.scale[rows], zero, qt.scheme)
        pieces.append(x.double() @ part.dequantize(torch.float32).double().t())
    return torch.cat(pieces, dim=1)


def _ours(problem: Problem) -> list[Contender]:
    """Every entry of the table, its kernel alone where it has one, and dequantize + cuBLAS."""
    found: list[Contender] = []
    fragments: Contender | None = None
    for choice in dispatch.explain(problem):
        absent = None if choice.usable else choice.reason
        if issubclass(choice.implementation, FragmentWeight):
            entry = _fragment_kernel(choice.name, choice.name, choice.reason, absent, problem)
            fragments = fragments if absent else entry
        else:
            kernel = issubclass(choice.implementation, Int8Weight | SparseValues)
            taken = problem.device == "cuda" and any(other.absent is None for other in found)
            if taken and not kernel and absent is None:
                absent = "the last resort, left out where a kernel takes the problem"
            entry = _table_entry(choice, absent, problem)
        found.append(entry)
    if fragments is not None:
        note = "a temporary 16-bit weight for cuBLAS"
        found.append(_fragment_kernel(DEQUANTIZED, ops.DEQUANTIZE, note, None, problem))
    return found


def _table_entry(choice: dispatch.Choice, absent: str | None, problem: Problem) -> Contender:
    def prepare(qt: Weight) -> Linear:
        if issubclass(choice.implementation, Int8Weight):
            return SplitLinear.prepare(choice.implementation, qt, problem)
        return choice.implementation.prepare(qt, problem)

    return Contender(choice.name, "ours", choice.reason, absent, prepare, LIMITS[problem.dtype])


def _fragment_kernel(name: str, kernel: str, note: str, absent: str | None, problem: Problem) -> Contender:
    class Kernel:
        def __init__(self, packed: Fragments) -> None:
            self.operands = (list(packed.words), packed.scale, packed.zero, None)
            self.numbers = (packed.N, packed.bits, packed.group_size)

        def __call__(self, x: Tensor) -> Tensor:
            y: Tensor = ops.fragment_linear(x, *self.operands, *self.numbers, kernel)
            return y

    def prepare(qt: QuantizedTensor) -> Linear:
        return Kernel(pack(qt, problem.dtype))

    return Contender(name, "ours", note, absent, prepare, LIMITS[problem.dtype])


def _dense(problem: Problem) -> Contender:
    """torch.mm in the activations' dtype: cuBLAS on a GPU."""

    class Dense:
        def __init__(self, weight: Tensor) -> None:
            self.weight = weight

        def __call__(self, x: Tensor) -> Tensor:
            return torch.mm(x, self.weight.t())

    def prepare(qt: Weight) -> Linear:
        return Dense(qt.dequantize(problem.dtype))

    # The baseline does not round activations to 8 or 4 bits, and the reference does.
    limit = {16: LIMITS[problem.dtype], 8: _REQUANTIZED, 4: _ROUNDED_TO_4}[problem.scheme.activation_bits]
    dtype = str(problem.dtype).removeprefix("torch.")
    return Contender(DENSE, "dense", f"torch.mm on {dtype} weights", None, prepare, limit)


def _tinygemm(problem: Problem) -> Contender:
    """The int4 operator of PyTorch for CUDA: value (u - 8) * scale + offset, bf16."""

    class Tinygemm:
        def __init__(self, packed: Tensor, group: int, scale_offset: Tensor) -> None:
            self.packed, self.group, self.scale_offset = packed, group, scale_offset

        def __call__(self, x: Tensor) -> Tensor:
            return torch._weight_int4pack_mm(x, self.packed, self.group, self.scale_offset)

    def prepare(qt: QuantizedTensor) -> Linear:
        unsigned = qt.codes.to(torch.uint8) + 8
        packed = torch._convert_weight_to_int4pack((unsigned[:, ::2] << 4 | unsigned[:, 1::2]).contiguous(), 8)
        scale = qt.scale.float()
        offset = torch.zeros_like(scale) if qt.zero_point is None else -qt.zero_point.float() * scale
        scale_offset = torch.stack((scale, offset), dim=-1).transpose(0, 1).contiguous().to(torch.bfloat16)
        return Tinygemm(packed, qt.scheme.group_size or problem.K, scale_offset)

    w = problem.scheme.weight
    absent = _needs_cuda(problem)
    if absent is None and (not problem.scheme.plain or problem.scheme.activation_bits != 16 or w.bits != 4):
        absent = "takes 4-bit weights and 16-bit activations"
    if absent is None and problem.dtype != torch.bfloat16:
        absent = "takes bfloat16 activations"
    if absent is None and w.group_size not in (32, 64, 128, 256):
        absent = "takes groups of 32, 64, 128 or 256"
    if absent is None and (problem.N % 8 or problem.K % 128):
        absent = "takes N that 8 divides and K that 128 divides"
    # The offset of an asymmetric grid is rounded to bf16.
    limit = LIMITS[torch.bfloat16] if w.symmetric else _REQUANTIZED
    note = "torch._weight_int4pack_mm"
    return Contender(TINYGEMM, "peer", note, absent, prepare, limit, max_tokens=_TINYGEMM_TOKENS)


def _humming(problem: Problem) -> Contender:
    """humming-kernels, the JIT kernels that vLLM ships; needs a CUDA toolkit (CUDA_HOME)."""
    w = problem.scheme.weight

    def prepare(qt: QuantizedTensor) -> Linear:
        from humming.layer import HummingLayer

        N, K = qt.shape
        config: dict[str, Any] = {"dtype": f"int{w.bits}", "group_size": w.group_size or 0}
        layer: Any = HummingLayer(shape_n=N, shape_k=K, weight_config=config, torch_dtype=problem.dtype).cuda()
        layer.load_from_unquantized(qt.dequantize(problem.dtype))
        layer.transform()
        return cast(Linear, layer)

    absent = _needs_cuda(problem) or _needs_package("humming", "humming-kernels") or _needs_16_bits(problem)
    if absent is None and not w.symmetric:
        absent = "only symmetric grids are set up here: it finds the grid of a dequantized weight again by itself"
    return Contender(HUMMING, "peer", "humming-kernels, W4A16 and other widths", absent, prepare, _REQUANTIZED)


def _gemlite(problem: Problem) -> Contender:
    """gemlite: Triton kernels, value (u - zero) * scale."""
    w = problem.scheme.weight

    def prepare(qt: QuantizedTensor) -> Linear:
        import gemlite
        from gemlite import helper

        gemlite.set_autotune("fast")
        kind = {2: helper.A16W2_HQQ_INT, 4: helper.A16W4_HQQ_INT, 8: helper.A16W8_HQQ_INT}[w.bits]
        unsigned = (qt.codes.to(torch.int16) - w.qmin).to(torch.uint8)
        zero = torch.zeros_like(qt.scale) if qt.zero_point is None else qt.zero_point.to(qt.scale.dtype)
        zero = zero - w.qmin
        maker = kind(device=str(qt.codes.device), dtype=problem.dtype)
        return cast(Linear, maker.from_weights(unsigned, qt.scale.reshape(-1, 1), zero.reshape(-1, 1)))

    absent = _needs_cuda(problem) or _needs_package("gemlite", "gemlite") or _needs_16_bits(problem)
    if absent is None and w.bits not in (2, 4, 8):
        absent = "takes 2, 4 or 8 bits"
    # It multiplies by a scale and adds an offset, both rounded to 16 bits.
    return Contender(GEMLITE, "peer", "gemlite.helper.A16Wn_HQQ_INT", absent, prepare, _REQUANTIZED)


def _needs_cuda(problem: Problem) -> str | None:
    return None if problem.device == "cuda" else "runs on CUDA only"


def _needs_package(module: str, package: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return f"{package} is not installed"
    return None


def _needs_16_bits(problem: Problem) -> str | None:
    if problem.scheme.activation_bits != 16 or not problem.scheme.plain:
        return "measured with 16-bit activations only, and no columns apart"
    return None if problem.dtype in (torch.float16, torch.bfloat16) else "takes float16 or bfloat16 activations"
