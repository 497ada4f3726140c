"""Modules loaded one at a time against transformers' from_pretrained, bit for bit, and inputs that must be refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from conftest import FAMILIES, MOE_FAMILIES, build_tiny, tiny_config
from safetensors.torch import load_file, save_file

from bitwright.errors import CheckpointError, NumericsError, StructureError
from bitwright.models.checkpoint import INDEX, SINGLE, Checkpoint
from bitwright.models.load import companion_files, open_model


def reference(folder: Path, dtype: torch.dtype):
    return tf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def tokens(vocab: int = 320) -> torch.Tensor:
    return torch.randint(0, vocab, (2, 19), generator=torch.Generator().manual_seed(0))


class Stop(Exception):
    pass


def first_block_inputs(source, ids: torch.Tensor):
    """What block 0 receives, with nothing but the modules outside the blocks in memory."""
    caught = {}

    def catch(_module, args, kwargs):
        caught["inputs"] = (args, kwargs)
        raise Stop

    handle = source.model.get_submodule(source.structure.blocks[0].name).register_forward_pre_hook(
        catch, with_kwargs=True
    )
    with torch.no_grad(), pytest.raises(Stop):
        source.model(ids, use_cache=False)
    handle.remove()
    return caught["inputs"]


def check_block_by_block(folder: Path, dtype: torch.dtype, ids: torch.Tensor) -> None:
    source, whole = open_model(folder), reference(folder, dtype)
    source.materialize_rest(dtype)
    (hidden, *args), kwargs = first_block_inputs(source, ids)
    for block in source.structure.blocks:
        module = source.materialize(block.name, dtype)
        with torch.no_grad():
            ours = module(hidden, *args, **kwargs)
            theirs = whole.get_submodule(block.name)(hidden, *args, **kwargs)
        ours, theirs = (x[0] if isinstance(x, tuple) else x for x in (ours, theirs))
        assert ours.dtype == dtype and torch.equal(ours, theirs)
        hidden = ours
        source.release(block.name)
        assert all(p.is_meta for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_bit_identical_to_from_pretrained(tiny_folder, family: str, dtype: torch.dtype) -> None:
    check_block_by_block(tiny_folder(family), dtype, tokens())


@pytest.mark.parametrize("name", ["opt", "falcon", "mixtral"])
def test_trained_models_are_bit_identical_to_from_pretrained(fixture_model, name: str) -> None:
    check_block_by_block(fixture_model(name), torch.float32, tokens(8192))


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_model_has_every_tensor_of_from_pretrained(tiny_folder, family: str) -> None:
    folder = tiny_folder(family, torch.float16)
    source = open_model(folder)
    assert source.dtype == torch.float16
    for dtype in (torch.float16, torch.float32):  # the second is not the dtype it was opened at
        model, whole = source.materialize("", dtype), reference(folder, dtype)
        for ours, theirs in (
            (model.state_dict(), whole.state_dict()),
            (dict(model.named_buffers()), dict(whole.named_buffers())),
        ):
            assert list(ours) == list(theirs)
            for key, tensor in theirs.items():
                assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key
        with torch.no_grad():
            assert torch.equal(model(tokens()).logits, whole(tokens()).logits)
        source.release("")
        assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("family", MOE_FAMILIES)
@pytest.mark.parametrize("unfuse_first", [True, False])
def test_unfused_before_or_after_loading(tiny_folder, family: str, unfuse_first: bool) -> None:
    folder = tiny_folder(family)
    source, stored = open_model(folder), load_file(folder / SINGLE)
    block = source.structure.blocks[-1]
    if unfuse_first:
        source.unfuse(block.name)
    source.materialize(block.name)
    if not unfuse_first:
        source.unfuse(block.name)
    for linear in block.all_linears:
        assert torch.equal(source.model.get_submodule(linear.name).weight, stored[f"{linear.disk_name}.weight"])
    source.release(block.name)
    module = source.materialize(block.name)  # fused again, and loadable again
    whole = reference(folder, torch.float32).get_submodule(block.name)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("unfused", [True, False])
def test_only_the_tensors_of_a_block_are_read(
    tiny_folder, family: str, unfused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_model(tiny_folder(family))
    read: list[str] = []
    get = Checkpoint.get
    monkeypatch.setattr(Checkpoint, "get", lambda self, name: (read.append(name), get(self, name))[1])
    if unfused:
        source.unfuse("model.layers.1")
    source.materialize("model.layers.1")
    expected = [n for n in source.checkpoint.names if n.startswith("model.layers.1.")]
    assert sorted(read) == expected, "each once, and no other"
    read.clear()
    source.materialize_rest()
    assert sorted(read) == [n for n in source.checkpoint.names if ".layers." not in n]


def test_opening_reads_no_weights(tiny_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder("mixtral")
    monkeypatch.setattr(Checkpoint, "get", lambda self, name: pytest.fail(f"read {name}"))
    source = open_model(folder)
    assert all(p.is_meta for p in source.model.parameters())
    assert source.model.model.rotary_emb.inv_freq.device.type == "cpu"
    assert source.config_dict["model_type"] == source.config.model_type == "mixtral"


def test_sharded_checkpoint(tiny_folder) -> None:
    folder = tiny_folder("llama", max_shard_size="20KB")
    assert len(Checkpoint(folder).files) > 2
    check_block_by_block(folder, torch.float32, tokens())


def test_parameters_that_stay_in_float32(tiny_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tf.LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["input_layernorm"])
    folder = tiny_folder("llama")
    ours = open_model(folder).materialize("", torch.bfloat16)
    theirs = reference(folder, torch.bfloat16)
    kinds = {n: p.dtype for n, p in theirs.named_parameters()}
    assert {n: p.dtype for n, p in ours.named_parameters()} == kinds
    assert set(kinds.values()) == {torch.float32, torch.bfloat16}


# ------------------------------------------------------------------------------------------------------------- names


def test_names_on_disk_follow_the_renaming(tiny_folder) -> None:
    source = open_model(tiny_folder("mixtral"))
    stack = source.structure.blocks[1].experts[0]
    assert stack.up[2].name == "model.layers.1.mlp.experts.2.w3"
    assert stack.up[2].disk_name == "model.layers.1.block_sparse_moe.experts.2.w3"
    assert source.disk_names("model.layers.1.mlp.experts.2.w3.weight") == [f"{stack.up[2].disk_name}.weight"]
    fused = source.disk_names("model.layers.1.mlp.experts.gate_up_proj")
    assert sorted(fused) == sorted(f"{x.disk_name}.weight" for x in stack.gate + stack.up)
    with pytest.raises(StructureError, match=r"no parameter 'model\.nothing'"):
        source.disk_names("model.nothing")


def test_numeric_order_of_many_experts(tmp_path: Path) -> None:
    build_tiny(tiny_config("qwen3_moe", num_experts=12, num_hidden_layers=1)).save_pretrained(tmp_path)
    source = open_model(tmp_path)
    stack = source.structure.blocks[0].experts[0]
    assert [x.disk_name.split(".")[-2] for x in stack.down] == [str(e) for e in range(12)]
    check_block_by_block(tmp_path, torch.float32, tokens())


def test_checkpoint_without_the_base_prefix(tiny_folder, tmp_path: Path) -> None:
    """A base model's checkpoint lacks `model.`; the model's paths and the names on disk then differ everywhere."""
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "m")
    stored = load_file(folder / SINGLE)
    save_file({n.removeprefix("model."): t for n, t in stored.items()}, folder / SINGLE, {"format": "pt"})
    source = open_model(folder)
    linear = source.structure.linears[0]
    assert (linear.name, linear.disk_name) == ("model.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj")
    assert "layers.0.self_attn.q_proj.weight" not in source.kept_tensors([linear.name])
    check_block_by_block(folder, torch.float32, tokens())


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_tensors_are_all_but_the_quantized_weights(tiny_folder, family: str) -> None:
    source = open_model(tiny_folder(family))
    chosen = source.structure.linears[1:]
    kept = source.kept_tensors(x.name for x in chosen)
    replaced = {f"{x.disk_name}.weight" for x in chosen}
    assert replaced <= set(source.checkpoint.names)
    assert sorted(kept) == sorted(set(source.checkpoint.names) - replaced)
    assert f"{source.structure.linears[0].disk_name}.weight" in kept
    assert all(f"{x.disk_name}.bias" in kept for x in chosen if x.bias)
    assert source.kept_tensors([]) == list(source.checkpoint.names)


def test_kept_tensors_of_embedding_and_head(tiny_folder) -> None:
    untied = open_model(tiny_folder("gpt_neox"))
    head = untied.structure.head
    assert head is not None and (head.name, head.N, head.K) == ("lm_head", 320, 32)
    assert head.disk_name == "embed_out", "renamed by transformers"
    assert "embed_out.weight" not in untied.kept_tensors(["lm_head"])
    tied = open_model(tiny_folder("llama"))
    for half in ("lm_head", "model.embed_tokens"):
        assert "model.embed_tokens.weight" not in tied.kept_tensors([half]), "the other half is no copy any more"
    with pytest.raises(StructureError, match="'nothing' is not a module"):
        tied.kept_tensors(["nothing"])


def test_tensors_the_model_has_no_place_for_are_kept(tiny_folder, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "m")
    stored = load_file(folder / SINGLE)
    save_file(stored | {"model.mtp.weight": torch.ones(2)}, folder / SINGLE, {"format": "pt"})
    source = open_model(folder)
    assert source.describe()["unused_on_disk"] == ["model.mtp.weight"]
    assert "model.mtp.weight" in source.kept_tensors(x.name for x in source.structure.linears)


def test_description(tiny_folder) -> None:
    source = open_model(tiny_folder("mixtral", torch.bfloat16))
    summary = json.loads(json.dumps(source.describe()))
    assert summary["dtype"] == "bfloat16" and summary["bytes_on_disk"] == summary["bytes_16bit"]


# -------------------------------------------------------------------------------------------------------------- ties


def test_tied_head_is_one_tensor(tiny_folder) -> None:
    source = open_model(tiny_folder("llama"))
    assert source.structure.tied and "lm_head.weight" not in source.checkpoint
    assert source.disk_names("lm_head.weight") == ["model.embed_tokens.weight"]
    source.materialize("lm_head")
    assert source.model.lm_head.weight is source.model.model.embed_tokens.weight
    assert not source.model.lm_head.weight.is_meta
    source.release("model.embed_tokens")
    assert source.model.lm_head.weight.is_meta and source.model.model.embed_tokens.weight.is_meta
    source.materialize_rest()
    assert source.model.lm_head.weight is source.model.model.embed_tokens.weight
    source.release_rest()
    assert all(p.is_meta for p in source.model.parameters())


@pytest.mark.parametrize("same", [True, False])
def test_both_tied_tensors_on_disk(tiny_folder, tmp_path: Path, same: bool) -> None:
    """transformers ties them if they are equal and leaves them apart, with a warning, if they are not."""
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "m")
    stored = load_file(folder / SINGLE)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone() + (0 if same else 1)
    save_file(stored, folder / SINGLE, {"format": "pt"})
    source, whole = open_model(folder), reference(folder, torch.float32)
    assert source.structure.tied == same
    model = source.materialize("")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == same
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, whole(tokens()).logits)


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def broken(tiny_folder, tmp_path: Path):
    """family, change(tensors) -> folder of that tiny model with its tensors changed."""

    def make(family: str, change) -> Path:
        folder = shutil.copytree(tiny_folder(family), tmp_path / "broken")
        tensors = load_file(folder / SINGLE)
        change(tensors)
        save_file(tensors, folder / SINGLE, {"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "1 NaN"), (float("inf"), "1 Inf")])
@pytest.mark.parametrize("unfused", [True, False])
def test_bad_value_names_the_tensor(broken, value: float, word: str, unfused: bool) -> None:
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    source = open_model(broken("mixtral", lambda t: t[name][5].__setitem__(7, value)))
    source.materialize("model.layers.0")
    if unfused:
        source.unfuse("model.layers.1")
    with pytest.raises(NumericsError, match=rf"{name}' holds {word} values of 1536;"):
        source.materialize("model.layers.1")


def test_value_that_the_cast_cannot_hold(broken) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    source = open_model(broken("llama", lambda t: t[name][0].__setitem__(0, 1e5)))
    source.materialize("model.layers.0", torch.float32)
    with pytest.raises(NumericsError, match=rf"{name}' holds 1 Inf.*after the cast to torch\.float16"):
        source.materialize("model.layers.0", torch.float16)


def test_absent_parameter(broken) -> None:
    folder = broken("llama", lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"1 of 21 parameters.*'model\.layers\.1\.mlp\.up_proj\.weight'"):
        open_model(folder)


def test_absent_expert(broken) -> None:
    folder = broken("mixtral", lambda t: t.pop("model.layers.1.block_sparse_moe.experts.3.w2.weight"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.experts\.3\.w2 .*is not in the checkpoint"):
        open_model(folder)


def test_more_experts_than_the_config_says(broken) -> None:
    def add(tensors) -> None:
        for leaf in ("w1", "w2", "w3"):
            prefix = "model.layers.0.block_sparse_moe.experts"
            tensors[f"{prefix}.4.{leaf}.weight"] = tensors[f"{prefix}.3.{leaf}.weight"].clone()

    with pytest.raises(CheckpointError, match=r"has 15 expert tensors on disk, config\.json asks for 12"):
        open_model(broken("mixtral", add))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.0.mlp.up_proj.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.0.w1.weight"),
    ],
)
def test_wrong_shape(broken, family: str, name: str) -> None:
    folder = broken(family, lambda t: t.update({name: torch.zeros(5, 5)}))
    with pytest.raises(CheckpointError, match=r"shape"):
        open_model(folder)


def test_expert_stacks_stored_fused(broken) -> None:
    def fuse(tensors) -> None:
        for layer in range(2):
            prefix = f"model.layers.{layer}.mlp.experts"
            parts = {
                k: torch.stack([tensors.pop(f"{prefix}.{e}.{k}.weight") for e in range(4)])
                for k in ("gate_proj", "up_proj", "down_proj")
            }
            tensors[f"{prefix}.gate_up_proj"] = torch.cat((parts["gate_proj"], parts["up_proj"]), dim=1)
            tensors[f"{prefix}.down_proj"] = parts["down_proj"]

    with pytest.raises(StructureError, match="stores its experts fused"):
        open_model(broken("qwen3_moe", fuse))


def edit_config(folder: Path, **changes) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.fixture
def copied(tiny_folder, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder("llama"), tmp_path / "copy")


def test_already_quantized(copied: Path) -> None:
    edit_config(copied, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match=r"already quantized \(gptq\)"):
        open_model(copied)


def test_custom_code_needs_the_flag(copied: Path) -> None:
    edit_config(copied, model_type="homemade", auto_map={"AutoModelForCausalLM": "modeling.Model"})
    with pytest.raises(CheckpointError, match="--trust-remote-code"):
        open_model(copied)


def test_custom_code_is_not_needed_for_a_known_type(copied: Path) -> None:
    edit_config(copied, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    assert type(open_model(copied).model) is tf.LlamaForCausalLM


def test_unknown_model_type(copied: Path) -> None:
    edit_config(copied, model_type="homemade")
    with pytest.raises(CheckpointError, match="homemade"):
        open_model(copied)


def test_model_that_is_no_causal_lm(copied: Path) -> None:
    edit_config(copied, model_type="vit", architectures=["ViTModel"])
    with pytest.raises(StructureError, match="causal"):
        open_model(copied)


def test_unsupported_model_fails_on_opening(tmp_path: Path) -> None:
    build_tiny(tf.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)).save_pretrained(tmp_path)
    with pytest.raises(StructureError, match="Conv1D"):
        open_model(tmp_path)


@pytest.mark.parametrize("victim", ["config.json", SINGLE])
def test_missing_file(copied: Path, victim: str) -> None:
    (copied / victim).unlink()
    with pytest.raises(CheckpointError, match=victim.replace(".", r"\.")):
        open_model(copied)


def test_missing_shard_and_truncated_shard(tiny_folder, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder("llama", max_shard_size="20KB"), tmp_path / "m")
    assert (folder / INDEX).is_file()
    shard = Checkpoint(folder).files[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=f"{shard.name}: truncated"):
        open_model(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        open_model(folder)


def test_unknown_module(tiny_folder) -> None:
    source = open_model(tiny_folder("llama"))
    with pytest.raises(StructureError, match=r"no module 'model\.layers\.9'"):
        source.materialize("model.layers.9")
    with pytest.raises(StructureError, match="not a block"):
        source.unfuse("model.norm")


def test_dtype_is_read_off_the_weights_when_the_config_has_none(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config.pop("dtype")
    (copied / "config.json").write_text(json.dumps(config))
    assert open_model(copied).dtype == torch.float32


# -------------------------------------------------------------------------------------------------------- companions


def test_companion_files(copied: Path) -> None:
    wanted = [
        "LICENSE",
        "NOTICE.txt",
        "chat_template.jinja",
        "generation_config.json",
        "licence.md",
        "merges.txt",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    for name in [*wanted, "README.md", "modeling.py", "model.safetensors.index.json", "training_args.bin"]:
        (copied / name).touch()
    assert [p.name for p in companion_files(copied)] == sorted(wanted)
    edit_config(copied, auto_map={})
    assert "modeling.py" in [p.name for p in companion_files(copied)]
