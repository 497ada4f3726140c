"""The Hopper kernel where there is no GPU: its barriers, its PTX run by hand, and what it compiles to."""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bitwright.kernels import fragments
from bitwright.kernels.fragments import Kind
from bitwright.kernels.gluon.asm import dequantize_asm
from bitwright.kernels.gluon.config import Config, choose, choose_experts
from bitwright.qtensor import QuantizedTensor
from bitwright.scheme import WeightScheme

triton = pytest.importorskip("triton")
import sass  # noqa: E402
from hopper import Assembled, assemble, tensor  # noqa: E402

known = pytest.mark.skipif(
    not triton.__version__.startswith("3.6."), reason="the kernel is written for the Gluon of Triton 3.6"
)

PROCESSORS = 132


class Barrier:
    """An mbarrier: a wait for a parity ends while the phase before the current one has it."""

    def __init__(self, count: int) -> None:
        self.count, self.pending, self.bytes, self.phase = count, count, 0, 0

    def arrive(self, expected: int = 0) -> None:
        assert self.pending > 0, "one arrival too many"
        self.pending -= 1
        self.bytes += expected
        self._advance()

    def complete(self) -> None:
        self.bytes -= 1
        self._advance()

    def over(self, parity: int) -> bool:
        return (self.phase - 1) & 1 == parity

    def _advance(self) -> None:
        if self.pending == self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


