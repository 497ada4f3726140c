"""What the commands print: results and JSON on stdout; errors and progress on stderr; time and memory used."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from bitwright.errors import BitwrightError

Progress = Callable[[str, int, int, str], None]
MIN_SECONDS_BETWEEN_LINES = 5.0
MAX_INLINE = 6
WIDTH_WITHOUT_TERMINAL = 160


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Turn an error of bitwright's tree into one red line and exit code 1; with debug it goes on as a traceback."""
    # Weight-loading bars of other libraries fill a log file with half lines; on a terminal they may stay.
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        yield
    except BitwrightError as error:
        if debug:
            raise
        typer.secho(f"Error: {' '.join(str(error).split())}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from error


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """A callable progress(stage, done, total, detail): a bar with the time left on a terminal, else plain lines."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield progress_lines(lambda line: typer.echo(line, err=True))
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.fields[stage]:<10}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
    )
    with Bars(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int, detail: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, stage=stage, detail=detail)
            bars.update(tasks[stage], completed=done, total=total, detail=detail)

        yield update


def progress_lines(write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> Progress:
    """Progress as lines: the first and last of every stage, and one in between every few seconds."""
    started: dict[str, tuple[float, int]] = {}
    printed: dict[str, float] = {}

    def update(stage: str, done: int, total: int, detail: str) -> None:
        now = clock()
        since, first = started.setdefault(stage, (now, done))
        if stage in printed and done < total and now - printed[stage] < MIN_SECONDS_BETWEEN_LINES:
            return
        printed[stage] = now
        left = ""
        if first < done < total:
            left = f" ({duration((now - since) / (done - first) * (total - done))} left)"
        write(f"{stage} {done}/{total} {detail}".rstrip() + left)

    return update


def print_json(values: Mapping[str, Any]) -> None:
    """One JSON object on one line of stdout."""
    typer.echo(json.dumps(values, default=str, ensure_ascii=False))


def print_values(values: Mapping[str, Any], title: str | None = None) -> None:
    """A mapping for people: single values as rows, lists of mappings as tables, other mappings under a heading."""
    from rich.console import Console

    # A file or a pipe has no width; 80 columns would fold the names of layers.
    console = Console(width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL)
    _print_mapping(console, values, title)


def _print_mapping(console: Any, values: Mapping[str, Any], title: str | None) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    single = {k: v for k, v in values.items() if _is_single(v)}
    if title:
        console.print(Text(f"\n{title}", style="bold"))
    if single:
        grid = Table.grid(padding=(0, 2))
        for key, value in single.items():
            grid.add_row(Text(_label(key)), Text(_shown(key, value)))
        console.print(grid)
    for key, value in values.items():
        if key in single:
            continue
        rows = _rows_of(value)
        if rows is None:
            _print_mapping(console, value, _label(key))
        elif any(_is_rows(cell) for row in rows for cell in row.values()):
            for number, row in enumerate(rows, start=1):
                _print_mapping(console, row, f"{_label(key)} {number} of {len(rows)}")
        else:
            columns = list(dict.fromkeys(column for row in rows for column in row))
            console.print(Text(f"\n{_label(key)}", style="bold"))
            table = Table(*map(_label, columns), box=box.SIMPLE_HEAD, pad_edge=False)
            for row in rows:
                table.add_row(*(Text(_shown(column, row.get(column)), overflow="fold") for column in columns))
            console.print(table)


def _is_single(value: Any) -> bool:
    """Whether a value fits in one row: no rows of its own, and a mapping only if it is short and flat."""
    if isinstance(value, Mapping):
        flat = not any(isinstance(v, Mapping) or _is_rows(v) for v in value.values())
        return flat and len(value) <= MAX_INLINE
    return not _is_rows(value)


def _is_rows(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and any(isinstance(v, Mapping) for v in value)


def _rows_of(value: Any) -> list[Mapping[str, Any]] | None:
    """The rows of a list of mappings, or of a mapping from names to mappings with the name in front; else None."""
    if _is_rows(value):
        return list(value)
    if isinstance(value, Mapping) and all(isinstance(v, Mapping) for v in value.values()):
        return [{"name": k, **v} for k, v in value.items()]
    return None


def _label(key: str) -> str:
    return str(key).replace("_", " ")


def _shown(key: str, value: Any) -> str:
    if value is None or value in ([], {}, ()):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and ("bytes" in key or "memory" in key):
        return size(value)
    if isinstance(value, int):
        return f"{value:,}" if value >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        if key == "shape":
            return str(list(value))
        return _ranges(value) if key == "indices" else ", ".join(_shown(key, v) for v in value)
    if isinstance(value, Mapping):
        return "  ".join(f"{_label(k)} {_shown(k, v)}" for k, v in value.items())
    return str(value)


def _ranges(indices: Sequence[int]) -> str:
    """Rising integers with runs drawn together: 0-3, 7, 9-11."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def size(count: float) -> str:
    """Bytes in powers of 1000: 98.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Seconds as 42s, 3m05s or 2h10m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def usage(started: float) -> dict[str, Any]:
    """seconds since `started` (time.perf_counter) and the process's peak memory; on CUDA also the allocator's peak."""
    used: dict[str, Any] = {"seconds": time.perf_counter() - started, "peak_memory_bytes": peak_memory()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        used["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
    return used


def peak_memory() -> int | None:
    """Largest resident set of this process so far in bytes; None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: on Linux a child's figure starts at its parent's size at the moment of the fork.
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
