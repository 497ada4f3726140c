"""Draw what FineQuant's α buys: bits per weight against perplexity, beside uniform round-to-nearest.

    python scripts/plot_finequant.py [--text sotu:2000-2026] [--out benchmarks/finequant_alpha.svg]

Points come from benchmarks/quality.jsonl: configurations "w4a16… finequant alpha=…" and "w4a16… rtn" without options.
The file is the same for the same records, so it changes only when they do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tables import RECORDS, ROOT, UNQUANTIZED, Row, read_records, rows_of, texts_of

OUT = ROOT / "benchmarks" / "finequant_alpha.svg"
SCHEMES = "w4a16"
Point = tuple[float, float, str]


def points(rows: Sequence[Row], text: str) -> tuple[list[Point], list[Point], float | None]:
    """(bits per weight, perplexity, label) of the α sweep and of uniform rtn, each by rising bits; and the perplexity
    of the unquantized model, None if there is no record of it."""
    sweep: list[Point] = []
    uniform: list[Point] = []
    plain = None
    for row in rows:
        perplexity = row.text(text, "quality", "perplexity", "mean")
        if perplexity is None:
            continue
        config, options = row.config, dict(row.config.options)
        if config.scheme == UNQUANTIZED:
            plain = perplexity
        elif not config.scheme.startswith(SCHEMES):
            continue
        elif config.algorithm == "finequant" and set(options) == {"alpha"}:
            sweep.append((row.bits, perplexity, f"α = {options['alpha']}"))
        elif config.algorithm == "rtn" and not options:
            group = config.scheme.removeprefix(SCHEMES).removeprefix("-")
            uniform.append((row.bits, perplexity, group or "whole row"))
    return sorted(sweep), sorted(uniform), plain


def draw(sweep: Sequence[Point], uniform: Sequence[Point], plain: float | None, text: str, out: Path) -> None:
    """The figure as an SVG file."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "bitwright"  # names inside the file would be random otherwise
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for series, name, marker, style, below in (
        (uniform, "uniform groups, round to nearest", "s", "--", True),
        (sweep, "FineQuant, groups chosen per matrix", "o", "-", False),
    ):
        axes.plot([p[0] for p in series], [p[1] for p in series], style, marker=marker, label=name)
        for bits, perplexity, label in series:
            offset = (0, -13) if below else (0, 7)
            axes.annotate(label, (bits, perplexity), offset, textcoords="offset points", ha="center", fontsize=8)
    if plain is not None:
        axes.axhline(plain, color="gray", linewidth=1, label="unquantized")
    axes.set_xlabel("stored bits per weight, scales included")
    axes.set_ylabel(f"perplexity, {text}")
    axes.margins(0.08)
    axes.legend()
    out.parent.mkdir(exist_ok=True)
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--model", default="SmolLM2", help="beginning of the model's name in the records")
    parser.add_argument("--text", help="label of the text; default: the first")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(arguments)
    records = read_records(args.records) if args.records.exists() else []
    rows = [row for row in rows_of(records) if row.model.startswith(args.model)]
    text = args.text or next(iter(texts_of(rows)), "")
    sweep, uniform, plain = points(rows, text)
    if not sweep:
        print(f"{args.records}: no record of {SCHEMES} finequant with alpha=… on {text or 'any text'}", file=sys.stderr)
        return 1
    draw(sweep, uniform, plain, text, args.out)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
