"""Write tables from the records: benchmarks/quality.jsonl of scripts/quality.py, and benchmarks/gpu.jsonl of
`bitwright bench` (`gpu_tables`).

    python scripts/tables.py            # rewrites the tables in README.md and benchmarks/GPU.md in place
    python scripts/tables.py --check    # exit code 1 if they are not what the records say

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`; NAME is one of `TABLES` or `GPU_TABLES`. Records of
quality that differ in nothing but the seed share a row: values are means over seeds, and ± is the mean of their
standard errors over windows. A GPU table without records is empty.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gpu_tables import GPU_TABLES, MISSING, markdown

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "quality.jsonl"
GPU_RECORDS = ROOT / "benchmarks" / "gpu.jsonl"
README = ROOT / "README.md"
GPU_PAGE = ROOT / "benchmarks" / "GPU.md"

UNQUANTIZED = "fp"
FAMILIES = ("opt", "falcon", "mixtral")
DATA_FREE = ("rtn", "finequant")
# Algorithms of the tables `quality` and `finequant`; what is split or pruned has tables of its own.
WEIGHTS_ALONE = ("", "gptq", "rtn", "finequant")
# What `bitwright quantize` takes where a configuration says nothing.
DEFAULT_CALIBRATION = {"num_samples": "128", "seq_len": "2048"}
_MARKED = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)

Record = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """A configuration as scripts/quality.py spells it, taken apart. algorithm is empty for `fp`; options are sorted and
    hold neither seed nor calibration; calibration is "32 × 512" for gptq and the like, empty for data-free ones."""

    scheme: str
    algorithm: str = ""
    options: tuple[tuple[str, str], ...] = ()
    calibration: str = ""

    @classmethod
    def parse(cls, text: str) -> Config:
        """Of "w4a16-g64 gptq seed=0 num_samples=32 seq_len=512 shrinkage=0.1"."""
        scheme, *rest = text.split()
        if not rest:
            return cls(scheme)
        algorithm, *pairs = rest
        options = dict(pair.split("=", 1) for pair in pairs)
        options.pop("seed", None)
        samples = {key: options.pop(key, default) for key, default in DEFAULT_CALIBRATION.items()}
        calibration = "" if algorithm in DATA_FREE else f"{samples['num_samples']} × {samples['seq_len']}"
        return cls(scheme, algorithm, tuple(sorted(options.items())), calibration)

    @property
    def label(self) -> str:
        """As a reader would type it, calibration apart."""
        if self.scheme == UNQUANTIZED:
            return "unquantized"
        return " ".join([self.scheme, self.algorithm, *(f"{key}={value}" for key, value in self.options)])


@dataclass(frozen=True)
class Row:
    """Records of one model and configuration on the same windows, one for each seed. Means are over the seeds that have
    the number: divergence, say, may have been measured for one only."""

    model: str
    config: Config
    windows: int
    seq_len: int
    records: tuple[Record, ...]

    def mean(self, read: Callable[[Record], float | None]) -> float | None:
        """Mean over the seeds of what `read` finds; None if it finds nothing."""
        found = [x for x in map(read, self.records) if x is not None]
        return statistics.fmean(found) if found else None

    def text(self, label: str, *path: str) -> float | None:
        """Mean of a number of one text, such as text("novel", "quality", "perplexity", "mean")."""

        def read(record: Record) -> float | None:
            value = record["texts"].get(label)
            for key in path:
                value = None if value is None else value.get(key)
            return value

        return self.mean(read)

    @property
    def compared(self) -> int:
        """How many of the records hold a divergence from the unquantized model."""
        return sum(any(text.get("divergence") for text in record["texts"].values()) for record in self.records)

    def quantize(self, key: str) -> float | None:
        """Mean of a number that the quantize run left; None for the unquantized model."""
        return self.mean(lambda record: record.get("quantize", {}).get(key))

    @property
    def bits(self) -> float:
        """Bits per weight; infinite for the unquantized model, so that it comes first."""
        bits = self.quantize("bits_per_weight")
        return float("inf") if bits is None else bits


def read_records(path: Path) -> list[Record]:
    """One record per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def rows_of(records: Sequence[Record]) -> list[Row]:
    """Records grouped over seeds; models in order of appearance, each from most bits to fewest, then by perplexity."""
    groups: dict[tuple[str, Config, int, int], list[Record]] = {}
    for record in records:
        key = (record["model"], Config.parse(record["config"]), record["windows"], record["seq_len"])
        groups.setdefault(key, []).append(record)
    rows = [Row(*key, tuple(members)) for key, members in groups.items()]
    models = list(dict.fromkeys(row.model for row in rows))
    first = next(iter(texts_of(rows)), "")

    def order(row: Row) -> tuple[int, float, float]:
        return models.index(row.model), -row.bits, row.text(first, "quality", "perplexity", "mean") or float("inf")

    return sorted(rows, key=order)


