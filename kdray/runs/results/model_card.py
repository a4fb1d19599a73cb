"""Model card of an exported student: what it was distilled from and how, and what was measured, from the run's own files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdray.config import Config, ModelSource
from kdray.config.load import load_saved_config
from kdray.models.resolve import model_name
from kdray.runs.folder import RunFolder
from kdray.runs.metrics import METRICS
from kdray.runs.results.comparison import OUTCOMES, headlines, show_interval

CARD = "README.md"
"""Name of the card in a model's folder, where hubs look for it."""


def write_card(run: RunFolder, model: Path, step: int | None = None) -> None:
    """Write the card into an exported model's folder. Args: step: of the checkpoint; None for the finished run's student."""
    from huggingface_hub import ModelCardData

    config = load_saved_config(run.config)
    student = config.student.model
    # A folder's place on some machine says nothing to others.
    base = student if isinstance(student, str) and not Path(student).expanduser().exists() else None
    data = ModelCardData(base_model=base, library_name="transformers", tags=["distillation", "kdray"])
    lines = ["---", data.to_yaml(), "---", "", f"# {config.run.name}", "", *_origin(config, _teachers(run, config), step)]
    if step is None and run.summary.is_file():
        lines += ["", *_results(json.loads(run.summary.read_text(encoding="utf-8")))]
    (model / CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _teachers(run: RunFolder, config: Config) -> list[str]:
    """Names of the teachers' models, as far as the run knows them by what they computed; otherwise the recipe's names."""
    found = run.read_teachers()
    return [str(found.get(name, {}).get("model", name)) for name in config.teachers]


def _origin(config: Config, teachers: list[str], step: int | None) -> Iterator[str]:
    training, rollout = config.training, config.rollout
    taught = " and ".join(f"`{name}`" for name in teachers)
    when = "" if step is None else f" This is the checkpoint of step {step} of {training.steps}."
    how = f"distilled from {taught}" if config.distilled else f"trained on a reward, beside {taught} as its teacher,"
    yield f"`{_name(config.student.model)}`, {how} by kdray.{when}"
    yield ""
    yield f"- loss `{config.loss.type}`; teacher's weight in the sampling distribution (alpha) {rollout.alpha:g}"
    if config.rewarded:
        verdict = (
            "the task's own verdict" if config.data.grader is None else f"the verdict of the grader `{config.data.grader.type}`"
        )
        weights = f"weight {_weight(config, 'reward')}, distillation's {_weight(config, 'distillation')}"
        yield f"- reward: {verdict} on each response, over that on the others to its prompt; {weights}"
    yield f"- {training.steps} steps of {training.batch_size} responses, learning rate {training.learning_rate:g}"
    if training.sft.steps:
        yield f"- {training.sft.steps} supervised steps before them"
    if training.finetune.steps:
        yield f"- {training.finetune.steps} supervised steps after them"
    if training.lora is not None:
        yield f"- an adapter of rank {training.lora.rank}, merged here; by itself in `adapter/`"


def _weight(config: Config, term: str) -> str:
    """Weight of a term of the loss; where it follows a schedule, that it does."""
    setting = f"{term}_weight"
    return "by a schedule" if f"loss.{setting}" in config.training.schedules else f"{getattr(config.loss, setting):g}"


def _name(source: ModelSource) -> str:
    return model_name(source) if isinstance(source, str) else str(source.type)


def _results(summary: Mapping[str, Any]) -> Iterator[str]:
    columns = [name for name in OUTCOMES if isinstance(summary.get(name), Mapping)]
    yield "## On held-out prompts"
    yield ""
    for line in headlines(summary):
        yield line
        yield ""
    yield f"| metric, with 95% interval | {' | '.join(columns)} |"
    yield f"|---|{'---|' * len(columns)}"
    for metric in dict.fromkeys(metric for column in columns for metric in summary[column]):
        unit = f" ({METRICS[metric].unit})" if metric in METRICS else ""
        cells = [_cell(summary, column, metric) for column in columns]
        if any(cells):
            yield f"| {metric}{unit} | {' | '.join(cells)} |"
    versions = ", ".join(f"{name} {version}" for name, version in (summary.get("versions") or {}).items())
    yield ""
    yield f"Trained on {summary['trained_tokens']:,} response tokens{f', with {versions}' if versions else ''}."


def _cell(summary: Mapping[str, Any], column: str, metric: str) -> str:
    value = summary[column].get(metric)
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}{show_interval(summary.get('intervals'), column, metric)}"
    number = isinstance(value, int | float)
    return f"{value:,.0f}{show_interval(summary.get('intervals'), column, metric)}" if number else str(value or "")
