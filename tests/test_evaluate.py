"""Perplexity, divergence and tasks against independent computations on tiny random models."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import bitwright as bw
from bitwright.calibrate.data import Text, evaluation_windows, read_text
from bitwright.devices import choose_device
from bitwright.errors import BitwrightError, CalibrationError, CheckpointError, NumericsError
from bitwright.evaluate.divergence import token_divergence, window_divergence
from bitwright.evaluate.loading import choose_dtype
from bitwright.evaluate.perplexity import LogitSource, token_nll, window_nll
from bitwright.evaluate.report import Estimate

transformers = pytest.importorskip("transformers")

TEXT = Text("words", "It was a bright cold day in April, and the clocks were striking thirteen. " * 12, 1)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    """One token per byte, so that counts of tokens and bytes are the same number."""
    return transformers.AutoTokenizer.from_pretrained(tiny_folder("llama"))


def tiny(seed: int, name: str = "Llama", **settings):
    """A random causal LM of a few thousand weights whose logits spread enough to tell tokens apart."""
    sizes = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    config = getattr(transformers, f"{name}Config")(**(sizes | settings))
    torch.manual_seed(seed)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.fixture(scope="module")
def model():
    return tiny(0)


def loss_of(model, ids: torch.Tensor) -> float:
    """transformers' own next-token loss."""
    with torch.no_grad():
        return model(input_ids=ids[None], labels=ids[None]).loss.item()


def test_perplexity_is_that_of_transformers_loss(model, tokenizer) -> None:
    report = bw.evaluate(model, TEXT, tokenizer=tokenizer, seq_len=64, num_windows=5)
    windows = evaluation_windows(tokenizer, TEXT, 64, 5)
    losses = np.array([loss_of(model, ids) for ids in windows.ids])
    assert report.quality.nll.mean == pytest.approx(losses.mean(), rel=1e-6)
    assert report.quality.nll.standard_error == pytest.approx(losses.std(ddof=1) / math.sqrt(5), rel=1e-4)
    assert report.quality.perplexity.mean == pytest.approx(math.exp(losses.mean()), rel=1e-6)
    assert report.quality.perplexity.standard_error == pytest.approx(
        math.exp(losses.mean()) * losses.std(ddof=1) / math.sqrt(5), rel=1e-4
    )
    assert report.quality.bits_per_byte == pytest.approx(losses.mean() / math.log(2), rel=1e-6)  # a token is a byte
    assert (report.scored_tokens, report.num_windows, report.seq_len) == (5 * 63, 5, 64)
    assert (report.text_sha256, report.text_tokens) == (TEXT.sha256, len(TEXT.text))
    assert report.logits == "chunked"
    assert report.divergence is None and report.tasks is None


def test_divergence_from_a_reference(model, tokenizer) -> None:
    other = tiny(0, initializer_range=0.32)
    report = bw.evaluate(other, TEXT, reference=model, tokenizer=tokenizer, seq_len=64, num_windows=4)
    kl, agree, increase = [], [], []
    for ids in evaluation_windows(tokenizer, TEXT, 64, 4).ids:
        with torch.no_grad():
            p, q = (m(input_ids=ids[None]).logits[0, :-1].double() for m in (model, other))
        kl.append(F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean").item())
        agree.append((p.argmax(-1) == q.argmax(-1)).double().mean().item())
        increase.append(loss_of(other, ids) - loss_of(model, ids))
    assert 0.001 < np.mean(kl) < 1 and 0.3 < np.mean(agree) < 1, "the two models must differ, but not in everything"
    d = report.divergence
    assert d.kl.mean == pytest.approx(np.mean(kl), rel=1e-4)
    assert d.kl.standard_error == pytest.approx(np.std(kl, ddof=1) / 2, rel=1e-3)
    assert d.top1_agreement.mean == pytest.approx(np.mean(agree), abs=1e-9)
    assert d.nll_increase.mean == pytest.approx(np.mean(increase), abs=1e-5)
    assert d.reference.nll.mean == pytest.approx(np.mean([loss_of(model, i) for i in _ids(tokenizer)]), rel=1e-6)
    alone = bw.evaluate(other, TEXT, tokenizer=tokenizer, seq_len=64, num_windows=4)
    assert report.quality == alone.quality


def _ids(tokenizer) -> torch.Tensor:
    return evaluation_windows(tokenizer, TEXT, 64, 4).ids


def test_a_model_does_not_diverge_from_itself(model, tokenizer) -> None:
    d = bw.evaluate(model, TEXT, reference=model, tokenizer=tokenizer, seq_len=32, num_windows=2).divergence
    assert (d.kl.mean, d.top1_agreement.mean, d.nll_increase.mean) == (0.0, 1.0, 0.0)


def test_kl_is_directed() -> None:
    """KL(reference || model): a reference sure of one token against an even model gives log V, not the reverse."""
    sure, even = torch.tensor([[50.0, 0.0, 0.0, 0.0]]), torch.zeros(1, 4)
    assert token_divergence(sure, even)[0].item() == pytest.approx(math.log(4), rel=1e-5)
    assert token_divergence(even, sure)[0].item() == pytest.approx(37.5 - math.log(4), rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(2, 40), st.floats(0.1, 80), st.integers(0, 1000))
def test_token_scores_against_float64(M: int, V: int, spread: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(M, V, generator=g) * spread for _ in range(2))
    targets = torch.randint(V, (M,), generator=g)
    expected = F.cross_entropy(a.double(), targets, reduction="none")
    torch.testing.assert_close(token_nll(a, targets), expected, rtol=1e-5, atol=1e-5 * spread)
    p, q = a.double().log_softmax(1), b.double().log_softmax(1)
    torch.testing.assert_close(token_divergence(a, b)[0], (p.exp() * (p - q)).sum(1), rtol=1e-4, atol=1e-5 * spread)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 63, 64, 500])