def texts_of(rows: Sequence[Row]) -> list[str]:
    """Labels of the texts, in order of appearance."""
    return list(dict.fromkeys(label for row in rows for record in row.records for label in record["texts"]))


# ------------------------------------------------------------------------------------------------------------- tables


def quality(rows: Sequence[Row]) -> str:
    """SmolLM2 by gptq and rtn."""
    return _table([row for row in _smol(rows) if row.config.algorithm != "finequant"])


def finequant(rows: Sequence[Row]) -> str:
    """SmolLM2 by finequant, beside uniform rtn."""
    ours = _smol(rows)
    if not any(row.config.algorithm == "finequant" for row in ours):
        return _NOTHING
    return _table([row for row in ours if row.config.algorithm != "gptq"])


def families(rows: Sequence[Row]) -> str:
    """The small trained models of other families, each relative to itself unquantized."""
    return _table([row for row in rows if row.model in FAMILIES and not _split(row)], relative=True)


def quik(rows: Sequence[Row]) -> str:
    """Quantized activations on SmolLM2, and its outlier columns without them; nothing pruned."""
    ours = [row for row in rows if row.model.startswith("SmolLM2") and "-24" not in row.config.scheme]
    return _of_kind(ours, _split)


def sparse(rows: Sequence[Row]) -> str:
    """2:4 on SmolLM2."""
    ours = [row for row in rows if row.model.startswith("SmolLM2")]
    return _of_kind(ours, lambda row: "-24" in row.config.scheme)


def quik_families(rows: Sequence[Row]) -> str:
    """Quantized activations and 2:4 on the small trained models of other families."""
    return _of_kind([row for row in rows if row.model in FAMILIES], _split)


def _smol(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.model.startswith("SmolLM2") and not _split(row)]


def _split(row: Row) -> bool:
    """Whether a row is of an algorithm, or a scheme, beyond weights on a grid."""
    return row.config.algorithm not in WEIGHTS_ALONE or not re.search(r"a16|^fp$", row.config.scheme)


def _of_kind(rows: Sequence[Row], wanted: Callable[[Row], bool]) -> str:
    """The rows that are wanted, relative to the unquantized model on the same windows."""
    chosen = [row for row in rows if wanted(row)]
    windows = {(row.model, row.windows, row.seq_len) for row in chosen}
    base = [r for r in rows if r.config.scheme == UNQUANTIZED and (r.model, r.windows, r.seq_len) in windows]
    return _table(base + chosen, relative=True) if chosen else _NOTHING


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "quality": quality,
    "families": families,
    "finequant": finequant,
    "quik": quik,
    "sparse": sparse,
    "quik-families": quik_families,
}
_NOTHING = "*No records yet; `scripts/quality.py` makes them.*\n"


def _table(rows: Sequence[Row], relative: bool = False) -> str:
    """Markdown tables with captions, one for each set of windows, most windows first."""
    if not rows:
        return _NOTHING
    sets = sorted({(row.windows, row.seq_len) for row in rows}, reverse=True)
    return "\n".join(_of_windows([row for row in rows if (row.windows, row.seq_len) == s], relative) for s in sets)


def _of_windows(rows: Sequence[Row], relative: bool) -> str:
    """A table of rows that were scored on the same windows; columns that no row fills are left out."""
    texts = texts_of(rows)
    several_calibrations = len({row.config.calibration for row in rows} - {""}) > 1
    several_counts = len(_seed_counts(rows)) > 1
    base = {row.model: row for row in rows if row.config.scheme == UNQUANTIZED}

    def name(row: Row) -> str:
        notes = []
        if several_calibrations and row.config.calibration:
            notes.append(f"{row.config.calibration} tokens")
        if several_counts and row.config.calibration:
            notes.append(_seeds(len(row.records)))
        label = row.config.label if row.config.scheme == UNQUANTIZED else f"`{row.config.label}`"
        return ", ".join([label, *notes])

    def perplexity(row: Row, text: str) -> str:
        mean = row.text(text, "quality", "perplexity", "mean")
        if mean is None:
            return MISSING
        error = row.text(text, "quality", "perplexity", "standard_error")
        shown = _number(mean) + ("" if error is None else f" ± {_number(error)}")
        plain = base.get(row.model)
        before = plain.text(text, "quality", "perplexity", "mean") if relative and plain not in (None, row) else None
        return shown if before is None else f"{shown} ({100 * (mean / before - 1):+.1f} %)"

    def divergence(row: Row, key: str, form: str) -> str:
        found = [row.text(text, "divergence", key, "mean") for text in texts]
        return MISSING if set(found) == {None} else " / ".join(_plain(x, form) for x in found)

    columns: list[tuple[str, Callable[[Row], str]]] = []
    if len({row.model for row in rows}) > 1:
        columns.append(("model", lambda row: row.model))
    columns.append(("configuration", name))
    columns.append(("bits per weight", lambda row: MISSING if row.bits == float("inf") else f"{row.bits:.2f}"))
    columns += [(f"perplexity, {text}", partial(perplexity, text=text)) for text in texts]
    columns.append(("KL", partial(divergence, key="kl", form=".4f")))
    columns.append(("top-1", partial(divergence, key="top1_agreement", form=".3f")))
    columns.append(("CPU-seconds", lambda row: _plain(row.quantize("cpu_seconds"), ".0f")))
    columns.append(("peak memory, MB", lambda row: _plain(_mega(row.quantize("peak_rss_bytes")), ".0f")))
    cells = {title: [show(row) for row in rows] for title, show in columns}
    compared = any(cell != MISSING for cell in cells["KL"])
    return markdown(cells, ("model", "configuration")) + "\n" + _caption(rows, compared) + "\n"


