"""Where a model comes from: folders, GGUF files (against the gguf package's own dequantization), hub ids."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers as tf
from conftest import build_tiny, tiny_config
from safetensors.torch import load_file

from bitwright import cache as kept
from bitwright.errors import CheckpointError, DependencyError
from bitwright.models import source
from bitwright.models.load import open_model
from bitwright.models.source import resolve


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_folder_is_taken_as_it_is(tiny_folder, cache: Path) -> None:
    folder = tiny_folder("llama")
    assert resolve(str(folder)) == folder and resolve(folder) == folder
    assert not cache.exists()


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth"])
def test_pickled_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickled weights are refused"):
        resolve(tmp_path / name)


def test_other_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"a folder, a \.gguf file or a hub id"):
        resolve(tmp_path / "notes.txt")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c", "missing.gguf", ""])
def test_missing_path_is_not_taken_for_a_hub_id(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_from_hub", lambda *a: pytest.fail("asked the hub"))
    if name == "":
        monkeypatch.chdir("/")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        resolve(name or "no such folder")


def test_hub_id_is_downloaded_without_pickles_or_code(tiny_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[tuple[str, list[str]]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tiny_folder("llama"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("some-org/some.model-1B") == tiny_folder("llama")
    resolve("some-org/some.model-1B", trust_remote_code=True)
    (name, plain), (_, trusting) = asked
    assert name == "some-org/some.model-1B"
    assert "*.safetensors" in plain and not any(p.endswith((".bin", ".pt", ".py")) for p in plain)
    assert "*.py" in trusting


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*args: object, **kwargs: object) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"'some-org/model' is no local folder.*no route to host"):
        resolve("some-org/model")


def test_hub_model_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        resolve("some-org/model")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITWRIGHT_CACHE")
    assert kept.folder() == Path.home() / ".cache" / "bitwright"


# -------------------------------------------------------------------------------------------------------------- gguf


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A one-block Llama in GGUF, linears Q8_0, with what the gguf package makes of every tensor."""
    hidden, inner, vocab = 32, 64, 260
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    symbols = [
        "<s>",
        "</s>",
        "<|endoftext|>",
        "<pad>",
        "a",
        "b",
        "ab",
        "ba",
        *(chr(0x100 + i) for i in range(vocab - 8)),
    ]
    writer.add_token_list(symbols)
    writer.add_token_types([gguf.TokenType.CONTROL] * 4 + [gguf.TokenType.NORMAL] * (vocab - 4))
    writer.add_token_merges(["a b", "b a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (vocab, hidden),
        "output": (vocab, hidden),
        **{f"blk.0.attn_{p}": (hidden, hidden) for p in ("v", "output")},
        **{f"blk.0.attn_{p}": (hidden, hidden) for p in ("q", "k")},
        "blk.0.ffn_gate": (inner, hidden),
        "blk.0.ffn_up": (inner, hidden),
        "blk.0.ffn_down": (hidden, inner),
        "blk.0.attn_norm": (hidden,),
        "blk.0.ffn_norm": (hidden,),
        "output_norm": (hidden,),
    }
    values = {}
    for name, shape in shapes.items():
        tensor = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 2:
            packed = gguf.quants.quantize(tensor, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            tensor = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{name}.weight", tensor)
        values[name] = tensor
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, values


def test_gguf_becomes_a_plain_float32_folder(gguf_file, cache: Path) -> None:
    file, values = gguf_file
    folder = resolve(file)
    assert folder.parent == cache and folder.name.startswith("gguf-tiny-")
    stored = load_file(folder / "model.safetensors")
    names = {
        "token_embd": "model.embed_tokens",
        "output": "lm_head",
        "output_norm": "model.norm",
        "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
        "blk.0.attn_output": "model.layers.0.self_attn.o_proj",
        "blk.0.ffn_gate": "model.layers.0.mlp.gate_proj",
        "blk.0.ffn_up": "model.layers.0.mlp.up_proj",
        "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
    }
    for theirs, ours in names.items():
        assert torch.equal(stored[f"{ours}.weight"], torch.from_numpy(values[theirs])), ours
    # Rows of q and k are interleaved for rotary embeddings in GGUF: the same rows in another order.
    for p in "qk":
        rows = {tuple(row.tolist()) for row in stored[f"model.layers.0.self_attn.{p}_proj.weight"]}
        assert rows == {tuple(row.tolist()) for row in torch.from_numpy(values[f"blk.0.attn_{p}"])}
    source = open_model(folder)
    assert source.dtype == torch.float32 and len(source.structure.linears) == 7
    assert len(tf.AutoTokenizer.from_pretrained(folder)) == 260
    assert "quantization_config" not in source.config_dict


def test_gguf_is_converted_once(gguf_file, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = gguf_file
    first = resolve(file)
    monkeypatch.setattr(source, "_dequantize_gguf", lambda *a: pytest.fail("converted again"))
    assert resolve(file) == first
    assert [p.name for p in cache.iterdir()] == [first.name]


def test_another_gguf_of_the_same_name_gets_its_own_folder(gguf_file, tmp_path: Path, monkeypatch) -> None:
    made = []
    monkeypatch.setattr(source, "_dequantize_gguf", lambda file, work: made.append((work / "config.json").touch()))
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "tiny.gguf").write_bytes(bytes([i]))
    assert resolve(tmp_path / "0" / "tiny.gguf") != resolve(tmp_path / "1" / "tiny.gguf")
    assert len(made) == 2


def test_damaged_gguf_is_one_clear_error_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(b"GGUF" + b"\0" * 50)
    with pytest.raises(CheckpointError, match=r"bad\.gguf: transformers cannot read this GGUF"):
        resolve(file)
    assert not list(cache.iterdir())


def test_gguf_without_the_package(gguf_file, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DependencyError, match="extra `gguf`"):
        resolve(gguf_file[0])


def test_tiny_models_round_trip_through_their_folder(tmp_path: Path) -> None:
    model = build_tiny(tiny_config("llama"))
    model.save_pretrained(tmp_path / "m")
    loaded = open_model(resolve(tmp_path / "m")).materialize("")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded(ids).logits)
