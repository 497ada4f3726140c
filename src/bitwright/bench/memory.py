"""What a model takes in memory at a scheme: weights as the kernels hold them, all else, and what is left to serve.

Bytes are computed from shapes and then checked: the packed matrices of one layer are made, and their bytes counted.
What is counted, all in bytes:

* *weights*: the linears of all layers as the GPU kernels hold them, padding, scales and zero points included; zeros of
  2:4 count (cuSPARSELt holds fewer);
* *other*: embedding, output head, norms, biases, routers in 16 bits;
* *cache*: keys and values of `batch` sequences of `context` tokens in 16 bits;
* *workspace*: the activations of one step, an estimate: the residual twice, the widest linear's input and output, all
  for the tokens of a step, and float32 logits of every sequence. A step is a token per sequence, and the prompt of one
  sequence, taken `PREFILL_TOKENS` at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from bitwright.bench.fitting import block_bytes
from bitwright.bench.kernels import DTYPES, Progress
from bitwright.bench.peers import random_weight
from bitwright.bench.records import FAILED, OK, WRONG, Record, failure, stamp
from bitwright.bench.schemes import linear_scheme
from bitwright.bench.shapes import LinearShape, ModelShape, models
from bitwright.bench.split import SplitLinear
from bitwright.devices import choose_device
from bitwright.errors import BitwrightError
from bitwright.kernels import fragments
from bitwright.kernels.problem import Problem
from bitwright.kernels.sparse_mma import SparseMma
from bitwright.kernels.split import SplitDequantized
from bitwright.kernels.split_cuda import SplitMma
from bitwright.scheme import UNQUANTIZED_BITS, Scheme

if TYPE_CHECKING:
    from rich.table import Table

DENSE = "16-bit"
PREFILL_TOKENS = 2048
DEFAULT_MEMORY = 80_000_000_000

_SIXTEEN_BITS = torch.bfloat16  # float16 takes the same


@dataclass(frozen=True)
class Options:
    """Models by name (`shapes`), schemes ("16-bit" is the model as it comes), sequences and their tokens.

    memory: bytes to fill; None = this GPU's, or 80 GB without one. check: whether to make the matrices of a layer.
    """

    models: tuple[str, ...] = ("llama-2-7b",)
    schemes: tuple[str, ...] = (DENSE, "w4a16-g128")
    batch: int = 1
    context: int = 2048
    memory: int | None = None
    dtype: str = "bfloat16"
    device: str = "auto"
    check: bool = True
    command: str | None = None


@dataclass(frozen=True)
class Use:
    """Bytes of a model in memory; see the module."""

    weights: int
    other: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.other + self.cache + self.workspace


def run(options: Options, progress: Progress | None = None) -> list[Record]:
    """One record per model and scheme."""
    if options.dtype not in ("bfloat16", "float16"):
        raise BitwrightError(f"dtype {options.dtype!r}: memory is counted with bfloat16 or float16 beside the weights")
    for name, value in (("batch", options.batch), ("context", options.context)):
        if value < 1:
            raise BitwrightError(f"{name} {value}: give a number from 1 up")
    device, dtype = choose_device(options.device), DTYPES[options.dtype]
    schemes = [None if s == DENSE else Scheme.parse(s) for s in options.schemes]
    memory = options.memory
    if memory is None:
        cuda = device.type == "cuda"
        memory = torch.cuda.get_device_properties(device).total_memory if cuda else DEFAULT_MEMORY
    stamped = stamp(device, options.command)
    points = list(product(map(models, options.models), schemes))
    records = []
    for done, (model, scheme) in enumerate(points):
        if progress is not None:
            progress("memory", done, len(points), f"{model.name} {scheme or DENSE}")
        record = stamped | _record(model, scheme, options, memory)
        if options.check and scheme is not None:
            record |= check_layer(model, scheme, dtype, device)
        records.append(record)
    if progress is not None:
        progress("memory", len(points), len(points), "")
    return records


def use(model: ModelShape, scheme: Scheme | None, batch: int, context: int) -> Use:
    """Bytes of `model` at `scheme` (None: 16 bits) with `batch` sequences of `context` tokens."""
    return Use(
        weights=model.layers * block_bytes(model, scheme, _SIXTEEN_BITS),
        other=2 * model.other_weights,
        cache=2 * model.kv_cache_values(batch, context),
        workspace=_workspace(model, batch, context),
    )


def largest_batch(model: ModelShape, scheme: Scheme | None, context: int, memory: int) -> int:
    """Sequences of `context` tokens that fit in `memory` bytes beside the weights; 0 if not even one does."""
    low, high = 0, 1
    while use(model, scheme, high, context).total <= memory:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if use(model, scheme, middle, context).total <= memory else (low, middle)
    return low


def check_layer(model: ModelShape, scheme: Scheme, dtype: torch.dtype, device: torch.device) -> Record:
    """Make the matrices of one layer, one after the other, and count: the computed figure must be theirs."""
    made = 0
    try:
        for x in model.linears:
            one = linear_scheme(x, model, scheme)
            assert one is not None, "a scheme was asked for"
            made += _made(x, one, dtype, device)
    except RuntimeError as e:  # out of memory, here or on the device
        return {"status": FAILED, "reason": failure(e), "layer_bytes_made": None}
    computed = block_bytes(model, scheme, dtype)
    if made == computed:
        return {"layer_bytes_made": made}
    return {"status": WRONG, "reason": f"a layer takes {made} bytes, not {computed}", "layer_bytes_made": made}


def _made(x: LinearShape, scheme: Scheme, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of a random matrix (or all experts of a stack) in the layout of the GPU kernels, made on `device`."""
    w = scheme.weight
    if scheme.activation_bits == UNQUANTIZED_BITS and scheme.plain:
        experts = None if x.count == 1 else x.count
        return fragments.random(x.N, x.K, w.bits, w.group_size, w.symmetric, dtype, device, experts).nbytes
    qt = random_weight(x.N, x.K, scheme, dtype, device)
    problem = Problem(x.N, x.K, scheme, dtype, dtype, device.type, frozenset())
    if scheme.activation_bits == UNQUANTIZED_BITS:
        return x.count * SplitDequantized.prepare(qt, problem).nbytes
    kind = SparseMma if scheme.sparse else SplitMma
    return x.count * SplitLinear.prepare(kind, qt, problem).weight.nbytes


