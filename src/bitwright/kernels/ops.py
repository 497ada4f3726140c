"""Every operator that torch knows of us: schemas, shapes for tracing, and which code runs them.

An operator call is opaque to torch.compile and to CUDA graphs alike, and costs a few microseconds; so there is one per
linear, with the bias in it. `kernel` says what runs on a GPU: "hopper" (Hopper, with a compiler for CUDA C++), "gluon"
(Hopper), "triton" (any), or "dequantize" (a temporary 16-bit weight and cuBLAS); `cuda` chooses, not this file. On a
CPU every kernel is the same slow and obvious program.

Kernels are imported at their first call: importing this file loads neither Triton nor CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import SchemeError
from bitwright.kernels import fragments as slow
from bitwright.kernels.fragments import BAND, COLUMNS, ROWS, Fragments

_HALF = (torch.bfloat16, torch.float16)
_HOPPER = ("hopper", "gluon")
DEQUANTIZE = "dequantize"  # the kernel that is a temporary weight and cuBLAS

_library = torch.library.Library("bitwright", "DEF")


def _cpu_linear(
    x: Tensor,
    words: Sequence[Tensor],
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    N: int,
    bits: int,
    group_size: int,
    kernel: str,
) -> Tensor:
    weight = slow.dequantize(_fragments(words, scale, zero, N, x.shape[1], bits, group_size), x.dtype)
    y = x.to(torch.float32) @ weight.to(torch.float32).t()
    return (y if bias is None else y + bias.to(torch.float32)).to(x.dtype)


def _cuda_linear(
    x: Tensor,
    words: Sequence[Tensor],
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    N: int,
    bits: int,
    group_size: int,
    kernel: str,
) -> Tensor:
    if x.shape[0] == 0 or N == 0:
        return x.new_empty(x.shape[0], N)
    _check(x, scale, kernel)
    packed = _fragments(words, scale, zero, N, x.shape[1], bits, group_size)
    if kernel == DEQUANTIZE:
        weight = _dequantize_kernel()(packed, x.dtype)
        return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
    return _linear_kernel(kernel)(x.contiguous(), packed, bias)


def _fake_linear(
    x: Tensor, words: Sequence[Tensor], scale: Tensor, zero: Tensor | None, bias: Tensor | None, N: int, *rest: object
) -> Tensor:
    return x.new_empty(x.shape[0], N)


def _cpu_experts(
    x: Tensor,
    offsets: Tensor,
    words: Sequence[Tensor],
    scale: Tensor,
    zero: Tensor | None,
    N: int,
    bits: int,
    group_size: int,
    kernel: str,
    settled: bool = False,
) -> Tensor:
    packed = _fragments(words, scale, zero, N, x.shape[1], bits, group_size)
    y = x.new_zeros(x.shape[0], N)
    for e, (first, last) in enumerate(zip(offsets.tolist(), offsets[1:].tolist(), strict=False)):
        one = [t[e] for t in packed.words], packed.scale[e], None if packed.zero is None else packed.zero[e]
        y[first:last] = _cpu_linear(x[first:last], *one, None, N, bits, group_size, kernel)
    return y


def _cuda_experts(
    x: Tensor,
    offsets: Tensor,
    words: Sequence[Tensor],
    scale: Tensor,
    zero: Tensor | None,
    N: int,
    bits: int,
    group_size: int,
    kernel: str,
    settled: bool = False,
) -> Tensor:
    if x.shape[0] == 0 or N == 0:
        return x.new_empty(x.shape[0], N)
    _check(x, scale, kernel)
    if offsets.dtype != torch.int32 or offsets.shape != (scale.shape[0] + 1,):
        raise SchemeError(
            f"offsets must be int32 [{scale.shape[0] + 1}], not {offsets.dtype} {list(offsets.shape)}: where each "
            "expert's rows begin, and where the last one's end"
        )
    packed = _fragments(words, scale, zero, N, x.shape[1], bits, group_size)
    return _experts_kernel(kernel)(x.contiguous(), offsets, packed, settled=settled)


def _fake_experts(
    x: Tensor, offsets: Tensor, words: Sequence[Tensor], scale: Tensor, zero: Tensor | None, N: int, *rest: object
) -> Tensor:
    return x.new_empty(x.shape[0], N)


def _cpu_dequantize(
    words: Sequence[Tensor],
    scale: Tensor,
    zero: Tensor | None,
    N: int,
    K: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    return slow.dequantize(_fragments(words, scale, zero, N, K, bits, group_size), dtype)


def _cuda_dequantize(
    words: Sequence[Tensor],
    scale: Tensor,
    zero: Tensor | None,
    N: int,
    K: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    packed = _fragments(words, scale, zero, N, K, bits, group_size)
    if dtype in _HALF and scale.dtype in (dtype, torch.float32):
        return _dequantize_kernel()(packed, dtype)
    return slow.dequantize(packed, dtype)  # float32 is asked for by people, not by kernels


def _fake_dequantize(
    words: Sequence[Tensor],
    scale: Tensor,
    zero: Tensor | None,
    N: int,
    K: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    return scale.new_empty(N, K, dtype=dtype)


def _check(x: Tensor, scale: Tensor, kernel: str) -> None:
    """Kernels read the bits of x and of the scales as they are: a wrong dtype would give wrong numbers in silence."""
    if x.dtype not in _HALF or scale.dtype not in ((x.dtype,) if kernel in _HOPPER else (x.dtype, torch.float32)):
        raise SchemeError(
            f"kernel {kernel!r} cannot multiply {x.dtype} activations with {scale.dtype} scales; pack the weight for "
            "activations of this dtype"
        )


def _fragments(
    words: Sequence[Tensor], scale: Tensor, zero: Tensor | None, N: int, K: int, bits: int, group_size: int
) -> Fragments:
    """The operands as one value; a kernel would read past the end of weights that do not fit x, so they must."""
    blocks = ((N + BAND - 1) // BAND, (K + COLUMNS - 1) // COLUMNS, BAND // ROWS)
    if words[0].shape[-4:-1] != blocks:
        raise SchemeError(
            f"words {list(words[0].shape)} cannot hold a weight [{N}, {K}], whose blocks are {list(blocks)}; x must be "
            "[M, K] of the weight that was packed"
        )
    return Fragments(tuple(words), scale, zero, N, K, bits, group_size)


@cache
def _linear_kernel(kernel: str) -> Callable[..., Tensor]:
    if kernel == "hopper":
        from bitwright.kernels.hopper import linear
    elif kernel == "gluon":
        from bitwright.kernels.gluon.gemm import linear
    elif kernel == "triton":
        from bitwright.kernels.triton.gemm import linear
    else:
        raise SchemeError(f"no kernel {kernel!r} for a linear; there are hopper, gluon, triton and {DEQUANTIZE}")
    return linear


@cache
def _experts_kernel(kernel: str) -> Callable[..., Tensor]:
    if kernel == "hopper":
        from bitwright.kernels.hopper import experts
    elif kernel == "gluon":
        from bitwright.kernels.gluon.gemm import experts
    elif kernel == "triton":
        from bitwright.kernels.triton.experts import linear as experts
    else:
        raise SchemeError(f"no kernel {kernel!r} for experts; there are hopper, gluon and triton")
    return experts


@cache
def _dequantize_kernel() -> Callable[[Fragments, torch.dtype], Tensor]:
    from bitwright.kernels.triton.dequantize import dequantize

    return dequantize


def _on_its_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` with the device of its first argument current: Triton launches on the current one, wherever x lies."""

    def guarded(first: Any, *rest: Any) -> Any:
        device = first.device if isinstance(first, Tensor) else first[0].device
        if device.index == torch.cuda.current_device():
            return run(first, *rest)
        with torch.cuda.device(device):
            return run(first, *rest)

    return guarded


