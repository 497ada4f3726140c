"""Who may import whom, read from the source, and what `import bitwright` may not do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bitwright

PACKAGE = Path(bitwright.__file__).parent

VOCABULARY = {"errors", "scheme", "recipe", "numerics", "packing", "qtensor", "devices", "activations", "split"}
VOCABULARY |= {"cache"}
PIPELINE = {"pipeline", "blockwise", "plan", "solve", "smoothing", "run_folder", "evidence"}
# Each part may import itself, the vocabulary and what stands here. `bitwright` alone means the package's own __init__.
ALLOWED = {
    **{name: set() for name in VOCABULARY},
    "algorithms": set(),
    "formats": set(),
    "kernels": set(),
    "models": set(),
    "calibrate": {"models", "algorithms"},
    "nn": {"kernels", "formats", "models"},
    "generate": {"nn", "kernels"},
    "evaluate": {"nn", "kernels", "models", "calibrate", "generate"},
    "report": {"evaluate"},
    # The pipeline and the files that hold its steps.
    **{name: PIPELINE | {"algorithms", "formats", "models", "calibrate", "nn", "report"} for name in PIPELINE},
    "bench": {"nn", "kernels", "formats", "models", "calibrate", "evaluate", "generate"},
    "integrations": {"nn", "kernels", "formats", "models"},
    "cli": None,  # whatever it likes, and nothing may import it
}
NO_TRANSFORMERS = VOCABULARY | {"algorithms", "formats", "kernels"}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The part of the package a file belongs to: its first folder, or its own name."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported(path: Path) -> set[str]:
    """Dotted names of all modules a file imports, at any depth of the code, `if TYPE_CHECKING` included."""
    names: set[str] = set()
    here = ("bitwright", *path.relative_to(PACKAGE).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(filter(None, [*here[: len(here) - node.level], base]))
            # `from bitwright import x` imports bitwright.x, where x is a module.
            names |= {f"{base}.{alias.name}" for alias in node.names} if base == "bitwright" else {base}
    return names


def parts_imported(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(path) if name.startswith("bitwright.")}


def test_every_file_is_in_a_known_part() -> None:
    unknown = {part_of(f) for f in FILES} - set(ALLOWED) - {"__init__"}
    assert not unknown, f"say in ALLOWED what {sorted(unknown)} may import"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_direction(path: Path) -> None:
    part = part_of(path)
    allowed = None if part == "__init__" else ALLOWED[part]
    wrong = set() if allowed is None else parts_imported(path) - VOCABULARY - allowed - {part}
    assert not wrong, f"{part} may not import {sorted(wrong)}"
    if part != "cli":
        assert "cli" not in parts_imported(path)
    if part != "__init__":
        assert "bitwright" not in imported(path) or part == "cli", "import the module, not the package's shortcuts"
    if part in NO_TRANSFORMERS:
        assert not {name.split(".")[0] for name in imported(path)} & {"transformers", "typer", "rich"}


def test_the_checks_see_every_kind_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    file = tmp_path / "formats" / "x.py"
    file.parent.mkdir()
    file.write_text(
        "from ..models import load\nfrom . import native\nfrom bitwright import cli\nimport bitwright.nn.load\n"
        "def f():\n    from bitwright.pipeline import quantize\n"
    )
    assert part_of(file) == "formats"
    assert parts_imported(file) == {"models", "formats", "cli", "nn", "pipeline"}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["bitwright", "bitwright.cli"])
def test_import_is_light(module: str) -> None:
    """Neither torch nor transformers, and so no CUDA, and nothing that takes seconds."""
    heavy = "torch transformers numpy safetensors datasets triton lm_eval accelerate"
    code = f"import sys, {module}; print(*sorted(m for m in '{heavy}'.split() if m in sys.modules))"
    assert run(code) == ""


def test_public_names_do_not_load_transformers_or_touch_cuda() -> None:
    code = (
        "import sys, torch, bitwright as bw; bw.QuantizedTensor, bw.Scheme, bw.Recipe, bw.errors, bw.__version__; "
        "print('transformers' in sys.modules, torch.cuda.is_initialized())"
    )
    assert run(code) == "False False"


def test_functions_keep_their_names_whatever_is_imported_first() -> None:
    code = (
        "import bitwright.evaluate.report, bitwright.generate, bitwright as bw; "
        "print(callable(bw.evaluate), callable(bw.generate), set(bw.__all__) <= set(dir(bw)))"
    )
    assert run(code) == "True True True"


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'qunatize'"):
        _ = bitwright.qunatize


def test_version_is_the_installed_one() -> None:
    from importlib.metadata import version

    assert bitwright.__version__ == version("bitwright")


def test_gpu_tests_need_few_packages() -> None:
    """A machine with a GPU has what `scripts/gpu_check.sh` asks for, and not all that the other tests use."""
    absent = "hypothesis datasets lm_eval matplotlib gguf xdist accelerate"
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in '{absent}'.split(): raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import pytest, sparse_cases, split_cases, gpu.cases, gpu.int8_cases, gpu.quantize_cases\n"
        "off = [f'-pno:{plugin}' for plugin in ('hypothesispytest', 'xdist', 'xdist.looponfail', 'cacheprovider')]\n"
        f"print(int(pytest.main(['-q', '--collect-only', *off, {str(Path(__file__).parent / 'gpu')!r}])))\n"
    )
    assert run(code).splitlines()[-1] in ("0", "5"), "5: without a GPU there is nothing to collect"
