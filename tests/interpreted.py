"""Runs the programs that check Triton kernels in Triton's interpreter (`interpreter.py`), each once."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path


@cache
def interpreted(program: str) -> dict[str, str]:
    """Error, or "", of every check that tests/PROGRAM.py makes."""
    path = Path(__file__).with_name(f"{program}.py")
    done = subprocess.run([sys.executable, "-W", "ignore", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_checks(program: str, kind: str, least: int) -> None:
    """At least so many checks whose names begin with `kind`, all without an error."""
    mine = {name: error for name, error in interpreted(program).items() if name.startswith(kind)}
    assert len(mine) >= least
    assert not any(mine.values()), "\n".join(f"{name}: {error}" for name, error in mine.items() if error)
