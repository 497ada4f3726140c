"""2:4 codes in the order of sparse tensor cores, the operator on a CPU, and what the kernel compiles to for Hopper."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sparse_cases
import torch
from gpu.int8_cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_cases import pruned
from split_cases import PlainInput, random_split_tensor
from torch.nn.functional import pad

from bitwright.errors import DependencyError, SchemeError
from bitwright.kernels import dispatch, int8_fragments, reference, sparse_fragments
from bitwright.kernels.int8_ops import int8_linear
from bitwright.kernels.nvrtc import compile as nvrtc
from bitwright.kernels.problem import CUSPARSELT, GLUON, HOPPER, NVRTC, TRITON, Problem
from bitwright.kernels.sparse_mma import SparseMma
from bitwright.kernels.sparse_ops import int8_sparse_linear
from bitwright.kernels.split_cuda import SplitMma
from bitwright.kernels.split_sparse import SplitSparse
from bitwright.scheme import Scheme

BF16, FP16 = torch.bfloat16, torch.float16
ON_HOPPER = frozenset({TRITON, GLUON, HOPPER, CUSPARSELT, NVRTC})


def random_codes(N: int, B: int, bits: int, seed: int = 0) -> torch.Tensor:
    limit = 1 << (bits - 1)
    codes = torch.randint(-limit, limit, (N, B), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    return pruned(codes, seed)


# --- the layout


@settings(max_examples=40, deadline=None)
@given(N=st.integers(0, 70), B=st.integers(1, 400), bits=st.sampled_from([4, 8]), seed=st.integers(0, 100))
def test_codes_come_back(N: int, B: int, bits: int, seed: int) -> None:
    codes = random_codes(N, B, bits, seed)
    before = codes.clone()
    blocks = sparse_fragments.pack(codes, bits)
    Bp = int8_fragments.padded(B)
    assert tuple(blocks.shape) == (-(-N // 16), Bp // 128, sparse_fragments.block_bytes(bits))
    assert blocks.dtype == torch.int8 and torch.equal(codes, before)
    assert torch.equal(sparse_fragments.unpack(blocks, N, B, bits), codes)
    whole = sparse_fragments.unpack(blocks, blocks.shape[0] * 16, Bp, bits)
    assert not whole[N:].any() and not whole[:, B:].any()
    index = torch.randint(max(N, 1), (min(N, 5),), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(sparse_fragments.unpack_rows(blocks, index, B, bits), codes[index])


@pytest.mark.parametrize("bits", [4, 8])
def test_pieces_give_the_same_order(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(100, 200, bits)
    whole = sparse_fragments.pack(codes, bits)
    monkeypatch.setattr(sparse_fragments, "_CHUNK", 1)
    assert torch.equal(sparse_fragments.pack(codes, bits), whole)
    assert torch.equal(sparse_fragments.unpack(whole, 100, 200, bits), codes)


def test_bits_per_weight() -> None:
    assert 8 * sparse_fragments.block_bytes(4) == 3 * 16 * 128
    assert 8 * sparse_fragments.block_bytes(8) == 5 * 16 * 128


@pytest.mark.parametrize("bits", [4, 8])
def test_the_order_is_the_one_of_the_instruction(bits: int) -> None:
    """Every group of a block against PTX's figures: the registers of its codes, the metadata of its columns."""
    codes = random_codes(16, 256, bits)
    block = sparse_fragments.pack(codes, bits)[0, 1].view(torch.uint8).tolist()
    where = len(block) - 256
    for row in range(16):
        for group in range(32):
            k, inside = group // 16, group % 16  # a product takes 64 columns: 16 groups
            half, g = row // 8, row % 8
            # Eight groups to a lane of four that share a row; the even ones hold rows g, the odd ones rows g + 8.
            word_at = where + 8 * (4 * g + 2 * (inside // 8) + half) + 4 * k
            nibble = int.from_bytes(block[word_at : word_at + 4], "little") >> 4 * (inside % 8) & 15
            first, second = nibble & 3, nibble >> 2
            assert first < second
            values = codes[row, 128 + 4 * group : 132 + 4 * group].tolist()
            for i, column in enumerate((first, second)):
                kept = 2 * inside + i  # of 32 bytes a row and product, as in a dense m64nNk32
                lane, register, byte = 4 * g + kept % 16 // 4, 2 * (kept // 16) + half, kept % 4
                if bits == 8:
                    found = block[512 * k + 16 * lane + 4 * register + byte]
                else:  # rows g in low nibbles, rows g + 8 in high ones
                    found = block[16 * lane + 8 * k + 4 * (register // 2) + byte] >> 4 * (register % 2) & 15
                assert found == values[column] % (1 << bits)
            assert not any(values[c] for c in range(4) if c not in (first, second))


def test_groups_with_fewer_nonzeros_have_valid_columns() -> None:
    """No word is below that of columns 0 and 1 in every group: the kernel takes less for rows that are not there."""
    codes = torch.zeros(16, 128, dtype=torch.int8)
    codes[0, 3], codes[1, 5] = 7, -8
    words = sparse_fragments.pack(codes, 4)[0, 0, -256:].contiguous().view(torch.int32).tolist()
    for word in words:
        assert word & 0xFFFFFFFF >= 0x44444444
        nibbles = [word >> 4 * j & 15 for j in range(8)]
        assert all(n & 3 < n >> 2 for n in nibbles)
    assert torch.equal(sparse_fragments.unpack(sparse_fragments.pack(codes, 4), 16, 128, 4), codes)


def test_a_group_of_three_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(40, 256, 4)
    codes[37, 132:135] = 1
    codes[37, 135] = 0
    for chunk in (1, 1 << 22):
        monkeypatch.setattr(sparse_fragments, "_CHUNK", chunk)
        with pytest.raises(SchemeError, match="row 37, columns 132 to 135: 3 codes are not 0, 2:4 allows 2"):
            sparse_fragments.pack(codes, 4)


# --- the operator


CASES = [Case(bias=True), Case(8, 8, M=2, O=24, bias=True), Case(4, 8, O=16, dtype=FP16), Case(M=0), Case(N=1, B=3)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_operator_is_that_of_dense_weights(case: Case) -> None:
    given = sparse_cases.operands(case)
    torch.library.opcheck(int8_sparse_linear, given)
    codes = sparse_fragments.unpack(given[4], case.N, case.B, case.bits)
    Bp = int8_fragments.padded(case.B)
    dense = int8_fragments.pack(codes) if case.bits == 4 else pad(codes, (0, Bp - case.B))
    assert torch.equal(int8_sparse_linear(*given), int8_linear(*given[:4], dense, *given[5:]))


def test_operands_that_do_not_fit_are_refused() -> None:
    given = sparse_cases.operands(Case(O=16))
    for i, value, message in (
        (9, 3, "of 4 or 8 bits, not of 3"),
        (11, 0, "0 base columns"),
        (10, 200, r"weight must be .*\[13, 3, 768\]"),
        (9, 8, r"weight must be .*\[5, 3, 1280\]"),
        (11, 64, r"codes must be .*\[5, 128\]"),
    ):
        changed = list(given)
        changed[i] = value
        with pytest.raises(SchemeError, match=message):
            int8_sparse_linear(*changed)


# --- the implementation


def problem(text: str, N: int = 64, K: int = 256, **changes: Any) -> Problem:
    rest = {"dtype": BF16, "scale_dtype": BF16, "device": "cuda", "features": ON_HOPPER} | changes
    return Problem(N=N, K=K, scheme=Scheme.parse(text), **rest)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("text", ["w4a4-24", "w4a4-o24-24", "w4a8-24", "w8a8-24", "w8a8-o16-24"])
def test_a_linear_is_the_reference(text: str, dtype: torch.dtype) -> None:
    tensor = random_split_tensor(40, 160, text, shuffled=True, dtype=dtype)
    packed = SparseMma(problem(text, 40, 160, dtype=dtype), tensor, PlainInput(tensor.split))
    x, bias = torch.randn(7, 160).to(dtype), torch.randn(40).to(dtype)
    want = reference.split_linear(x, tensor) + bias.float()
    torch.testing.assert_close(packed.linear(x, bias).float(), want, rtol=torch.finfo(dtype).eps, atol=1e-4)
    assert torch.equal(packed.dequantize(), tensor.dequantize())
    index = torch.tensor([3, 0, 39, 3])
    assert torch.equal(packed.rows(index), tensor.dequantize(dtype)[index])
    dense = SplitMma(problem(text, 40, 160, dtype=dtype), tensor, PlainInput(tensor.split))
    assert torch.equal(packed.linear(x, bias), dense.linear(x, bias))
    q = packed.quantizer.codes(x)
    base = replace(q, outliers=q.outliers[:, :0].contiguous())
    assert torch.equal(packed.without_outliers().multiply(base), dense.without_outliers().multiply(base))
    indices = tensor.split.base_idx.nbytes + tensor.split.outlier_idx.nbytes
    stated = SparseMma.describe(problem(text, 40, 160))
    assert f"{(packed.nbytes - indices) * 8 / (40 * 160):.2f} bits per weight" in stated


@pytest.mark.parametrize(
    ("text", "features", "expected"),
    [
        ("w4a4-o16-24", ON_HOPPER, SparseMma),
        ("w4a8-24", ON_HOPPER - {GLUON}, SparseMma),
        ("w4a4-o16-24", ON_HOPPER - {NVRTC}, SplitMma),
        ("w4a4-o16-24", ON_HOPPER - {NVRTC, GLUON}, SplitSparse),
        ("w4a4-o16-24", ON_HOPPER - {HOPPER}, SplitSparse),
        ("w4a4-o16", ON_HOPPER, SplitMma),
        ("w8a8-24", ON_HOPPER, SparseMma),
        ("w8a8-24", ON_HOPPER - {NVRTC}, SplitSparse),
    ],
)
def test_choice(text: str, features: frozenset[str], expected: type) -> None:
    assert dispatch.choose(problem(text, features=features)).implementation is expected


@pytest.mark.parametrize(
    ("text", "changes", "reason"),
    [
        ("w4a4", {}, "takes 2:4 weights"),
        ("w4a16-24", {}, "takes quantized activations"),
        ("w4a4-24", {"device": "cpu"}, "runs on a CUDA device only"),
        ("w4a4-24", {"features": ON_HOPPER - {HOPPER}}, "needs a Hopper GPU"),
        ("w4a4-24", {"features": ON_HOPPER - {NVRTC}}, "needs NVRTC"),
    ],
)
def test_refusals_have_reasons(text: str, changes: dict[str, Any], reason: str) -> None:
    candidates = {c.name: c for c in dispatch.explain(problem(text, **changes))}
    assert not candidates["int8-sparse-mma"].usable and reason in candidates["int8-sparse-mma"].reason


# --- the kernel


def test_without_the_compiler_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(["/nowhere/libnvrtc.so.13"]))
    nvrtc._load.cache_clear()
    nvrtc.missing.cache_clear()
    try:
        assert "install nvidia-cuda-nvrtc" in (nvrtc.missing() or "")
        with pytest.raises(DependencyError, match="install nvidia-cuda-nvrtc"):
            nvrtc.compiled("sparse_int8.cu", (), ("-DNOT=1",))
    finally:
        nvrtc._load.cache_clear()
        nvrtc.missing.cache_clear()


def test_a_compiler_that_compiles_nothing_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> tuple[bytes, str]:
        raise nvrtc.CompileError("no second half")

    monkeypatch.setattr(nvrtc, "_load", lambda: (object(), None))
    monkeypatch.setattr(nvrtc, "_compile", refuse)
    nvrtc.missing.cache_clear()
    try:
        assert nvrtc.missing() == "no second half"
    finally:
        nvrtc.missing.cache_clear()


def test_nothing_is_loaded_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from bitwright.kernels.nvrtc import launch
    from bitwright.kernels.nvrtc.driver import DriverError

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    c = replace(launch.choose(2048, 8192, 256, 4, None, BF16, 132), BAND=7)
    with pytest.raises(DriverError, match=r"not loaded yet.*run the linear once"):
        launch.kernel(c, 0)


def choices() -> list[Any]:
    pytest.importorskip("triton")
    from bitwright.kernels.nvrtc.launch import choose

    kinds = [(None, BF16), (FP16, FP16), (torch.float32, BF16)]
    # Every tile, one block and two; one twice with another bias.
    shapes = [(1, 120), (1, 8192), (1, 57344), (2048, 8192), (2048, 8192), (2048, 1003)]
    found = [
        choose(M, N, O, bits, *kinds[(i + bits // 4 + O) % 3], 132)
        for i, (M, N) in enumerate(shapes)
        for bits in (4, 8)
        for O in (0, 256)
    ]
    wide = [choose(2048, 8192, 256, bits, None, BF16, 132) for bits in (4, 8)]
    return list(dict.fromkeys([*found, *(replace(c, TOKENS=tokens) for c in wide for tokens in (128, 160, 192))]))


def test_tiles_fit() -> None:
    from bitwright.kernels.nvrtc import launch

    for c in choices():
        assert c.stages >= 2 and c.shared <= launch.SHARED_MEMORY
        assert c.stage_bytes % launch._ALIGNMENT == 0, "the swizzle counts from a multiple of 1 KiB"
        assert not c.OUTLIERS or c.stage_bytes >= 2 * launch._OUTLIER_STEP * (c.ROWS + c.TOKENS)
        assert c.TOKENS // c.CLUSTER % 8 == 0, "halves begin where the swizzle does"
    assert launch.choose(2048, 8192, 256, 4, None, BF16, 132).TOKENS == 192, "three rounds, where 128 takes four"
    assert launch.choose(2048, 10240, 256, 4, None, BF16, 132).TOKENS == 160
    few = launch.choose(64, 8192, 256, 4, None, BF16, 132)
    assert (few.ROWS, few.TOKENS) == (128, 64), "32 tiles of 256 outputs would leave 100 processors idle"
    assert launch.choose(64, 57344, 256, 4, None, BF16, 132).ROWS == 256
    assert launch.choose(64, 128, 256, 4, None, BF16, 132).CLUSTER == 1, "the second block would have no rows"


@pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))
def test_compiles_for_hopper(tmp_path: Path) -> None:
    sass = pytest.importorskip("sass")
    for c in choices():
        cubin, said = c.cubin("--ptxas-options=-v")
        spilled = re.search(r"(\d+) bytes spill stores", said)
        assert spilled is not None
        # The widest tile fills the registers, and results written value by value need addresses: a few numbers may be
        # kept aside, but not in the loop over steps.
        assert int(spilled[1]) <= (64 if c.TOKENS == 192 else 0) + (0 if c.TMA_OUT else 128), f"{c}: {said}"
        assert "Loss" not in said and "serialized" not in said, f"{c}: {said}"
        code = sass.disassembled(cubin, tmp_path)
        # A step in halves, each of one or two blocks of 64 rows.
        products = re.findall(rf"IGMMA\.SP\.64x{c.TOKENS}x64\.S8\.S8 R\d+, R\d+, gdesc", code)
        assert len(products) == 2 * c.ROWS // 128
        # A fence of all memory as a stage is given back would cost more than its product.
        assert code.count("MEMBAR.ALL.GPU") == (1 if c.CLUSTER == 2 else 0), "only where the kernel ends"
        kind = "" if c.FLOAT16 else r"\.BF16"
        assert bool(re.search(rf"HGMMA\.64x{c.TOKENS}x16\.F32{kind} R\d+, gdesc", code)) == bool(c.OUTLIERS)
        assert "FFMA" not in code, "a product is fused with a sum"
        assert sass.loops(code) and not sass.overwritten(code), f"{c}: a register changes that a product may be reading"
        loops = [[operation for operation, _ in body] for body in sass.loops(code)]
        steps = [body for body in loops if any(operation.startswith("IGMMA") for operation in body)]
        assert steps and not [x for body in steps for x in body if x.startswith(("STL", "LDL"))], f"{c}: spilled"
        assert ("UTMASTG" in code) == bool(c.TMA_OUT)
        assert ("MULTICAST" in code) == (c.CLUSTER == 2)
