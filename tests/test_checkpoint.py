"""The shard reader against safetensors' own files, the shard writer against safetensors' own reader, bad files."""

from __future__ import annotations

import errno
import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bitwright.errors import CheckpointError, OutputError
from bitwright.models import shards as module
from bitwright.models.checkpoint import INDEX, SINGLE, Checkpoint, read_config
from bitwright.models.shards import ShardWriter

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
)


def example(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    values = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bits."""
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards written by safetensors, with an index."""
    parts = {
        "model-00001-of-00002.safetensors": {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5)},
        "model-00002-of-00002.safetensors": {"c": torch.zeros(2, 2, dtype=torch.float16)},
    }
    for file, tensors in parts.items():
        save_file(tensors, tmp_path / file, {"format": "pt"})
    weight_map = {name: file for file, tensors in parts.items() for name in tensors}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def edit_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = {f"t.{i}": example(d, (3, 5), i) for i, d in enumerate(DTYPES)}
    tensors |= {"scalar": torch.tensor(7.0), "empty": torch.empty(0, 4)}
    save_file(tensors, tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.names == tuple(sorted(tensors))
    for name, tensor in tensors.items():
        assert same(checkpoint.get(name), tensor), name
        assert checkpoint.shape(name) == tuple(tensor.shape) and checkpoint.dtype(name) == tensor.dtype
    assert checkpoint.bytes == sum(t.numel() * t.element_size() for t in tensors.values())


def test_reads_shards_by_index(sharded: Path) -> None:
    checkpoint = Checkpoint(sharded)
    assert checkpoint.names == ("a", "b", "c")
    assert torch.equal(checkpoint.get("a"), torch.arange(12.0).reshape(3, 4))
    assert checkpoint.file("c").name == "model-00002-of-00002.safetensors"
    assert len(checkpoint.files) == 2


def test_tensor_owns_its_memory(sharded: Path) -> None:
    checkpoint = Checkpoint(sharded)
    checkpoint.get("a").fill_(-1)
    assert torch.equal(checkpoint.get("a"), torch.arange(12.0).reshape(3, 4))


def test_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
        Checkpoint(sharded)


@pytest.mark.parametrize("left", [0, 7, 40, -1])
def test_truncated_shard_is_named(sharded: Path, left: int) -> None:
    file = sharded / "model-00001-of-00002.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:left])
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors: truncated"):
        Checkpoint(sharded)


def test_shard_with_extra_bytes_is_refused(sharded: Path) -> None:
    file = sharded / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="longer than its header"):
        Checkpoint(sharded)


def test_tensor_of_the_index_that_no_shard_holds(sharded: Path) -> None:
    edit_index(sharded, lambda m: m.update(ghost="model-00001-of-00002.safetensors"))
    with pytest.raises(CheckpointError, match=r"'ghost'.*model-00001-of-00002"):
        Checkpoint(sharded)


def test_tensor_that_lies_in_another_shard(sharded: Path) -> None:
    edit_index(sharded, lambda m: m.update(a="model-00002-of-00002.safetensors"))
    with pytest.raises(CheckpointError, match="'a'"):
        Checkpoint(sharded)


def test_tensor_in_two_shards(sharded: Path) -> None:
    save_file({"a": torch.zeros(1), "c": torch.zeros(1)}, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="'a' is in both"):
        Checkpoint(sharded)


def test_index_cannot_leave_the_folder(sharded: Path) -> None:
    edit_index(sharded, lambda m: m.update(a="../secret.safetensors"))
    with pytest.raises(CheckpointError, match=r"\.\./secret"):
        Checkpoint(sharded)


def test_index_without_a_map(sharded: Path) -> None:
    (sharded / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="not a shard index"):
        Checkpoint(sharded)


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    with pytest.raises(CheckpointError, match="download the index"):
        Checkpoint(sharded)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: pickled weights are refused.*save_pretrained"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"), [("adapter_model.safetensors", "adapter"), ("README.md", "no weights here")]
)
def test_folder_without_a_model(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


def write_raw(file: Path, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "cannot lie"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "cannot lie"),
        ({"dtype": "Q4", "shape": [2], "data_offsets": [0, 8]}, "dtype Q4"),
        ({"dtype": "F32", "shape": [2]}, "not a safetensors header"),
    ],
)
def test_header_that_makes_no_sense(tmp_path: Path, entry: dict, message: str) -> None:
    write_raw(tmp_path / SINGLE, {"w": entry}, b"\0" * 8)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


