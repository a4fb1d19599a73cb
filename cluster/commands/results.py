"""Commands that read a run: report, verify, export. Registered in `cluster.cli`."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli_base import exit_codes, print_columns
from kdray.errors import ConfigError, DataError, HubError

if TYPE_CHECKING:
    from kdray.runs.results.hub import HubRepository

_STUDENT = "student"

Step = Annotated[
    int | None, typer.Option("--step", min=0, help="Take the student of this step's checkpoint, instead of the final one.")
]
RunPath = Annotated[
    str, typer.Argument(metavar="RUN", help="Run folder, such as runs/quickstart, or its URL in the run's storage.")
]
RunPaths = Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, or their URLs in the runs' storage.")]


def report(
    runs: RunPaths,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="FILE", help="Of several runs: the file; comparison.html otherwise."),
    ] = None,
) -> None:
    """Write a page that opens without a network: report.html in the run's folder, or a comparison of several runs."""
    with exit_codes(), contextlib.ExitStack() as opened:
        if len(runs) > 1:
            from kdray.runs.reports.compare import write_comparison

            if len(set(runs)) < len(runs):
                raise DataError(f"{' '.join(runs)}: names a run twice; give each once")
            folders = {run: opened.enter_context(local_copy(run)) for run in runs}
            typer.echo(write_comparison(folders, to or Path("comparison.html")))
            return
        if to is not None:
            raise DataError(f"--to {to}: is for a comparison of several runs; the report of one lies in its folder")
        from kdray.runs.report import write_report

        (run,) = runs
        written = write_report(opened.enter_context(local_copy(run)))
        if "://" not in run:
            typer.echo(written)
            return
        from kdray.config.storage import below
        from kdray.runs.storage import Storage

        Storage(run).put(written, written.name)
        typer.echo(below(run, written.name))


def verify(run: RunPath) -> None:
    """Prove from a run's files that every sample was trained once or left out by a rule; exit 1 and the list where not."""
    with exit_codes(), local_copy(run) as folder:
        from kdray.runs.verify import verify as prove

        proof = prove(folder)
        for note in proof.notes:
            typer.echo(f"note: {note}")
        if proof.problems:
            for line in proof.described():
                typer.echo(line, err=True)
            typer.echo(
                f"kdray: {run}: {sum(proof.counts.values())} contradictions in the files of a run ({proof.state})", err=True
            )
            raise typer.Exit(1)
        print_columns("proved", {str(run): dict(proof.facts)})


def export(
    run: RunPath,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="New or empty folder for the model; may be left out with --push.")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--quantize", metavar="int8|int4", help="Quantise the decoder's linear weights.")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option("--group-size", min=1, help="With int4: weights that share a scale; 128 if not given.")
    ] = None,
    step: Step = None,
    push: Annotated[
        str | None,
        typer.Option(
            "--push", metavar="OWNER/NAME", help="Push the model to this repository of the hub; a new one is private."
        ),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: a repository that everyone can read.")] = False,
    revision: Annotated[
        str | None,
        typer.Option("--revision", metavar="BRANCH", help="With --push: the branch; made if it is missing."),
    ] = None,
) -> None:
    """Copy a run's student to a folder (Hugging Face format, safetensors, a model card), quantised if asked; or push it."""
    with exit_codes(), contextlib.ExitStack() as opened:
        if push is None and to is None:
            raise DataError(
                "nothing says where the model goes: give a folder (--to DIR), a repository (--push OWNER/NAME), or both"
            )
        if push is None and (public or revision is not None):
            raise DataError(f"{'--public' if public else f'--revision {revision}'}: nothing is pushed; add --push OWNER/NAME")
        from kdray.runs.results.hub import HubRepository

        hub = None if push is None else HubRepository(push, public, revision)
        folder = opened.enter_context(local_copy(run))
        from kdray.runs.folder import RunFolder

        path = RunFolder.open(folder).path
        if step is None:
            student = finished_student(path)
        else:
            from cluster.launch import student_of_step

            student = opened.enter_context(student_of_step(run, path, step))
        target = to or Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="kdray-"))) / "model"
        _check_target(target, student)
        if method is not None:
            from kdray.models.quantization import check_quantization

            check_quantization(student, method, group_size)
        elif group_size is not None:
            raise DataError(f"--group-size {group_size}: nothing is quantised; add --quantize int4, or remove the option")
        if hub is not None:
            # Before the work: what is refused there is told at once, and the same command can be given again.
            hub.prepare()
        _write_model(student, target, method, group_size)
        _write_card(folder, target, step)
        if to is not None:
            typer.echo(to)
        if method is not None:
            from kdray.models.quantization import size_bytes

            typer.echo(f"weights: {size_bytes(student):,} bytes before, {size_bytes(target):,} after")
        if hub is not None:
            typer.echo(_push(hub, target, _message(run, step, method), to))