def test_chunk_size_changes_nothing(model, tokenizer, chunk_tokens: int) -> None:
    ids = _ids(tokenizer)[0]
    source = LogitSource(model, ids, chunk_tokens)
    parts = list(source.chunks(ids))
    assert [p.start for p, _ in parts] == list(range(0, 63, chunk_tokens))
    with torch.no_grad():
        whole = model(input_ids=ids[None]).logits[0, :-1]
    torch.testing.assert_close(torch.cat([logits for _, logits in parts]), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["OPT", "GPTNeoX", "Falcon", "Mixtral", "Qwen3"])
def test_families_run_chunked(name: str, tokenizer) -> None:
    sizes = {"ffn_dim": 64, "word_embed_proj_dim": 32} if name == "OPT" else {}
    model = tiny(1, name, **sizes)
    ids = _ids(tokenizer)[1]
    source = LogitSource(model, ids)
    assert source.chunked
    assert window_nll(source, ids) == pytest.approx(loss_of(model, ids), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8}), ("Granite", {"logits_scaling": 3.0})],
)
def test_models_that_change_their_logits_run_whole(name: str, settings: dict, tokenizer) -> None:
    """The body and the output layer alone would give other logits; the full forward's are the right ones."""
    model = tiny(2, name, **settings)
    ids = _ids(tokenizer)[1]
    source = LogitSource(model, ids)
    assert not source.chunked
    assert window_nll(source, ids) == pytest.approx(loss_of(model, ids), rel=1e-5)
    report = bw.evaluate(model, TEXT, tokenizer=tokenizer, seq_len=64, num_windows=1)
    assert report.logits == "whole"