def define(name: str, schema: str, cpu: Any, cuda: Any, fake: Any) -> Any:
    """Register one operator; returns it, ready to be called."""
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, cpu, "CPU")
    _library.impl(name, _on_its_device(cuda), "CUDA")
    torch.library.register_fake(f"bitwright::{name}", fake, lib=_library)
    return getattr(torch.ops.bitwright, name).default


# x [M, K] -> x Wᵀ + bias [M, N] in the dtype of x; bias [N] of that dtype.
fragment_linear = define(
    "fragment_linear",
    "(Tensor x, Tensor[] words, Tensor scale, Tensor? zero, Tensor? bias, int N, int bits, int group_size, str kernel)"
    " -> Tensor",
    _cpu_linear,
    _cuda_linear,
    _fake_linear,
)

# x [T, K] sorted by expert, offsets int32 [E + 1] on the same device -> [T, N]: rows offsets[e] .. offsets[e+1] - 1
# meet the weight of expert e. Rows from offsets[E] on are unspecified.
# settled promises that the offsets are complete before this launch may begin, so that it need not wait for the one
# before it to read them: an earlier call on this stream, itself without the promise, was given the same offsets. It
# waited for them before anything launched after it could begin, whatever stands in between.
fragment_experts = define(
    "fragment_experts",
    "(Tensor x, Tensor offsets, Tensor[] words, Tensor scale, Tensor? zero, int N, int bits, int group_size, "
    "str kernel, bool settled=False) -> Tensor",
    _cpu_experts,
    _cuda_experts,
    _fake_experts,
)

# The weight [N, K], formed in float32 and rounded once to `dtype`.
fragment_dequantize = define(
    "fragment_dequantize",
    "(Tensor[] words, Tensor scale, Tensor? zero, int N, int K, int bits, int group_size, ScalarType dtype) -> Tensor",
    _cpu_dequantize,
    _cuda_dequantize,
    _fake_dequantize,
)
