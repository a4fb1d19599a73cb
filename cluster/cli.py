"""Command `kdray`. Parses first; each command imports its dependencies itself, so that `--help` stays fast.

Exit codes: 0 done; 1 the run failed; 2 the config or an input is wrong; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli_base import (
    CHECKING,
    LOADING,
    ConfigPath,
    Outcome,
    Overrides,
    Supervise,
    exit_codes,
    load,
    opening,
    print_columns,
)
from cluster.commands.library_log import libraries_kept
from cluster.commands.recipes import init
from cluster.commands.results import Step, export, finished_student, local_copy, report, verify
from cluster.jobs.commands import logs, status, stop, submit
from kdray.errors import DataError

if TYPE_CHECKING:
    from kdray.config import Config

app = typer.Typer(
    name="kdray",
    help="Distributed online distillation of language models: vLLM teachers, DeepSpeed students, on Ray.",
    no_args_is_help=True,
    # A traceback belongs in the log; the message to the user names the setting and the remedy.
    pretty_exceptions_enable=False,
)

_PROGRESS_S = 5.0


def main() -> None:
    """Entry point of the command."""
    try:
        app()
    finally:
        _give_up_output()


def _give_up_output() -> None:
    """Discard output that can no longer be written, as to a file on a full disk: Python would exit with code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            # The remaining buffer is flushed once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _print_version(wanted: bool) -> None:
    if wanted:
        from kdray import __version__

        typer.echo(f"kdray {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options that stand before any command."""


# Here, so that `--help` lists the commands in the order of a run's life cycle.
app.command()(init)


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run from its checkpoint.")] = False,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="Run it with this many seeds, from run.seed on; mean and spread.")
    ] = None,
    supervise: Supervise = False,
) -> None:
    """Run a recipe: on a local Ray, or on the cluster that RAY_ADDRESS names."""
    with exit_codes() as outcome:
        settings = load(config, overrides)
        if supervise:
            if seeds is not None:
                raise DataError("--supervise with --seeds: a run is supervised alone; remove one of the two")
            from cluster.jobs.supervision import supervise_command

            given = ["run", str(config), *(overrides or [])]
            raise typer.Exit(supervise_command(given, settings.run_folder, resume, partial(typer.echo, err=True)))
        if seeds is not None:
            _run_seeds(settings, seeds, resume, outcome)
            return
        outcome.watch(settings.run_folder)
        with libraries_kept(outcome.logs), opening() as on_phase:
            on_phase(LOADING)
            from cluster.launch import run as launch

            summary = launch(settings, resume=resume, on_phase=on_phase)
        from kdray.runs.results.comparison import OUTCOMES, headlines

        for line in headlines(summary):
            typer.echo(line)
        results = {name: summary[name] for name in OUTCOMES if isinstance(summary.get(name), dict)}
        if results:
            print_columns("held-out", results, summary.get("intervals"))
        typer.echo(f"run folder: {settings.run_folder}")
        if settings.run.storage is not None:
            typer.echo(f"storage: {settings.run.storage}")
        report_path = settings.run_folder / "report.html"
        if report_path.is_file():
            typer.echo(f"report: {report_path}")


def _run_seeds(settings: Config, count: int, resume: bool, outcome: Outcome) -> None:
    from kdray.runs.results.seeds import SEEDS

    def on_start(each: Config) -> None:
        outcome.watch(each.run_folder)
        typer.echo(f"seed {each.run.seed}: {each.run_folder}")

    with libraries_kept(outcome.logs), opening() as on_phase:
        on_phase(LOADING)
        from cluster.launch import run_seeds

        found = run_seeds(settings, count, resume, on_start, on_phase)
    results = found["results"]
    columns = {word: {name: entry[word] for name, entry in results.items()} for word in ("mean", "std")}
    for seed in map(str, found["seeds"]):
        columns[f"seed {seed}"] = {name: entry["values"].get(seed) for name, entry in results.items()}
    known = {name: (entry["low"], entry["high"]) for name, entry in results.items() if entry["low"] is not None}
    print_columns("held-out", columns, {"mean": known})
    typer.echo(f"results: {settings.run_folder / SEEDS}")