def pipeline(NS: int, KWG: int, lengths: list[int], seed: int) -> None:
    """`_produce` and `_consume` of one row of warpgroups over pieces of these lengths, copies arriving in any order:
    AssertionError if a warpgroup reads what is not there, or if nobody can go on."""
    order = random.Random(seed)
    full, empty = ([Barrier(1) for _ in range(NS)] for _ in range(2))
    stages, coming, read = [-1] * NS, [], []

    def produce() -> Iterator[Callable[[], bool]]:
        for it in range(sum(lengths)):
            s = it % NS
            if it >= NS:
                yield lambda s=s, it=it: empty[s].over((it // NS) & 1 ^ 1)
            full[s].arrive(1)
            coming.append((s, it))
            yield lambda: True

    def consume(step: int) -> Iterator[Callable[[], bool]]:
        base = 0
        for length in lengths:
            it = base + (step + KWG - base % KWG) % KWG
            base += length
            for at in range(it, base, KWG):
                s = at % NS
                yield lambda s=s, at=at: full[s].over((at // NS) & 1)
                assert stages[s] == at, f"step {at} finds step {stages[s]}"
                read.append(at)
                empty[s].arrive()

    running = {agent: next(agent) for agent in (produce(), *map(consume, range(KWG)))}
    while running or coming:
        able = [agent for agent, ready in running.items() if ready()]
        assert able or coming, "all wait"
        if coming and (not able or order.random() < 0.3):
            s, it = coming.pop(order.randrange(len(coming)))
            stages[s] = it
            full[s].complete()
            continue
        agent = order.choice(able)
        try:
            running[agent] = next(agent)
        except StopIteration:
            del running[agent]
    assert sorted(read) == list(range(sum(lengths)))


@pytest.mark.parametrize("seed", range(100))
def test_warpgroups_read_the_steps_they_wait_for(seed: int) -> None:
    """Pieces of odd lengths, and few stages: no warpgroup may miss a phase of a barrier that it waits on."""
    lengths = random.Random(seed).choices(range(1, 24), k=6)
    for NS, KWG in ((4, 2), (6, 2), (8, 2), (3, 1)):
        pipeline(NS, KWG, lengths, seed)


def run_ptx(bits: int, kind: str, asymmetric: bool, late: bool, inputs: list[int]) -> list[int]:
    """The statement of `dequantize_asm`, instruction by instruction: 16-bit outputs."""
    text, constraints = dequantize_asm(bits, kind, asymmetric, late)
    outputs = constraints.split(",").count("=h")
    assert constraints.split(",").count("r") == len(inputs)
    registers: dict[str, int] = {f"${outputs + i}": value for i, value in enumerate(inputs)}

    def value(name: str) -> int:
        return int(name, 16) if name.startswith("0x") else int(name) if name.isdigit() else registers[name]

    def floats(pair: int) -> torch.Tensor:
        halves = torch.tensor([pair & 0xFFFF, pair >> 16], dtype=torch.int32).to(torch.uint16)
        return halves.view(torch.bfloat16 if kind == "bf16" else torch.float16).to(torch.float64)

    def pair(numbers: torch.Tensor) -> int:
        low, high = numbers.to(torch.bfloat16 if kind == "bf16" else torch.float16).view(torch.uint16).tolist()
        return low | high << 16

    for line in text.splitlines():
        if line.startswith(("{", "}", ".reg")):
            continue
        operation, rest = line.rstrip(";").split(" ", 1)
        if rest.endswith("}, p"):
            low, high = re.findall(r"\$\d+", rest)
            registers[low], registers[high] = registers["p"] & 0xFFFF, registers["p"] >> 16
            continue
        target, *arguments = rest.split(", ")
        a = [value(x) for x in arguments]
        name = operation.split(".")[0]
        if name == "mov":
            registers[target] = a[0]
        elif name == "shr":
            registers[target] = a[0] >> a[1]
        elif name == "and":
            registers[target] = a[0] & a[1]
        elif name == "lop3":
            mask = 0xFFFFFFFF
            terms = ((a[0] if i & 4 else ~a[0]) & (a[1] if i & 2 else ~a[1]) & (a[2] if i & 1 else ~a[2])
                     for i in range(8) if a[3] >> i & 1)  # fmt: skip
            result = 0
            for term in terms:
                result |= term & mask
            registers[target] = result
        elif name in ("add", "sub", "mul"):
            x, y = floats(a[0]), floats(a[1])
            registers[target] = pair({"add": x + y, "sub": x - y, "mul": x * y}[name])
        elif name == "fma":
            registers[target] = pair(floats(a[0]) * floats(a[1]) + floats(a[2]))
        else:
            raise AssertionError(f"unknown instruction {line}")
    return [registers[f"${i}"] for i in range(outputs)]


def pair_of(number: float, kind: str) -> int:
    half = struct.unpack("<H", struct.pack("<e", number))[0] if kind == "fp16" else None
    if half is None:
        half = struct.unpack("<I", struct.pack("<f", number))[0] >> 16
    return half | half << 16


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_ptx_gives_the_weights_bit_for_bit(bits: int, kind: str, asymmetric: bool, late: bool) -> None:
    """Lane by lane over packed blocks, against `QuantizedTensor.dequantize`; with late scales, at a scale of one."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    scheme = WeightScheme(bits, None, symmetric=not asymmetric)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(scheme.qmin, scheme.qmax + 1, (16, 64), generator=generator).to(torch.int8)
    zero = torch.randint(scheme.qmin, scheme.qmax + 1, (16, 1), generator=generator).to(torch.int8)
    scale = (torch.randn(16, 1, generator=generator) * 0.1).to(dtype)
    if late:
        scale = torch.ones_like(scale)
    qt = QuantizedTensor(codes, scale, zero if asymmetric else None, scheme)
    expected = qt.dequantize(dtype).view(torch.uint16).to(torch.int32)
    words = [w.view(-1).to(torch.int64) & 0xFFFFFFFF for w in fragments.pack(qt, dtype).words]
    for lane in range(32):
        g, t = lane // 4, lane % 4
        rows = [pair_of(float(scale[g]), kind), pair_of(float(scale[g + 8]), kind)]
        zeros = [pair_of(float(zero[g]), kind), pair_of(float(zero[g + 8]), kind)]
        for call in range({4: 4, 2: 2, 3: 1, 8: 8}[bits]):
            if bits == 3:
                mine = [words[0][2 * lane], words[0][2 * lane + 1], words[1][lane]]
                first, rows_here, zeros_here = 0, rows * 2, zeros * 2
            else:
                at = {4: 4 * lane + call, 2: 2 * lane + call, 8: 128 * (call // 4) + 4 * lane + call % 4}[bits]
                mine, first, rows_here, zeros_here = [words[0][at]], call * (32 // bits // 2), rows, zeros
            inputs = [int(w) for w in mine] + ([] if late else rows_here) + (zeros_here if asymmetric else [])
            for i, half in enumerate(run_ptx(bits, kind, asymmetric, late, inputs)):
                f, e = first + i // 2, i % 2
                row = 8 * (f & 1) + g
                column = 32 * (f >> 3) + 16 * (f >> 2 & 1) + 8 * (f >> 1 & 1) + 2 * t + e
                found = int(expected[row, column])
                # 0 and -0 are the same weight.
                assert half == found or (half | found) == 0x8000, (lane, call, i)


def _gathered(stage: torch.Tensor, layout: Any) -> torch.Tensor:
    """[warps, lanes, registers] of a tensor in a linear layout."""
    index = torch.zeros(1, dtype=torch.int64)
    strides = torch.tensor(stage.stride())
    for bases in (layout.reg_bases, layout.lane_bases, layout.warp_bases):
        for base in bases:
            index = torch.cat((index, index + int((torch.tensor(base) * strides).sum())))
    return stage.reshape(-1)[index].view(1 << len(layout.warp_bases), 1 << len(layout.lane_bases), -1)


@known
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("N, K", [(16, 40), (200, 448), (320, 128)])
@pytest.mark.parametrize("M", [1, 64, 2048])
def test_lanes_get_their_words(bits: int, N: int, K: int, M: int) -> None:
    """A box of TMA, as the descriptor and the step say, and what of it each lane reads: rows 16w .. 16w + 15 of every
    band for warp w; zeros past the end."""
    from bitwright.kernels.gluon.fragment import stage, word_layout
    from bitwright.kernels.gluon.gemm import _stages

    c = choose(M, Kind(57344, 8192, bits, 128, torch.bfloat16), PROCESSORS)
    f = fragments.random(N, K, bits, K, True, torch.bfloat16, "cpu", generator=torch.Generator().manual_seed(bits))
    bands, columns = c.BN // 64, c.BK // 64
    for plane, (words, width) in enumerate(zip(f.words, fragments.WORDS[bits], strict=True)):
        padded = torch.zeros(f.words[0].shape[0] + bands, words.shape[1] + columns, 4, width, dtype=torch.int32)
        padded[: words.shape[0], : words.shape[1]] = words
        table = _stages(f, plane, c)
        assert table.strides[0] == table.shape[1] * table.shape[2] and table.strides[1:] == [table.shape[2], 1]
        assert table.shape[0] * table.strides[0] == words.numel()
        assert max(table.block_shape) <= 256, "the most that TMA takes along one side"
        view = words.view(table.shape)
        assert table.block_shape == stage(bits, plane, bands, columns)
        for n, k in ((n, k) for n in range(-(-N // c.BN)) for k in range(-(-K // c.BK))):
            inside = view[n * bands : (n + 1) * bands, k * table.block_shape[1] : (k + 1) * table.block_shape[1]]
            box = torch.zeros(table.block_shape, dtype=torch.int32)
            box[: inside.shape[0], : inside.shape[1]] = inside
            for part in range(c.NWG // c.KWG):
                mine = box[part * c.REST : (part + 1) * c.REST]
                found = _gathered(mine, word_layout(bits, plane, c.REST, columns))
                first = n * bands + part * c.REST
                rows = padded[first : first + c.REST, k * columns : (k + 1) * columns]
                # [bands, column blocks, warps, (halves of 8 bits), lanes, words of a lane]
                rows = rows.unflatten(3, (2, 32, 4) if bits == 8 else (1, 32, -1))
                assert torch.equal(found, rows.permute(2, 4, 0, 1, 3, 5).flatten(2))


def compiled(c: Config, folder: Path) -> Assembled:
    """A configuration for sm_90."""
    from triton.experimental.gluon import language as gl

    from bitwright.kernels.gluon.fragment import stage
    from bitwright.kernels.gluon.kernel import fragment_gemm

    packed, row, tokens = (
        gl.NVMMASharedLayout(0, 32, 3),
        gl.NVMMASharedLayout(0, 16, 2),
        gl.NVMMASharedLayout(128, 16, 2),
    )
    written = [min(c.BM, 32), 64 * c.REST] if c.TMA_OUT else [c.BM, c.BK]
    signature = {
        "words0_desc": tensor("i32", stage(c.BITS, 0, c.BN // 64, c.BK // 64), packed),
        "words1_desc": tensor("i32", stage(c.BITS, 1 if c.BITS == 3 else 0, c.BN // 64, c.BK // 64), packed),
        "x_desc": tensor(c.KIND, [c.BM, c.BK], tokens),
        "scale_desc": tensor(c.KIND, [c.GROUPS, c.BN], row),
        "zero_desc": tensor(c.KIND, [c.GROUPS, c.BN], row),
        "out_desc": tensor(c.KIND, written, tokens),
        "out": f"*{c.KIND}",
        "bias": f"*{c.KIND}",
        "partial": "*fp32",
        "counters": "*i32",
        "offsets": "*i32",
        **{name: "i32" for name in ("M", "N", "K", "bands", "groups", "tiles_whole", "per")},
    }
    aligned = ("out", "bias", "partial", "counters", "N", "K")
    return assemble(fragment_gemm, signature, c, aligned, {"launch_pdl": True, "maxnreg": c.MAXNREG}, folder)


HOT = (
    [
        choose(M, Kind(N, 8192, bits, 128, torch.bfloat16, asymmetric), PROCESSORS)
        for M, N, bits, asymmetric in (
            (1, 4096, 4, False),
            (16, 8192, 4, True),
            (16, 8192, 3, False),
            (1, 8192, 2, False),
            (1, 8192, 8, True),
            (64, 8192, 4, False),
            (64, 8192, 3, True),
            (64, 57344, 4, False),
            (64, 57344, 3, True),
            (64, 57344, 8, True),
            (256, 8192, 4, False),
            (2048, 8192, 4, True),
            (2048, 8192, 3, False),
        )
    ]
    + [
        choose_experts(M, 8, Kind(14336, 4096, 4, 128, torch.bfloat16), s)
        for M, s in ((2, False), (2, True), (4096, True))
    ]
    + [choose(300, Kind(8192, 8192, 4, 32, torch.float16, True, True), PROCESSORS)]
    + [  # several groups a step: each with a product of its own, or with scales on the weights
        choose(M, Kind(22016, 8192, bits, group, torch.bfloat16, asymmetric), PROCESSORS)
        for M, bits, group, asymmetric in (
            (1, 4, 64, False),
            (16, 4, 64, True),
            (1, 3, 64, True),
            (1, 2, 64, False),
            (1, 4, 32, False),
            (16, 8, 32, True),
            (64, 4, 32, True),
        )
    ]
)


def _name(c: Config) -> str:
    return f"w{c.BITS}-{c.BM}x{c.BN}x{c.BK}-{c.GROUPS}{'-experts' * bool(c.EXPERTS)}"


@known
@pytest.mark.parametrize("c", HOT, ids=_name)
def test_compiles_without_spills_for_hopper(c: Config, tmp_path: Path) -> None:
    made = compiled(c, tmp_path)
    ptx, said, spilled = made.ptx, made.said, made.spilled
    # A few numbers kept aside between tiles cost nothing; in the loop it would be hundreds of bytes.
    assert spilled <= 32
    # A warning of this family says that the products of a step no longer run beside the making of the next operand.
    assert "wgmma" not in said, said
    # The weight is the left operand and comes from four registers a thread, never from shared memory.
    products = re.findall(r"wgmma\.mma_async\S+ \{[^}]*\}, (\{[^}]*\}|%\w+),", ptx)
    assert products and all(left.count("%") == 4 for left in products)
    assert f"m64n{c.BM}k16" in ptx
    # Scales meet weights, or the sums of a step: one or the other.
    assert bool(re.search(r"mul\.rn\.b?f16x2", ptx)) != c.LATE and ("fma.rn.f32" in ptx) == c.LATE
    # Nothing writes a register that a product may still be reading, in the loop of either kind of warpgroup.
    code = sass.disassembled(made.cubin, tmp_path)
    assert sass.loops(code) and not sass.overwritten(code)


@known
@pytest.mark.parametrize("settled", [False, True])
def test_experts_wait_before_they_read_what_may_not_be_there(settled: bool, tmp_path: Path) -> None:
    """Offsets and the first words before the wait if the offsets are settled, tokens after it; and the next kernel may
    not begin before this one has waited. Programs without work may have a wait of their own."""
    ptx = compiled(choose_experts(2, 8, Kind(14336, 4096, 4, 128, torch.bfloat16), settled), tmp_path).ptx
    found = re.findall(r"griddepcontrol\.(wait|launch_dependents)|(ld\.global\.b32)|(cp\.async\.bulk\.tensor)", ptx)
    marks = ["".join(kinds) for kinds in found]
    first = marks.index("wait")
    assert ("ld.global.b32" in marks[:first]) == settled
    assert marks[:first].count("cp.async.bulk.tensor") == (2 if settled else 0)  # words and scales
    assert marks[first:].count("cp.async.bulk.tensor") == (4 if settled else 6)  # tokens of a step are two boxes
    launches = [m for m in marks if m in ("wait", "launch_dependents")]
    waits = launches.count("wait")
    assert launches[:2] == ["wait", "launch_dependents"]
    assert launches == ["wait", "launch_dependents"] * waits if settled else waits == 1