def _caption(rows: Sequence[Row], divergence: bool) -> str:
    """How the numbers were made, from the records."""
    said = [f"{rows[0].windows} windows of {rows[0].seq_len} tokens in float32; ± is one standard error over windows"]
    if divergence:
        texts = " / ".join(texts_of(rows))
        partly = " (of the seeds that have them)" if any(0 < row.compared < len(row.records) for row in rows) else ""
        said.append(f"KL(unquantized ‖ quantized) in nats per token and top-1 agreement{partly} on {texts}")
    calibrations = sorted({row.config.calibration for row in rows} - {""})
    if len(calibrations) == 1:
        methods = sorted({row.config.algorithm for row in rows if row.config.calibration} - {"recipe"})
        said.append(f"{' and '.join(methods)} calibrated on {calibrations[0]} tokens")
    counts = _seed_counts(rows)
    if len(counts) == 1 and counts != {1}:
        said.append(f"means over {_seeds(*counts)}")
    runs = [record["quantize"] for row in rows for record in row.records if "quantize" in record]
    machines = [run["machine"] for run in runs if run.get("machine")]
    named = sorted({f"{m['processor']}, {_threads(m['threads'])}" for m in machines})
    if named:
        said.append(f"CPU-seconds and peak memory of `bitwright quantize` on {' or '.join(named)}")
    return f"{'; '.join(said)}. Records: `benchmarks/quality.jsonl`, made by `scripts/quality.py`."


def _seed_counts(rows: Sequence[Row]) -> set[int]:
    """Seeds per row, among the rows that a seed decides."""
    return {len(row.records) for row in rows if row.config.calibration}


def _seeds(count: int) -> str:
    return f"{count} seed" if count == 1 else f"{count} seeds"


def _threads(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"


def _number(value: float) -> str:
    """Two decimals below 100, one below 1000, none above."""
    return f"{value:.{2 if value < 100 else 1 if value < 1000 else 0}f}"


def _plain(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)


def _mega(value: float | None) -> float | None:
    return None if value is None else value / 1e6


# ------------------------------------------------------------------------------------------------------------- README


def rewritten(readme: str, records: Sequence[Record], gpu_records: Sequence[Record] = ()) -> str:
    """A page with every marked table made anew. ValueError names a table that is not known."""
    rows = rows_of(records)

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name in GPU_TABLES:
            return f"{match[1]}{GPU_TABLES[name](gpu_records)}{match[3]}"
        if name not in TABLES:
            raise ValueError(f"the page marks a table {name!r}; known are {', '.join([*TABLES, *GPU_TABLES])}")
        return f"{match[1]}{TABLES[name](rows)}{match[3]}"

    return _MARKED.sub(replace, readme)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a page is stale")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--gpu-records", type=Path, default=GPU_RECORDS)
    parser.add_argument("--readme", type=Path, nargs="+", default=[README, GPU_PAGE], help="pages with marked tables")
    args = parser.parse_args(arguments)
    if not args.records.exists():
        print(f"{args.records}: there are no records; scripts/quality.py makes them", file=sys.stderr)
        return 1
    quality = read_records(args.records)
    speed = read_records(args.gpu_records) if args.gpu_records.exists() else []
    stale = False
    for page in args.readme:
        before = page.read_text(encoding="utf-8")
        after = rewritten(before, quality, speed)
        if before == after:
            continue
        stale = True
        if args.check:
            print(f"{page}: its tables are not those of the records; run scripts/tables.py", file=sys.stderr)
        else:
            page.write_text(after, encoding="utf-8")
    return int(stale and args.check)


if __name__ == "__main__":
    sys.exit(main())
