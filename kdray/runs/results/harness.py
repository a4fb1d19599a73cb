"""Measurement of a model by tasks of the LM-Evaluation-Harness (package lm_eval), and its results in a run's folder."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kdray.config.sections import LmEvalSettings
from kdray.errors import ConfigError, DataError
from kdray.runs.folder import RunFolder, utc_now, write_atomically

FILE = "lm_eval.json"
"""Name of the results' file in `evaluations/` of a run folder."""


def check_harness(settings: LmEvalSettings | None, include: Path | None) -> LmEvalSettings:
    """Check that tasks are named and the harness is installed, and return the settings.

    Args: include: folder with tasks beside the harness's own.
    Raises: ConfigError; DataError if there is no such folder.
    """
    if settings is None:
        raise ConfigError(
            "evaluation.lm_eval is not set: --lm-eval has no tasks to measure; name some, such as "
            "'evaluation.lm_eval={tasks: [hellaswag]}'"
        )
    if find_spec("lm_eval") is None:
        raise ConfigError("evaluation.lm_eval: the package lm_eval is not installed; pip install 'kdray[lm-eval]'")
    if include is not None and not include.is_dir():
        raise DataError(f"--lm-eval-include {include}: no such folder; give that of the tasks' YAML files")
    return settings


def measure(model: str | Path, revision: str | None, settings: LmEvalSettings, include: Path | None = None) -> dict[str, Any]:
    """Measure a Hugging Face folder or hub id by the tasks of the settings.

    Args: include: folder with tasks beside the harness's own, whose files may run code.
    Returns: `tasks`, by name, with the value of each metric, its standard error where the harness knows one, and the number of
        documents; beside it the settings, the harness's version and the time.
    Raises: ConfigError for a task that is not there; DataError for one that cannot be loaded.
    """
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager = _tasks(settings.tasks, include)
    try:
        manager.load(settings.tasks)
    except Exception as error:  # whatever a task's file makes the harness do
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(
            f"evaluation.lm_eval.tasks={settings.tasks}: cannot be loaded: {reason}; check the task's file, and that its data "
            "are there or can be downloaded"
        ) from error
    found = simple_evaluate(
        model=HFLM(
            pretrained=str(model),
            revision=revision or "main",
            device="cuda" if torch.cuda.is_available() else "cpu",
            batch_size=settings.batch_size,
            trust_remote_code=False,
        ),
        tasks=settings.tasks,
        num_fewshot=settings.shots,
        limit=settings.limit,
        apply_chat_template=settings.chat_template,
        log_samples=False,
        task_manager=manager,
    )
    assert found is not None, "this process is the only one"
    return {
        "tasks": {name: _task(name, found) for name in found["results"]},
        "settings": settings.model_dump(mode="json"),
        "harness": version("lm_eval"),
        "time": utc_now(),
    }


def _tasks(names: Sequence[str], include: Path | None) -> Any:
    """The harness's index of tasks. Raises: ConfigError for a task that is not in it."""
    from lm_eval.tasks import TaskManager

    manager: Any = None
    if include is not None:
        # The harness's own tasks are thousands of files, which are read only if they are asked for.
        manager = TaskManager(include_path=str(include), include_defaults=False)
    if manager is None or not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=None if include is None else str(include))
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            meant = f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists the harness's"
            where = (
                "; --lm-eval-include names a folder with others" if include is None else f" or of --lm-eval-include {include}"
            )
            raise ConfigError(f"evaluation.lm_eval.tasks: {name} is no task of the harness{where}; {meant}")
    return manager


def _task(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of a task, whose metrics the harness names `metric,filter`, with `metric_stderr,filter` beside them."""
    metrics: dict[str, dict[str, float]] = {}
    for key, value in found["results"][name].items():
        metric, comma, answer = key.partition(",")
        if not comma or not _is_number(value):
            continue
        of, is_error = metric.removesuffix("_stderr"), metric.endswith("_stderr")
        shown = of if answer == "none" else f"{of} ({answer})"
        metrics.setdefault(shown, {})["stderr" if is_error else "value"] = float(value)
    counted = found.get("n-samples", {}).get(name, {})
    return {
        "metrics": {metric: numbers for metric, numbers in metrics.items() if "value" in numbers},
        "documents": counted.get("effective"),
        "shots": found.get("n-shot", {}).get(name),
        "version": found.get("versions", {}).get(name),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def add_results(folder: RunFolder, found: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write results by model's name into a run's folder, beside those of other models. Raises: DataError."""
    path = folder.evaluations / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({**read_results(folder), **found}, indent=2, allow_nan=False) + "\n")
    return path


def read_results(folder: RunFolder) -> dict[str, dict[str, Any]]:
    """Read the results of all models that were measured so far. Raises: DataError if the file is not one of them."""
    path = folder.evaluations / FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for each in found.values():
            rows(each)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise DataError(f"{path}: no results of `kdray eval --lm-eval`: {type(error).__name__}: {error}; remove it") from error
    return dict(found)


def rows(found: Mapping[str, Any]) -> dict[str, str]:
    """Results of a model as they are shown: a line for each metric of each task, with its standard error, and one of how many
    documents it is an average."""
    shown: dict[str, str] = {}
    for task, each in found["tasks"].items():
        for metric, numbers in each["metrics"].items():
            error = numbers.get("stderr")
            shown[f"{task}: {metric}"] = f"{numbers['value']:.4g}" + ("" if error is None else f" ± {error:.2g}")
        if each["documents"] is not None:
            shown[f"{task}: documents"] = str(each["documents"])
    return shown