def test_logits_are_never_whole(model, tokenizer) -> None:
    """No call of the output layer sees more than a chunk (the trial sees 8 tokens)."""
    rows: list[int] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _m, _i, out: rows.append(out.numel() // 320))
    try:
        ids = _ids(tokenizer)[0]
        window_nll(LogitSource(model, ids, chunk_tokens=16), ids)
    finally:
        handle.remove()
    assert max(rows) == 16


def test_nan_names_the_window(tokenizer) -> None:
    broken = tiny(0)
    broken.model.norm.weight.data[3] = float("nan")
    with pytest.raises(NumericsError, match=r"window 0 \(token 0 of the text\).*score of nan"):
        bw.evaluate(broken, TEXT, tokenizer=tokenizer, seq_len=64, num_windows=2)
    with pytest.raises(NumericsError, match="reference's logits"):
        ids = _ids(tokenizer)[0]
        window_divergence(LogitSource(tiny(0), ids), LogitSource(broken, ids), ids)


def test_what_does_not_fit_is_refused(model, tokenizer) -> None:
    with pytest.raises(CalibrationError, match="seq_len 200 is longer than the 128 positions"):
        bw.evaluate(model, TEXT, tokenizer=tokenizer, seq_len=200)
    with pytest.raises(CheckpointError, match=r"tokenizer made token \d+, but LlamaForCausalLM knows 50"):
        bw.evaluate(tiny(0, vocab_size=50), TEXT, tokenizer=tokenizer, seq_len=64)
    with pytest.raises(CheckpointError, match="reference has 300 logits per token and the model 320"):
        bw.evaluate(model, TEXT, reference=tiny(0, vocab_size=300), tokenizer=tokenizer, seq_len=64)
    with pytest.raises(CalibrationError, match="needs its tokenizer"):
        bw.evaluate(model, TEXT)
    with pytest.raises(CalibrationError, match="nothing to evaluate"):
        bw.evaluate(model)
    with pytest.raises(CalibrationError, match="give a text"):
        bw.evaluate(model, tasks=["x"], reference=model, tokenizer=tokenizer)
    with pytest.raises(BitwrightError, match="training mode"):
        bw.evaluate(tiny(0).train(), TEXT, tokenizer=tokenizer, seq_len=64)


def test_devices_and_dtypes() -> None:
    assert choose_dtype("bfloat16") is torch.bfloat16
    assert choose_dtype("auto") is None
    for wrong in ("float42", "int8", "nn"):
        with pytest.raises(BitwrightError, match=f"unknown dtype '{wrong}'; use auto"):
            choose_dtype(wrong)
    with pytest.raises(BitwrightError, match="device 'gpu' cannot be used"):
        choose_device("gpu")
    with pytest.raises(BitwrightError, match="device 'cuda:99' cannot be used"):
        choose_device("cuda:99")


def test_one_window_has_no_error(model, tokenizer) -> None:
    report = bw.evaluate(model, TEXT, tokenizer=tokenizer, seq_len=64, num_windows=1)
    assert report.quality.perplexity.standard_error is None
    assert str(Estimate(21.2613, None)) == "21.26"
    assert str(Estimate(21.2613, 0.512)) == "21.26 ± 0.51"


def test_progress_counts_the_windows(model, tokenizer) -> None:
    seen = []
    bw.evaluate(model, TEXT, tokenizer=tokenizer, seq_len=64, num_windows=3, progress=lambda *event: seen.append(event))
    assert [(stage, done, total) for stage, done, total, _ in seen] == [("evaluate", i, 3) for i in range(4)]


def test_folders_load_and_agree_with_the_object(model, tokenizer, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    from_folder = bw.evaluate(tmp_path, TEXT, seq_len=64, num_windows=2, reference=str(tmp_path), device="cpu")
    in_memory = bw.evaluate(model, TEXT, tokenizer=tokenizer, seq_len=64, num_windows=2)
    assert from_folder.quality == in_memory.quality
    assert (from_folder.model, from_folder.divergence.name) == (str(tmp_path), str(tmp_path))
    assert from_folder.divergence.kl.mean == 0.0
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace('"BPE"', '"none"'))
    with pytest.raises(CheckpointError, match="has no tokenizer that can be read"):
        bw.evaluate(tmp_path, TEXT, seq_len=64, num_windows=2)
    file.unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer that can be read"):
        bw.evaluate(tmp_path, TEXT, seq_len=64, num_windows=2)


TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""


def test_tasks_through_lm_eval(model, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    datasets = pytest.importorskip("datasets")
    import json

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [
        {"question": f"The number {i} is", "choices": ["odd", "even", "unknown"], "answer": i % 3} for i in range(9)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = tmp_path / "tiny_choice.yaml"
    task.write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    report = bw.evaluate(model, tokenizer=tokenizer, tasks=[str(task)])

    def score(row: dict, choice: str) -> float:
        context, full = (tokenizer(t)["input_ids"] for t in (row["question"], f"{row['question']} {choice}"))
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([full])).logits[0].log_softmax(-1)
        return sum(log_p[i - 1, full[i]].item() for i in range(len(context), len(full)))

    picks = [int(np.argmax([score(row, c) for c in row["choices"]])) for row in rows]
    expected = np.mean([pick == row["answer"] for pick, row in zip(picks, rows, strict=True)])
    assert report.tasks["tiny_choice"]["acc"] == pytest.approx(expected)
    assert report.tasks["tiny_choice"]["acc_stderr"] > 0
    assert report.quality is None and report.text is None
    with pytest.raises(CalibrationError, match="lm-eval knows no task nosuchtask"):
        bw.evaluate(model, tokenizer=tokenizer, tasks=["nosuchtask"])
    with pytest.raises(CalibrationError, match="there is no task file"):
        bw.evaluate(model, tokenizer=tokenizer, tasks=[str(tmp_path / "none.yaml")])


@pytest.mark.slow
@pytest.mark.parametrize(("family", "expected"), [("opt", 72.6), ("falcon", 69.2), ("mixtral", 71.4)])
def test_known_perplexities(family: str, expected: float, fixture_model) -> None:
    """Perplexity over the first 60 windows of 512 tokens, as measured when the models were trained."""
    folder = fixture_model(family)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    own = transformers.AutoTokenizer.from_pretrained(folder)
    windows = evaluation_windows(own, read_text("sotu:2000-2026"), 512)
    source = LogitSource(model, windows.ids[0])
    nll = np.mean([window_nll(source, ids) for ids in windows.ids[:60]])
    assert math.exp(nll) == pytest.approx(expected, abs=0.15)
