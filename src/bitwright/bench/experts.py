"""The experts of a mixture layer: all of them in one launch, against a product per expert and torch's grouped product.

Tokens choose their experts at random, `top_k` different ones each, and arrive sorted by expert, as the layer has them
after routing. The routing is known to everybody before the clock starts: the loop over experts is spared the trip to
the CPU that it would cost in a model, so it is a strong baseline.

Only experts that got tokens have to be read; bytes and roofline count those alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from bitwright.bench import timing
from bitwright.bench.kernels import (
    CHECKED_TOKENS,
    Options,
    Progress,
    acceptable,
    ceiling_fields,
    compare,
    figures,
    off,
    rivals,
    speedups,
    timed_wrong,
)
from bitwright.bench.peers import DENSE, LIMITS
from bitwright.bench.records import FAILED, OK, WRONG, Record, failure, stamp
from bitwright.errors import BitwrightError
from bitwright.kernels import fragments, ops
from bitwright.kernels.cuda import GluonWeight, HopperWeight, TritonWeight
from bitwright.kernels.fragments import Fragments
from bitwright.kernels.problem import Problem, cuda_features
from bitwright.scheme import Scheme

GROUPED = "torch._grouped_mm"
LOOP = "loop of torch.mm"

Product = Callable[[], Tensor]


@dataclass(frozen=True)
class Routing:
    """Who goes where. offsets: int32 [E + 1] on the device, rows offsets[e] .. offsets[e + 1] - 1 of the sorted
    tokens belong to expert e; bounds: the same on the CPU."""

    offsets: Tensor
    bounds: tuple[int, ...]

    @classmethod
    def random(cls, tokens: int, experts: int, top_k: int, device: torch.device) -> Routing:
        """Every one of `tokens` goes to `top_k` different experts."""
        generator = torch.Generator().manual_seed(tokens)
        chosen = torch.rand(tokens, experts, generator=generator).topk(top_k, dim=1).indices
        counts = torch.bincount(chosen.flatten(), minlength=experts)
        offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(torch.int32)
        return cls(offsets.to(device), tuple(offsets.tolist()))

    @property
    def spans(self) -> list[tuple[int, slice]]:
        """(expert, its rows) of the experts that got tokens."""
        pairs = zip(self.bounds, self.bounds[1:], strict=False)
        return [(e, slice(a, b)) for e, (a, b) in enumerate(pairs) if b > a]


def run(options: Options, experts: int, top_k: int, progress: Progress | None = None) -> list[Record]:
    """All records of `measure`."""
    return [record for records in measure(options, experts, top_k, progress) for record in records]


def measure(options: Options, experts: int, top_k: int, progress: Progress | None = None) -> Iterator[list[Record]]:
    """The records of one shape (of each expert), scheme and number of tokens after the other."""
    device, dtype, schemes = options.resolve()
    if not 1 <= top_k <= experts:
        raise BitwrightError(f"top_k {top_k} of {experts} experts: choose between 1 and {experts}")
    if any(scheme.activation_bits != 16 for scheme in schemes):
        raise BitwrightError(f"experts are measured with 16-bit activations, not {', '.join(map(str, schemes))}")
    stamped = stamp(device, options.command)
    ceilings = timing.measure_ceilings(device, dtype)
    points = list(product(options.shapes, schemes))
    for done, ((N, K), scheme) in enumerate(points):
        if progress is not None:
            progress("experts", done, len(points), f"{experts} x {N}x{K} {scheme}")
        w = scheme.weight
        generator = torch.Generator(device).manual_seed(0)
        stack = fragments.random(N, K, w.bits, w.group_size, w.symmetric, dtype, device, experts, generator)
        for M in options.tokens:
            routing = Routing.random(M, experts, top_k, device)
            records = _Point(stack, scheme, routing, dtype, options.rotated(device)).measure(ceilings, options.repeats)
            about = {"benchmark": "experts", "experts": experts, "top_k": top_k, "tokens": M}
            yield [stamped | ceiling_fields(ceilings) | about | record for record in records]
    if progress is not None:
        progress("experts", len(points), len(points), "")


class _Point:
    """One stack of experts and one routing of tokens."""

    def __init__(self, stack: Fragments, scheme: Scheme, routing: Routing, dtype: torch.dtype, rotated: int) -> None:
        self.stack, self.scheme, self.routing, self.dtype = stack, scheme, routing, dtype
        self.device = stack.scale.device
        generator = torch.Generator(self.device).manual_seed(1)
        rows = routing.bounds[-1]
        self.x = torch.randn(rows, stack.K, device=self.device, generator=generator).to(dtype)
        self.rotated = rotated

    def measure(self, ceilings: timing.Ceilings, repeats: int) -> list[Record]:
        """One record per kernel of ours and per peer."""
        stack, limit = self.stack, LIMITS[self.dtype]
        used, rows = len(self.routing.spans), self.routing.bounds[-1]
        packed_bytes = used * stack.N * stack.K * self.scheme.weight.bits_per_weight(stack.K) / 8
        dense_bytes = used * stack.N * stack.K * self.dtype.itemsize
        variants = self._variants(packed_bytes, dense_bytes)
        checked = torch.linspace(0, rows - 1, min(rows, CHECKED_TOKENS), device=self.device).round().long()
        reference = self._expected(checked)
        ready: dict[str, timing.Round] = {}
        errors: dict[str, float] = {}
        reasons: dict[str, tuple[str, str]] = {}
        for name, (_, calls) in variants.items():
            try:
                errors[name], worst = compare(calls[0]()[checked], reference)
                if not acceptable(errors[name], worst, limit):
                    reasons[name] = (WRONG, off(errors[name], worst))
                    continue
                ready[name] = timing.ready(timing.enough(calls, 2 * rows * stack.N * stack.K, self.device), self.device)
            except Exception as e:
                # Another library, or a kernel that this GPU does not have: a row with the reason.
                reasons[name] = (FAILED, failure(e))
        timings = timing.interleaved(ready, repeats)
        for name in list(timings):
            reason = timed_wrong(ready[name], checked, reference, limit)
            if reason is not None:
                reasons[name] = (WRONG, reason)
                del timings[name]
        dense, best = rivals({name: kind for name, (kind, _) in variants.items()}, timings)
        records = []
        for name, (kind, _) in variants.items():
            record: Record = {
                "N": stack.N,
                "K": stack.K,
                "scheme": str(self.scheme),
                "dtype": str(self.dtype).removeprefix("torch."),
                "experts_used": used,
                "name": name,
                "kind": kind,
                "status": OK,
                "reason": None,
                "relative_error": errors.get(name),
            }
            if name in timings:
                weights = packed_bytes if kind == "ours" else dense_bytes
                moved = weights + rows * (stack.N + stack.K) * self.dtype.itemsize
                record |= figures(timings[name], moved, 2 * rows * stack.N * stack.K, ceilings)
                record |= speedups(timings[name], kind, dense, best)
            else:
                record["status"], record["reason"] = reasons[name]
            records.append(record)
        return records

    def _variants(self, packed_bytes: float, dense_bytes: float) -> dict[str, tuple[str, list[Product]]]:
        """name -> kind and calls over different copies."""
        stacks = [self.stack]
        stacks += [copy.deepcopy(self.stack) for _ in range(timing.copies(packed_bytes, self.rotated) - 1)]
        weights = [self._dense_weights()]
        weights += [weights[0].clone() for _ in range(timing.copies(dense_bytes, self.rotated) - 1)]
        variants: dict[str, tuple[str, list[Product]]] = {
            kernel: ("ours", [self._ours(stack, kernel) for stack in stacks]) for kernel in self._kernels()
        }
        variants[LOOP] = (DENSE, [self._loop(W) for W in weights])
        if hasattr(torch, "_grouped_mm"):
            variants[GROUPED] = ("peer", [self._grouped(W) for W in weights])
        return variants

    def _kernels(self) -> list[str]:
        """Ours that take such a weight on this GPU; on a CPU they are all one program."""
        if self.device.type != "cuda":
            return ["cpu"]
        s = self.stack
        features = cuda_features(self.device)
        problem = Problem(s.N, s.K, self.scheme, self.dtype, s.scale.dtype, "cuda", features)
        return [kind.NAME for kind in (HopperWeight, GluonWeight, TritonWeight) if kind.refuse(problem) is None]

    def _ours(self, s: Fragments, kernel: str) -> Product:
        x, offsets, words = self.x, self.routing.offsets, list(s.words)
        return lambda: ops.fragment_experts(x, offsets, words, s.scale, s.zero, s.N, s.bits, s.group_size, kernel)

    def _loop(self, W: Tensor) -> Product:
        x, spans = self.x, self.routing.spans

        def call() -> Tensor:
            y = x.new_empty(x.shape[0], W.shape[1])
            for e, rows in spans:
                torch.mm(x[rows], W[e].t(), out=y[rows])
            return y

        return call

    def _grouped(self, W: Tensor) -> Product:
        x, ends = self.x, self.routing.offsets[1:].contiguous()
        return lambda: torch._grouped_mm(x, W.transpose(1, 2), offs=ends)

    def _dense_weights(self) -> Tensor:
        """[E, N, K] in 16 bits."""
        s = self.stack
        weights = torch.empty(s.scale.shape[0], s.N, s.K, dtype=self.dtype, device=self.device)
        for e in range(s.scale.shape[0]):
            weights[e] = fragments.dequantize(_expert(s, e), self.dtype)
        return weights

    def _expected(self, checked: Tensor) -> Tensor:
        """float64 [n, N] of the rows `checked` of the sorted tokens."""
        expert = torch.bucketize(checked, self.routing.offsets[1:-1].long(), right=True)
        outputs = [
            self.x[row].double() @ fragments.dequantize(_expert(self.stack, e), torch.float32).double().t()
            for row, e in zip(checked.tolist(), expert.tolist(), strict=True)
        ]
        return torch.stack(outputs)


def _expert(s: Fragments, e: int) -> Fragments:
    """The weight of one expert of a stack."""
    zero = None if s.zero is None else s.zero[e]
    return Fragments(tuple(w[e] for w in s.words), s.scale[e], zero, s.N, s.K, s.bits, s.group_size)