def _check_target(to: Path, student: Path) -> None:
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise DataError(f"--to {to}: not an empty folder; give a new one, nothing is overwritten")
    if to.resolve().is_relative_to(student.resolve()):
        raise DataError(f"--to {to}: lies inside the student that would be copied; give a folder elsewhere")


def _write_model(student: Path, to: Path, method: str | None, group_size: int | None) -> None:
    if method is None:
        from kdray.runs.checkpoints import COMMITTED

        shutil.copytree(student, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns(COMMITTED))
        return
    from kdray.models.quantization import quantize

    quantize(student, to, method, group_size)


def _message(run: str, step: int | None, method: str | None) -> str:
    """Message of the commit that a push makes."""
    # Of a path or URL the last part, which is the run's name: a machine's folders are nobody else's business.
    name = run.split("?")[0].rstrip("/").rsplit("/", 1)[-1] if "://" in run else Path(run).resolve().name
    details = [*([] if step is None else [f"step {step}"]), *([] if method is None else [f"quantised to {method}"])]
    return ", ".join([f"Student of {name}, distilled by kdray", *details])


def _push(hub: HubRepository, model: Path, message: str, kept: Path | None) -> str:
    """Push a model and return the commit's URL. Args: kept: where the model stays, if it does."""
    try:
        return hub.upload(model, message)
    except (DataError, HubError) as error:
        if kept is None:
            raise
        # The folder is no longer empty, so that the same command would be refused.
        again = f"hf upload {hub.repo_id} {kept} ." + (f" --revision {hub.revision}" if hub.revision else "")
        raise type(error)(f"{error}. The model lies in {kept}, from where `{again}` pushes it") from error


def _write_card(run: Path, model: Path, step: int | None) -> None:
    from kdray.runs.folder import RunFolder
    from kdray.runs.results.model_card import write_card

    try:
        write_card(RunFolder.open(run), model, step)
    except ConfigError as error:
        # The recipe of another version of kdray, which does not keep its student from being exported.
        typer.echo(f"kdray: no model card was written: {error}", err=True)


@contextlib.contextmanager
def local_copy(source: str) -> Iterator[Path]:
    """Local path of `source`: a path as it is, a URL as a copy that is deleted afterwards. Raises: DataError."""
    if "://" not in source:
        yield Path(source)
        return
    from kdray.config.storage import check_storage_url
    from kdray.runs.remote_copy import fetch_results

    try:
        url = check_storage_url(source)
    except ValueError as error:
        raise DataError(str(error).replace("run.storage", "RUN")) from error
    with tempfile.TemporaryDirectory(prefix="kdray-") as folder:
        yield fetch_results(url, Path(folder) / "run")


def finished_student(run_folder: Path) -> Path:
    """The student of a finished run. Raises: DataError if there is none yet, or it is not the one that was written."""
    from kdray.runs.checkpoints import FILES, differing, read_marker
    from kdray.runs.storage import Storage

    storage = Storage.local(run_folder)
    try:
        marker = read_marker(storage, _STUDENT)
    except DataError as error:
        raise DataError(f"{run_folder}/{_STUDENT}: {error}") from None
    if marker is None:
        raise DataError(
            f"{run_folder}: the run has no student yet; let it end (kdray run ... --resume continues it), or take that of a "
            "checkpoint: --step"
        )
    sizes = {name.removeprefix(f"{_STUDENT}/"): size for name, size in storage.list(_STUDENT).items()}
    reason = differing(marker[FILES], sizes)
    if reason is not None:
        raise DataError(f"{run_folder}/{_STUDENT}: {reason}; take it from a copy, or train again")
    return run_folder / _STUDENT
