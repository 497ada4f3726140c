"""Attention of one new token: problems in which what is not there yet is NaN, and what must come out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.kernels import attention
from bitwright.kernels.elementwise import rope_tables

Decode = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """`heads` of queries on `kv_heads` of keys, D numbers each, caches for S tokens."""

    heads: int
    kv_heads: int
    D: int = 128
    S: int = 300
    rope: bool = True
    dtype: torch.dtype = torch.bfloat16

    @property
    def positions(self) -> tuple[int, ...]:
        """Of six sequences: the first token, a cache that is full, and some between."""
        return 0, 1, 37, self.S // 2, self.S - 1, self.S + 3


def operands(case: Case, device: str = "cpu") -> tuple[Tensor | None, ...]:
    """qkv, cos, sin, positions, keys, values."""
    generator = torch.Generator().manual_seed(0)
    B = len(case.positions)
    qkv = torch.randn(B, (case.heads + 2 * case.kv_heads) * case.D, generator=generator).to(case.dtype)
    size = B, case.kv_heads, case.S, case.D
    keys, values = (torch.randn(size, generator=generator).to(case.dtype) for _ in range(2))
    for b, position in enumerate(case.positions):
        keys[b, :, position:] = values[b, :, position:] = float("nan")
    cos, sin = rope_tables(case.S, case.D, 10000.0, "cpu") if case.rope else (None, None)
    given = qkv, cos, sin, torch.tensor(case.positions, dtype=torch.int32), keys, values
    return tuple(None if t is None else t.to(device) for t in given)


def check_attend(attend: Callable[..., Tensor], case: Case, device: str = "cpu") -> None:
    """`attend(queries, keys, values, lengths, scale)` of caches whose first lengths[b] keys are filled."""
    qkv, _, _, positions, keys, values = operands(case, device)
    assert qkv is not None and positions is not None and keys is not None and values is not None
    some = positions > 0  # of no key at all nothing is asked
    queries = qkv.view(len(qkv), -1, case.D)[some, : case.heads].contiguous()
    given = queries, keys[some].contiguous(), values[some].contiguous(), positions[some].contiguous()
    expected = attention.attend_reference(*given[:3], given[3] - 1)
    y = attend(*given, case.D**-0.5)
    torch.testing.assert_close(y.float(), expected.float(), rtol=2e-2, atol=1e-3, msg=lambda m: f"{case}: {m}")


def check(decode: Decode, case: Case, device: str = "cpu") -> None:
    """`decode(qkv, cos, sin, positions, keys, values)` against its twin: results, and what it leaves in the caches."""
    *given, keys, values = operands(case, device)
    ours, theirs = ((keys.clone(), values.clone()) for _ in range(2))
    expected = attention.decode_reference(*given, *theirs)
    y = decode(*given, *ours)
    assert y.shape == expected.shape and y.dtype == case.dtype
    # One rounding of the result, and in the twin one of what it is made of.
    torch.testing.assert_close(y.float(), expected.float(), rtol=2e-2, atol=1e-3, msg=lambda m: f"{case}: {m}")
    for mine, twin in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            mine, twin, rtol=2e-2, atol=1e-2, equal_nan=True, msg=lambda m: f"{case}, cache: {m}"
        )
