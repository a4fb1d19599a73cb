"""`kdray eval --lm-eval`: models measured by tasks of the LM-Evaluation-Harness, in this process, without Ray."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import typer

from cluster.cli_base import print_columns
from kdray.config import Config


def measure_by_tasks(
    source: str, path: Path, settings: Config, models: Mapping[str, Path | None], include: Path | None
) -> None:
    """Measure models by the tasks of `evaluation.lm_eval`, print the results and, of a run, store them in its folder.

    Args: source: recipe, run folder or URL; path: its files here; models: by the name of their results, None for the recipe's
        student as it is; include: folder with tasks beside the harness's own.
    Raises: ConfigError, DataError.
    """
    from kdray.models.resolve import resolve_model
    from kdray.runs.folder import RunFolder
    from kdray.runs.results.harness import add_results, check_harness, measure, rows

    asked = check_harness(settings.evaluation.lm_eval, include)
    found = {}
    for name, model in models.items():
        if model is None:
            own = resolve_model(settings.student.model, settings.run.output / ".models")
            found[name] = measure(own, settings.student.revision, asked, include)
        else:
            found[name] = measure(model, None, asked, include)
    print_columns("lm-eval", {name: rows(each) for name, each in found.items()})
    if not path.is_dir():
        return
    written = add_results(RunFolder.open(path), found)
    if "://" in source:
        from kdray.config.storage import below
        from kdray.runs.storage import Storage

        key = written.relative_to(path).as_posix()
        Storage(source).put(written, key)
        typer.echo(below(source, key))
        return
    typer.echo(written)