@app.command()
def capture(
    config: ConfigPath,
    overrides: Overrides = None,
    to: Annotated[Path | None, typer.Option("--to", metavar="DIR", help="Folder; <run folder>/capture otherwise.")] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the prompts, each with draws of its own.")] = 1,
    reuse: Annotated[
        bool,
        typer.Option("--reuse", help="Any draws that a prompt has count, whatever their seeds: ask about new prompts alone."),
    ] = False,
) -> None:
    """Record the teacher's answers to every training prompt, to train later without it; the same command continues."""
    with exit_codes():
        settings = load(config, overrides)
        with opening() as on_phase:
            on_phase(LOADING)
            from cluster.launch import capture as launch

            found = launch(settings, to, epochs, reuse, on_progress=_progress(on_phase), on_phase=on_phase)
        (name,) = settings.teachers
        print_columns("capture", {"answers": {key: found[key] for key in found if key not in ("path", "seconds")}})
        typer.echo(f"train from it: 'teachers.{name}={{type: capture, path: {found['path']}}}'")


@app.command()
def validate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Resolve a config, check it, print it; exit 2 and say what is wrong otherwise."""
    with exit_codes():
        settings = load(config, overrides)
        with opening(announce=False) as on_phase:
            on_phase(CHECKING)
            from kdray.checks.data_look import look_at
            from kdray.checks.preflight import check
            from kdray.checks.trackers import check_trackers

            check_trackers(settings)
            checked = check(settings)
            found = look_at(settings, checked.tokenizer, checked.dataset).short()
        # Findings as comments, so that the whole output is again a valid config.
        for line in [*checked.findings, *found]:
            typer.echo(f"# {line}")
        typer.echo(settings.dump(), nl=False)


@app.command()
def data(
    config: ConfigPath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", min=0, help="Number of training rows to show.")] = 5,
) -> None:
    """Show the data as the model will see them: columns, tokens, what counts, lengths, what is dropped. Starts nothing."""
    with exit_codes():
        settings = load(config, overrides)
        from rich.console import Console

        with opening(announce=False) as on_phase:
            on_phase(CHECKING)
            from kdray.checks.data_look import look, show

            found = look(settings, rows)
        show(found, Console())


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    nodes: Annotated[
        Path | None,
        typer.Option(
            "--cluster",
            metavar="FILE",
            help="YAML of a cluster; otherwise RAY_ADDRESS's, or this machine.",
        ),
    ] = None,
    measured: Annotated[
        Path | None, typer.Option("--run", metavar="RUN", help="Take the rates from this run's metrics, not from a model.")
    ] = None,
) -> None:
    """Show what goes where, its memory, and which part will wait for which; exit 2 for what can never fit."""
    with exit_codes():
        settings = load(config, overrides)
        with opening(announce=False) as on_phase:
            on_phase("planning")
            from cluster.planning.plan import described_nodes, rates_of, table
            from cluster.planning.plan import plan as lay_out

            rates = None if measured is None else rates_of(measured)
            if nodes is None:
                from cluster.connect import nodes_for

                found = lay_out(settings, nodes_for(settings), rates)
            else:
                found = lay_out(settings, described_nodes(nodes), rates)
        print_columns("role", table(found))
        for line in found.lines:
            typer.echo(line)


@app.command(name="eval")
def evaluate(
    source: Annotated[
        str, typer.Argument(metavar="CONFIG-or-RUN", help="A recipe (its student as it is), a run folder, or a run's URL.")
    ],
    overrides: Overrides = None,
    other: Annotated[
        Path | None,
        typer.Option("--student", metavar="DIR", help="Measure the model in this folder, too, such as a quantised export."),
    ] = None,
    step: Step = None,
    lm_eval: Annotated[
        bool, typer.Option("--lm-eval", help="Measure by the LM-Evaluation-Harness's tasks of evaluation.lm_eval instead.")
    ] = False,
    include: Annotated[
        Path | None,
        typer.Option("--lm-eval-include", metavar="DIR", help="Folder with tasks of your own; their files may run code."),
    ] = None,
) -> None:
    """Measure a student against its teacher on the held-out prompts, or by tasks of the LM-Evaluation-Harness."""
    with exit_codes() as outcome, contextlib.ExitStack() as opened:
        student = None
        path = opened.enter_context(local_copy(source))
        if not path.exists():
            raise DataError(f"{path}: no such recipe or run folder")
        if path.is_dir():
            from kdray.runs.folder import RunFolder

            folder = RunFolder.open(path)
            settings = folder.load_config(overrides or [])
            if step is None:
                student = finished_student(folder.path)
        elif step is not None:
            raise DataError(f"--step {step}: {path} is a recipe; give a run folder or a run's URL")
        else:
            settings = load(path, overrides)
        if lm_eval:
            from kdray.runs.results.harness import check_harness

            check_harness(settings.evaluation.lm_eval, include)
        elif include is not None:
            raise DataError(f"--lm-eval-include {include}: no tasks are measured; add --lm-eval, or remove the option")
        if step is not None:
            from cluster.launch import student_of_step

            student = opened.enter_context(student_of_step(source, path, step))
        if student is not None:
            # A copy's log folder is deleted before anyone can read it.
            outcome.log_folder = path / "logs" if "://" not in source else None
        plain = None
        if other is not None:
            from kdray.models.quantization import plain_weights

            # Run folders are readable from every node.
            plain = opened.enter_context(plain_weights(other, settings.run.output / ".models"))
        if lm_eval:
            from cluster.commands.harness import measure_by_tasks

            models = {"student" if step is None else f"step {step}": student}
            measure_by_tasks(source, path, settings, models if plain is None else models | {f"{other}/": plain}, include)
            return
        on_phase = opened.enter_context(opening())
        on_phase(LOADING)
        from cluster.launch import evaluate as launch

        columns = {"student": launch(settings, student, on_phase)}
        if plain is not None:
            # With a trailing slash it is always a folder's name.
            columns[f"{other}/"] = launch(settings, plain, on_phase)
        found = {name: numbers.pop("intervals", {}) for name, numbers in columns.items()}
        print_columns("held-out", columns, found)


# As with `init`.
for command in (report, verify, export, submit, status, stop, logs):
    app.command()(command)


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="A recipe whose teachers to start and test, too.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings, as section.key=value.")] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Try tiny models through engine, trainer and export; minutes.")] = False,
    out: Annotated[Path, typer.Option(help="File of the results of --deep, to attach to a report.")] = Path("doctor.json"),
) -> None:
    """Show what this machine has, what it lacks, and what to do; exit 1 when something required is missing.

    With a recipe: start its teachers and check that they carry a signal that the recipe's loss reads.
    """
    with exit_codes():
        from rich.console import Console
        from rich.table import Column, Table
        from rich.text import Text

        from cluster.diagnosis.doctor import checks

        found = checks()
        # A path may be longer than its column.
        table = Table("", "check", *(Column(name, overflow="fold") for name in ("found", "what to do")))
        marks = {True: Text("ok", "green"), False: Text("MISSING", "bold red"), None: Text("note", "yellow")}
        for check in found:
            table.add_row(marks[check.ok], check.name, Text(check.found), Text(check.remedy))
        Console().print(table)
        if any(check.ok is False for check in found):
            raise typer.Exit(1)
        if deep:
            from cluster.diagnosis.deep import examine

            if not examine(found, out, typer.echo):
                raise typer.Exit(1)
        if config is not None:
            from kdray.config import load_config

            with opening() as on_phase:
                on_phase(LOADING)
                from cluster.launch import check_teachers

                measured = check_teachers(load_config(config, overrides or []), on_phase)
            for teacher, numbers in measured.items():
                described = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
                told = f"[green]ok[/] teacher {teacher}: {described}" if numbers else f"not checked: teacher {teacher}"
                Console().print(told, highlight=False)


def _progress(on_phase: Callable[[str | None], None]) -> Callable[[int, int], None]:
    """Callback that prints the numbers of answers held and wanted, at most every few seconds; it ends the phase before."""
    printed = time.monotonic()

    def show(held: int, wanted: int) -> None:
        nonlocal printed
        on_phase(None)
        if time.monotonic() - printed > _PROGRESS_S or held == wanted:
            printed = time.monotonic()
            typer.echo(f"{held} of {wanted} answers")

    return show


if __name__ == "__main__":
    main()