def _workspace(model: ModelShape, batch: int, context: int) -> int:
    tokens = max(batch, min(context, PREFILL_TOKENS))
    routed = max(1, model.top_k)  # every token of a mixture stands in the input of that many experts
    widest = max(routed * (x.N + x.K) if x.count > 1 else x.N + x.K for x in model.linears)
    return 2 * tokens * (2 * model.hidden + widest) + 4 * batch * model.vocab


def _record(model: ModelShape, scheme: Scheme | None, options: Options, memory: int) -> Record:
    used = use(model, scheme, options.batch, options.context)
    stored = 8 * used.weights / model.linear_weights
    return {
        "benchmark": "memory",
        "model": model.name,
        "scheme": DENSE if scheme is None else str(scheme),
        "batch": options.batch,
        "context": options.context,
        "parameters": model.parameters,
        "weights_bytes": used.weights,
        "other_bytes": used.other,
        "cache_bytes": used.cache,
        "workspace_bytes": used.workspace,
        "total_bytes": used.total,
        "bits_per_weight": stored,
        "bits_per_parameter": 8 * (used.weights + used.other) / model.parameters,
        "memory_bytes": memory,
        "largest_batch": largest_batch(model, scheme, options.context, memory),
        "status": OK,
        "reason": None,
    }


def table(records: Sequence[Mapping[str, Any]]) -> Table:
    """The records for people: a row each, in GB (powers of 1000)."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("model", "scheme"):
        shown.add_column(title)
    for title in ("bits/weight", "weights", "other", "cache", "workspace", "total GB", "batch", "context"):
        shown.add_column(title, justify="right")
    shown.add_column("largest batch", justify="right")
    shown.add_column("")
    for r in records:
        parts = ("weights_bytes", "other_bytes", "cache_bytes", "workspace_bytes", "total_bytes")
        shown.add_row(
            r["model"],
            r["scheme"],
            f"{r['bits_per_weight']:.2f}",
            *(f"{r[part] / 1e9:.2f}" for part in parts),
            str(r["batch"]),
            str(r["context"]),
            f"{r['largest_batch']} in {r['memory_bytes'] / 1e9:.0f} GB",
            "" if r["status"] == OK else f"{r['status']}: {r['reason']}",
        )
    return shown
