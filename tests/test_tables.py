"""scripts/tables.py, gpu_tables.py and plot_finequant.py on made-up records, and the README against the real ones."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
MACHINE = {"processor": "Test CPU", "threads": 1, "system": "Linux"}
README = """# x

<!-- table:quality -->
old
<!-- /table -->

between | the | tables

<!-- table:families -->
<!-- /table -->
"""


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return _script("tables")


def _script(name: str) -> ModuleType:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return __import__(name)
    finally:
        sys.path.pop(0)


def record(model: str, config: str, kl: float | None = None, **perplexity: float) -> dict[str, Any]:
    """What scripts/quality.py writes; bits, seconds and memory follow from the scheme so that tests can tell them."""
    scheme = config.split()[0]
    texts = {}
    for label, mean in perplexity.items():
        estimate = {"mean": mean, "standard_error": mean / 10}
        divergence = None if kl is None else {"kl": {"mean": kl}, "top1_agreement": {"mean": 1 - kl}}
        texts[label] = {"quality": {"perplexity": estimate}, "divergence": divergence, "text_sha256": "0"}
    made = {"model": model, "config": config, "windows": 10, "seq_len": 2048, "texts": texts}
    if scheme != "fp":
        run = {"seconds": 9.0, "cpu_seconds": 100.0 + len(config), "peak_rss_bytes": 1_234_000_000, "machine": MACHINE}
        made["quantize"] = {"bits_per_weight": int(scheme[1]) + 0.25, **run}
    return made


def sample() -> list[dict[str, Any]]:
    gptq = "w4a16-g64 gptq seed={} num_samples=32 seq_len=512"
    return [
        record("SmolLM2-135M-Instruct", "w3a16-g64 rtn", speeches=112.75, novel=1234.5),
        record("SmolLM2-135M-Instruct", gptq.format(0), kl=0.02, speeches=25.0, novel=40.0),
        record("SmolLM2-135M-Instruct", gptq.format(1), speeches=26.0, novel=41.0),
        record("SmolLM2-135M-Instruct", gptq.format(0) + " shrinkage=0.2", speeches=24.0, novel=42.0),
        record("SmolLM2-135M-Instruct", "fp", speeches=21.26, novel=33.38),
        record("SmolLM2-135M-Instruct", "w4a16 finequant alpha=2", speeches=30.0, novel=50.0),
        record("opt", "fp", speeches=80.0),
        record("opt", "w4a16-g64 rtn", speeches=84.0),
    ]


def cells(table: str) -> dict[str, dict[str, str]]:
    """configuration -> column -> cell."""
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]
    head, _rule, *rows = lines
    assert all(len(row) == len(head) for row in rows)
    found = [dict(zip(head, row, strict=True)) for row in rows]
    return {row["configuration"]: row for row in found}


def test_config(tables: ModuleType) -> None:
    parse = tables.Config.parse
    given = "w4a16-g64 gptq seed=3 shrinkage=0.1 num_samples=32 seq_len=512 order=group"
    assert parse(given) == parse("w4a16-g64 gptq order=group seq_len=512 seed=0 num_samples=32 shrinkage=0.1")
    assert parse(given).label == "w4a16-g64 gptq order=group shrinkage=0.1"
    assert parse(given).calibration == "32 × 512"
    assert parse(given) != parse(given.replace("512", "1024"))
    assert parse("w4a16 gptq").calibration == "128 × 2048"
    assert (parse("w8a8 rtn").calibration, parse("fp").label) == ("", "unquantized")


def test_the_defaults_are_those_of_the_command(tables: ModuleType) -> None:
    import inspect

    from bitwright.cli.quantize import quantize

    parameters = inspect.signature(quantize).parameters
    assert {key: str(parameters[key].default) for key in tables.DEFAULT_CALIBRATION} == tables.DEFAULT_CALIBRATION


def test_quality(tables: ModuleType) -> None:
    table = tables.quality(tables.rows_of(sample()))
    rows = cells(table)
    gptq = "`w4a16-g64 gptq`, 2 seeds"
    assert list(rows) == ["unquantized", "`w4a16-g64 gptq shrinkage=0.2`, 1 seed", gptq, "`w3a16-g64 rtn`"]
    mean, error = statistics.fmean([25.0, 26.0]), statistics.fmean([2.5, 2.6])
    assert rows[gptq]["perplexity, speeches"] == f"{mean:.2f} ± {error:.2f}"
    assert rows["`w3a16-g64 rtn`"]["perplexity, speeches"] == "112.8 ± 11.28"
    assert rows["`w3a16-g64 rtn`"]["perplexity, novel"] == "1234 ± 123.5"
    assert (rows[gptq]["KL"], rows[gptq]["top-1"]) == ("0.0200 / 0.0200", "0.980 / 0.980")
    assert (rows[gptq]["bits per weight"], rows["unquantized"]["bits per weight"]) == ("4.25", "–")
    assert (rows[gptq]["peak memory, MB"], rows["unquantized"]["CPU-seconds"]) == ("1234", "–")
    assert rows[gptq]["CPU-seconds"] == f"{100 + len('w4a16-g64 gptq seed=0 num_samples=32 seq_len=512')}"
    assert (
        "10 windows of 2048 tokens" in table
        and "32 × 512 tokens" in table
        and "Test CPU, 1 thread." in table
        and "top-1 agreement (of the seeds that have them) on speeches / novel" in table
    )


def test_one_number_of_seeds_goes_into_the_caption(tables: ModuleType) -> None:
    table = tables.quality(tables.rows_of([r for r in sample() if "shrinkage" not in r["config"]]))
    assert "`w4a16-g64 gptq`" in cells(table) and "means over 2 seeds" in table


def test_columns_that_nothing_fills_are_left_out(tables: ModuleType) -> None:
    rows = cells(tables.families(tables.rows_of(sample())))
    assert list(rows["unquantized"]) == [
        *("configuration", "bits per weight", "perplexity, speeches", "CPU-seconds", "peak memory, MB")
    ]


def test_windows_are_told_apart(tables: ModuleType) -> None:
    few = record("SmolLM2-135M-Instruct", "w3a16-g64 rtn", speeches=100.0)
    both = tables.quality(tables.rows_of([few | {"windows": 5}, *sample()]))
    ten, five = both.split("\n10 windows")
    assert cells(ten)["`w3a16-g64 rtn`"]["perplexity, speeches"].startswith("112.8")
    assert cells(five)["`w3a16-g64 rtn`"]["perplexity, speeches"].startswith("100.0")
    assert "\n5 windows of 2048 tokens" in five


def test_families_are_relative_to_themselves(tables: ModuleType) -> None:
    rows = cells(tables.families(tables.rows_of(sample())))
    assert rows["`w4a16-g64 rtn`"]["perplexity, speeches"] == "84.00 ± 8.40 (+5.0 %)"
    assert rows["unquantized"]["perplexity, speeches"] == "80.00 ± 8.00"


def test_finequant_leaves_gptq_out(tables: ModuleType) -> None:
    assert list(cells(tables.finequant(tables.rows_of(sample())))) == [
        "unquantized",
        "`w4a16 finequant alpha=2`",
        "`w3a16-g64 rtn`",
    ]
    assert "No records yet" in tables.finequant(tables.rows_of([r for r in sample() if "finequant" not in r["config"]]))


def test_the_readme_is_rewritten_between_its_marks(tables: ModuleType, tmp_path: Path) -> None:
    records, readme = tmp_path / "r.jsonl", tmp_path / "README.md"
    readme.write_text(README)
    arguments = ["--records", str(records), "--readme", str(readme)]
    assert tables.main(arguments) == 1  # no records
    records.write_text("".join(json.dumps(r) + "\n" for r in sample()))
    assert tables.main([*arguments, "--check"]) == 1
    assert readme.read_text() == README
    assert tables.main(arguments) == 0
    text = readme.read_text()
    assert "old" not in text and text.startswith("# x\n\n<!-- table:quality -->\n|")
    assert "\n<!-- /table -->\n\nbetween | the | tables\n\n<!-- table:families -->\n|" in text
    assert tables.main([*arguments, "--check"]) == 0
    with records.open("a") as f:
        f.write(json.dumps(record("opt", "w4a16 rtn", speeches=81.0)) + "\n")
    assert tables.main([*arguments, "--check"]) == 1


def test_what_is_split_or_pruned_has_tables_of_its_own(tables: ModuleType) -> None:
    smol, quik = "SmolLM2-135M-Instruct", " quik num_samples=32 seq_len=512"
    made = [
        *sample(),
        record(smol, "w4a4-o64" + quik, speeches=23.386),
        record(smol, "w8a8 gptq num_samples=32 seq_len=512", speeches=21.5),
        record(smol, "w4a4-o64-24" + quik, speeches=40.0),
        record(smol, "w4a4" + quik, speeches=30.0) | {"config": "attention-24.toml recipe num_samples=32 seq_len=512"},
        record("opt", "w4a4-o16-24" + quik, speeches=88.0),
    ]
    rows = tables.rows_of(made)
    assert "quik" not in tables.quality(rows) + tables.finequant(rows) + tables.families(rows)
    activations, pruned = cells(tables.quik(rows)), cells(tables.sparse(rows))
    assert list(activations) == ["unquantized", "`w8a8 gptq`", "`w4a4-o64 quik`"]
    assert activations["`w4a4-o64 quik`"]["perplexity, speeches"].endswith("(+10.0 %)")
    assert set(pruned) == {"unquantized", "`w4a4-o64-24 quik`", "`attention-24.toml recipe`"}
    assert list(cells(tables.quik_families(rows))) == ["unquantized", "`w4a4-o16-24 quik`"]


def test_unknown_tables_are_an_error(tables: ModuleType) -> None:
    with pytest.raises(ValueError, match="'speed'"):
        tables.rewritten("<!-- table:speed -->\n<!-- /table -->\n", sample())


def test_the_readme_is_fresh(tables: ModuleType) -> None:
    if not tables.RECORDS.exists():
        pytest.skip("benchmarks/quality.jsonl is not there: nothing was measured yet")
    assert tables.main(["--check"]) == 0, "python scripts/tables.py"


# ---------------------------------------------------------------------------------------------------------------- GPU

STAMP = {
    "gpu": "Test GPU",
    "versions": {"torch": "2.0", "triton": "3.6"},
    "dtype": "bfloat16",
    "ceiling_bytes_per_second": 3e12,
    "ceiling_flops_per_second": 7e14,
}


def kernel(name: str, micros: float | None, M: int = 1, **changes: Any) -> dict[str, Any]:
    """What `bitwright bench kernels` writes; no time: absent."""
    kind = {"dense": "dense", "tinygemm": "peer", "humming": "peer"}.get(name, "ours")
    about = {"benchmark": "kernels", "N": 4096, "K": 4096, "tokens": M, "scheme": "w4a16-g128"}
    made = STAMP | about | {"name": name, "kind": kind, "chosen": name == "gluon", "status": "ok"}
    made |= {"status": "absent"} if micros is None else {"seconds": micros / 1e6, "roofline_share": 0.5}
    return made | changes


def point(M: int = 1, **changes: Any) -> list[dict[str, Any]]:
    times = {"gluon": 10.0, "triton": 12.0, "dequantize+dense": 40.0, "dense": 20.0, "tinygemm": 15.0, "humming": 11.0}
    return [kernel(name, micros, M, **changes) for name, micros in times.items()] + [kernel("gemlite", None, M)]


def grid(table: str) -> list[dict[str, str]]:
    """Rows of a table, column -> cell."""
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], row, strict=True)) for row in lines[2:]]


def test_kernels_beside_their_peers() -> None:
    gpu = _script("gpu_tables")
    table = gpu.kernels([*point(16), *point(1)])
    first, second = grid(table)
    assert first == {
        "N × K": "4096 × 4096",
        "M": "1",
        "bitwright": "10.0",
        "of roofline": "50%",
        "cuBLAS": "20.0",
        "dequantize + cuBLAS": "40.0",
        "tinygemm": "15.0",
        "humming": "11.0",
        "times cuBLAS": "2.00",
        "times the best peer": "1.10",
    }
    assert (second["N × K"], second["M"]) == ("", "16")
    assert all(said in table for said in ("Test GPU, torch 2.0, Triton 3.6", "3.00 TB/s", "700 TFLOP/s", "w4a16-g128"))


def test_the_last_record_of_a_name_counts() -> None:
    gpu = _script("gpu_tables")
    (row,) = grid(gpu.kernels([*point(), kernel("gluon", 5.0), kernel("humming", 4.0)]))
    assert (row["bitwright"], row["humming"], row["times the best peer"]) == ("5.0", "4.0", "0.80")


def test_what_was_wrong_is_no_time() -> None:
    gpu = _script("gpu_tables")
    wrong = kernel("gluon", None, status="wrong")
    (row,) = grid(gpu.kernels([*point(), wrong]))
    assert row["bitwright"] == "wrong" and "times cuBLAS" not in row and "of roofline" not in row


def test_other_bits_have_a_table_of_their_own() -> None:
    gpu = _script("gpu_tables")
    records = [*point(), *point(scheme="w3a16-g128"), *point(scheme="w2a16-g128")]
    assert [row["scheme"] for row in grid(gpu.kernel_bits(records))] == ["`w2a16-g128`", "`w3a16-g128`"]
    assert len(grid(gpu.kernels(records))) == 1


def test_gpus_are_told_apart_and_cpus_left_out() -> None:
    gpu = _script("gpu_tables")
    table = gpu.kernels([*point(), *point(gpu="Other GPU"), *point(gpu=None)])
    assert table.count("| N × K |") == 2 and "Test GPU" in table.split("Other GPU")[0]


def test_experts_table() -> None:
    gpu = _script("gpu_tables")
    about = {"benchmark": "experts", "experts": 8, "top_k": 2}
    records = [kernel(name, us, **about) for name, us in (("triton", 30.0), ("gluon", 20.0), ("dense", 90.0))]
    (row,) = grid(gpu.experts([*records, kernel("torch._grouped_mm", 60.0, **about, **{"kind": "peer"})]))
    assert (row["experts"], row["bitwright"], row["times the better"]) == ("2 of 8", "20.0", "3.00")


def whole(benchmark: str, scheme: str, **changes: Any) -> dict[str, Any]:
    about = {"benchmark": benchmark, "model": "llama-2-7b", "scheme": scheme, "status": "ok", "batch": 1, "layers": 32}
    about |= {"context": 512, "length": 512, "layers_timed": 32, "tokens_per_second": 100.0, "speedup_over_dense": 2.0}
    about |= {"seconds_per_token": 0.01, "seconds": 0.02, "linear_share": 0.8, "weight_bytes": 4_000_000_000}
    return STAMP | about | changes


def test_decode_table() -> None:
    gpu = _script("gpu_tables")
    records = [
        whole("decode", "bfloat16"),
        whole("decode", "w4a16-g128", seconds_per_token=0.005, layers_timed=9),
        STAMP
        | {"benchmark": "decode", "model": "llama-2-7b", "scheme": "w2a16", "status": "wrong"}
        | {"batch": 1, "context": 512, "reason": "relative error 1"},
    ]
    rows = grid(gpu.decode(records))
    assert [(r["scheme"], r["ms per token"], r["timed"]) for r in rows] == [
        ("16-bit", "10.00", "–"),
        ("`w4a16-g128`", "5.00", "9 of 32 blocks"),
        ("`w2a16` (wrong)", "–", "–"),
    ]


def test_prefill_throughput_and_memory_tables() -> None:
    gpu = _script("gpu_tables")
    (row,) = grid(gpu.prefill([whole("prefill", "w4a16-g128")]))
    assert (row["prompts"], row["ms"]) == ("1 × 512", "20.0")
    one = whole("throughput", "w4a16-g128", gpus=1, memory_bytes=8e10, tokens_per_second_per_gpu=70.4, note="n.b.")
    sweep = [one | {"batch": 2}, one | {"batch": 3, "tokens_per_second_per_gpu": 90.0}]
    dense = [
        one | {"scheme": "bfloat16", "gpus": gpus, "batch": 2, "tokens_per_second_per_gpu": rate}
        for gpus, rate in ((4, 50.0), (2, 30.0))
    ]
    table = gpu.throughput([*dense, *sweep, sweep[0] | {"benchmark": "throughput-best"}])
    rows = grid(table)
    assert [row["batch 2"] for row in rows] == ["50", "30", "70"] and "n.b." in table
    assert rows[2]["largest batch"] == "batch 3: 90" and rows[2]["times 16-bit on the fewest"] == "3.00"
    from bitwright.bench import memory

    records = memory.run(memory.Options(device="cpu", check=False))
    rows = grid(gpu.memory([r | {"gpu": "Test GPU"} for r in records]))
    assert [(r["scheme"], r["bits per weight"]) for r in rows] == [("`16-bit`", "16.00"), ("`w4a16-g128`", "4.12")]


def test_quantized_activations_show_where_the_time_goes() -> None:
    gpu = _script("gpu_tables")
    fields = {"scheme": "w4a4-o256", "tokens": 2048}
    whole = kernel("int8-mma", 100.0, chosen=True) | fields
    parts = [
        whole
        | {"name": f"int8-mma: {name}", "kind": "part", "chosen": False, "seconds": us / 1e6, "flops_per_second": f}
        for name, us, f in (("quantize", 30.0, 0.0), ("codes ready", 70.0, 9e14), ("product alone", 60.0, 1.2e15))
    ]
    dense = kernel("dense", 140.0) | fields
    other = kernel("gluon", 5.0, chosen=True)
    (row,) = grid(gpu.quantized_activations([dense, whole, *parts, other]))
    assert row["cuBLAS"] == "140.0" and row["bitwright"] == "100.0" and row["quantize"] == "30.0"
    assert row["product, TOPS"] == "1074" and row["times cuBLAS"] == "1.40"
    assert row["... quantized once for 2"] == "1.65" and row["... quantized once for 3"] == "1.75"
    assert gpu.kernel_bits([dense, whole, *parts]) == ""


def test_gpu_tables_are_empty_until_something_was_measured(tables: ModuleType, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("r.jsonl", "g.jsonl", "README.md")}
    files["r.jsonl"].write_text(json.dumps(record("opt", "fp", speeches=1.0)) + "\n")
    marked = "".join(f"<!-- table:{name} -->\n<!-- /table -->\n" for name in tables.GPU_TABLES)
    files["README.md"].write_text(marked)
    arguments = ["--records", str(files["r.jsonl"]), "--gpu-records", str(files["g.jsonl"])]
    arguments += ["--readme", str(files["README.md"])]
    assert tables.main([*arguments, "--check"]) == 0
    files["g.jsonl"].write_text("".join(json.dumps(r) + "\n" for r in point()))
    assert tables.main([*arguments, "--check"]) == 1
    assert tables.main(arguments) == 0 and "| 4096 × 4096 |" in files["README.md"].read_text()
    assert tables.main([*arguments, "--check"]) == 0


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = _script("plot_finequant")
    records = [
        *sample(),
        record("SmolLM2-135M-Instruct", "w4a16 finequant alpha=0.5", speeches=28.0),
        record("SmolLM2-135M-Instruct", "w4a16 finequant budget=4.5", speeches=1.0),
        record("SmolLM2-135M-Instruct", "w4a16-g64 rtn", speeches=29.0),
        record("SmolLM2-135M-Instruct", "w4a16-g64 rtn search=minmax", speeches=2.0),
    ]
    rows = [row for row in plot.rows_of(records) if row.model.startswith("SmolLM2")]
    sweep, uniform, plain = plot.points(rows, "speeches")
    assert sweep == [(4.25, 28.0, "α = 0.5"), (4.25, 30.0, "α = 2")]
    assert (uniform, plain) == ([(4.25, 29.0, "g64")], 21.26)
    file, out = tmp_path / "r.jsonl", tmp_path / "benchmarks" / "a.svg"
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    drawn = []
    for _ in range(2):
        assert plot.main(["--records", str(file), "--out", str(out)]) == 0
        drawn.append(out.read_text())
    assert drawn[0] == drawn[1] and drawn[0].lstrip().startswith("<?xml")
    assert plot.main(["--records", str(file), "--out", str(out), "--text", "other"]) == 1