def test_header_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", 4) + b"GGUF")
    with pytest.raises(CheckpointError, match="not a safetensors header"):
        Checkpoint(tmp_path)


def test_unknown_tensor_name(sharded: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor 'd' among its 3"):
        Checkpoint(sharded).get("d")


def test_file_that_shrinks_while_in_use(sharded: Path) -> None:
    checkpoint = Checkpoint(sharded)
    file = sharded / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        for name in ("a", "b"):
            checkpoint.get(name)


@pytest.mark.parametrize("text", ["[1]", "{", None])
def test_config_that_cannot_be_read(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


# ------------------------------------------------------------------------------------------------------------ writer


@settings(max_examples=25, deadline=None)
@given(
    specs=st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=8),
    limit=st.integers(1, 400),
)
def test_written_shards_read_back(tmp_path_factory: pytest.TempPathFactory, specs: list, limit: int) -> None:
    folder = tmp_path_factory.mktemp("out")
    tensors = {f"m.{i}.weight": example(d, tuple(shape), i) for i, (d, shape) in enumerate(specs)}
    with ShardWriter(folder, limit) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)  # safetensors' own reader: needs tensors aligned to their elements
        data = sum(t.numel() * t.element_size() for t in part.values())
        assert data <= limit or len(part) == 1 or sum(t.numel() > 0 for t in part.values()) == 1
        found |= part
    ours = Checkpoint(folder)
    assert set(found) == set(tensors) == set(ours.names)
    assert all(same(found[n], t) and same(ours.get(n), t) for n, t in tensors.items())
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_names_and_index_are_the_usual_ones(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "new" / "folder", 16) as writer:
        for i in range(3):
            writer.add(f"t{i}", torch.full((4,), float(i)))
    folder = tmp_path / "new" / "folder"
    index = json.loads((folder / INDEX).read_text())
    assert index["weight_map"] == {f"t{i}": f"model-0000{i + 1}-of-00003.safetensors" for i in range(3)}
    assert index["metadata"]["total_size"] == 48
    with safe_open(folder / "model-00002-of-00003.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"} and torch.equal(f.get_tensor("t1"), torch.ones(4))


def test_one_shard_is_model_safetensors(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.add("b", torch.zeros(3, dtype=torch.uint8))
        writer.add("a", torch.ones(2, 2).T[:, :1])  # strided
    assert [p.name for p in tmp_path.iterdir()] == [SINGLE]
    assert torch.equal(load_file(tmp_path / SINGLE)["a"], torch.ones(2, 1))


def test_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("x", "y"):
        with ShardWriter(tmp_path / name) as writer:
            for i in range(5):
                writer.add(f"t{i}", example(DTYPES[i], (7, 3), i))
    assert (tmp_path / "x" / SINGLE).read_bytes() == (tmp_path / "y" / SINGLE).read_bytes()


def test_nothing_looks_complete_before_close(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 8)
    for i in range(3):
        writer.add(f"t{i}", torch.zeros(2))
        assert not list(tmp_path.glob("model*"))
    writer.close()
    assert len(list(tmp_path.glob("model*.safetensors"))) == 3


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path, 8) as writer:
        for i in range(3):
            writer.add(f"t{i}", torch.zeros(2))
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_run_are_cleared(tmp_path: Path) -> None:
    ShardWriter(tmp_path).add("t", torch.zeros(2))  # never closed
    with ShardWriter(tmp_path) as writer:
        writer.add("t", torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == [SINGLE]


def test_a_folder_that_holds_a_model_is_refused(sharded: Path) -> None:
    with pytest.raises(OutputError, match="already holds model-00001-of-00002"):
        ShardWriter(sharded)


def test_a_name_can_be_written_once(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.add("t", torch.zeros(2))
    with pytest.raises(OutputError, match="'t' was added twice"):
        writer.add("t", torch.zeros(2))


def test_dtype_that_safetensors_lacks(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="complex64"):
        ShardWriter(tmp_path).add("t", torch.zeros(2, dtype=torch.complex64))


def test_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = ShardWriter(tmp_path)
    writer.add("t", torch.zeros(2))
    monkeypatch.setattr(module, "_copy_range", full)
    with pytest.raises(OutputError, match=r"No space left on device.*free space"):
        writer.close()
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write weights"):
        ShardWriter(tmp_path / "file" / "out")
