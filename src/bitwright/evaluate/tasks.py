"""Task accuracy through EleutherAI's lm-eval, the common yardstick. An optional extra: bitwright[lm-eval]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitwright.errors import CalibrationError, DependencyError


def run_tasks(
    model: Any, tokenizer: Any, tasks: Sequence[str], *, limit: int | None = None, batch_size: int = 1
) -> dict[str, dict[str, Any]]:
    """Metrics of each task: {task: {"acc": 0.51, "acc_stderr": 0.02, ...}}.

    model, tokenizer: of transformers, already loaded. tasks: names that lm-eval knows, or paths of its .yaml files
    (their folders are searched too). limit: first examples of each task. CalibrationError names a task not known.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise DependencyError("tasks need lm-eval: pip install 'bitwright[lm-eval]'") from error
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    for file in files:
        if not file.is_file():
            raise CalibrationError(f"there is no task file {file}")
    folders = sorted({str(file.parent.resolve()) for file in files})
    manager = TaskManager(include_path=folders or None)
    names = [_task_name(Path(task)) if Path(task) in files else task for task in tasks]
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise CalibrationError(f"lm-eval knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists them")
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=names,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=100,
    )
    return {name: _metrics(row) for name, row in results["results"].items()}


def _task_name(file: Path) -> str:
    import yaml

    class Loader(yaml.SafeLoader):
        """lm-eval's files use tags of its own (!function); only the plain key `task` is wanted here."""

    Loader.add_multi_constructor("!", lambda _loader, _suffix, _node: None)
    content = yaml.load(file.read_text(encoding="utf-8"), Loader=Loader)
    name = content.get("task") if isinstance(content, dict) else None
    if not isinstance(name, str):
        raise CalibrationError(f"{file} has no key 'task' with the task's name")
    return name


def _metrics(row: dict[str, Any]) -> dict[str, Any]:
    """lm-eval writes "acc,none" for metric and filter; the default filter's name is dropped."""
    return {k.removesuffix(",none"): v for k, v in row.items() if isinstance(v, int | float)}
