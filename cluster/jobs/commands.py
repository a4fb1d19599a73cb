"""Commands for jobs: submit a run to a Ray cluster, show its state and log, stop it. Registered in `cluster.cli`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli_base import ConfigPath, Overrides, Supervise, exit_codes, load, print_rows
from kdray.errors import Interrupted, KdrayError

if TYPE_CHECKING:
    from cluster.jobs.client import JobServer, JobState

Address = Annotated[
    str | None,
    typer.Option(
        "--address", metavar="URL", help="The cluster's dashboard, such as http://head:8265; else RAY_API_SERVER_ADDRESS."
    ),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Allow plain http to another machine: token and config pass unencrypted.")
]
JobName = Annotated[str, typer.Argument(metavar="NAME", help="The run's name, or the id of one of its jobs.")]


def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Address = None,
    insecure: Insecure = False,
    follow: Annotated[bool, typer.Option("--follow", help="Follow the log; end with the job's exit code.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run from its checkpoint.")] = False,
    supervise: Supervise = False,
    name: Annotated[str | None, typer.Option("--name", metavar="JOB", help="The job's name; the run's if not given.")] = None,
    check_here: Annotated[
        bool, typer.Option("--check/--no-check", help="Check models and data here, where they can be reached, before sending.")
    ] = True,
) -> None:
    """Send a run to a Ray cluster as a job: kdray itself, the config, and the small files that it names."""
    with exit_codes():
        settings = load(config, overrides)
        from cluster.jobs.client import JobServer, check_name
        from cluster.jobs.package import forwarded, pack, unchecked
        from kdray.runs.folder import RunFolder

        if check_here and not resume:
            # Where the folder can be seen from here, before the job waits for room.
            with contextlib.suppress(OSError):
                RunFolder(settings.run_folder).check_free()
        package, environment = pack(settings), forwarded(settings)
        name = check_name(name or settings.run.name)
        server = JobServer(address, insecure)
        if not server.asks_for_token():
            # Not before the server: it sets what Ray reads when it is imported.
            from cluster.connect import NO_TOKEN

            typer.echo(NO_TOKEN.format(where=f"the cluster at {server.address}"), err=True)
        reasons = unchecked(settings, package) if check_here else ["--no-check"]
        if reasons:
            typer.echo(f"models and data are checked when the job starts, not here: {'; '.join(reasons)}")
        else:
            from kdray.checks.preflight import check

            for line in check(settings).findings:
                typer.echo(line)
        for place, path in package.files.items():
            typer.echo(f"sent along: {path} as {place}")
        flags = [flag for flag, given in (("--resume", resume), ("--supervise", supervise)) if given]
        job = server.submit(settings, package, environment, name, flags)
        typer.echo(f"job {job.id}: submitted to {server.address}; run folder {job.run_folder}")
        if follow:
            _follow(server, job)
        else:
            typer.echo(_hints(server, job))


def status(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A run's name or a job's id; all jobs if not given.")
    ] = None,
    address: Address = None,
    insecure: Insecure = False,
) -> None:
    """Show the jobs of a cluster, or one: state, how far it is, and how it ended."""
    with exit_codes():
        from cluster.jobs.client import TABLE, JobServer, outcome, table_rows

        server = JobServer(address, insecure)
        found = server.logs_of([server.job(name)] if name is not None else server.jobs())
        if not found:
            typer.echo(f"no jobs of kdray at {server.address}")
            return
        print_rows(TABLE, [*table_rows(found)])
        for job, log in found.items():
            if job.ended or isinstance(log, KdrayError):
                typer.echo(outcome(job, log))


def stop(name: JobName, address: Address = None, insecure: Insecure = False) -> None:
    """Ask a job to write a checkpoint and end, wait, and tell how it ended; exit 1 when it was killed without."""
    with exit_codes():
        from cluster.jobs.client import JobServer, job_exit_code, outcome

        server = JobServer(address, insecure)
        job = server.job(name)
        if not job.ended:
            typer.echo(f"{job.id}: asked to write a checkpoint and end; it is killed after {job.stop_wait_s} s")
            job = server.stop(job)
        log = server.logs(job)
        typer.echo(outcome(job, log))
        if not job.ended or (job.state == "STOPPED" and job_exit_code(job, log) is None):
            raise typer.Exit(1)


def logs(
    name: JobName,
    address: Address = None,
    insecure: Insecure = False,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job ends; end with its exit code.")] = False,
) -> None:
    """Print a job's log."""
    with exit_codes():
        from cluster.jobs.client import JobServer

        server = JobServer(address, insecure)
        job = server.job(name)
        if follow:
            _follow(server, job)
        else:
            typer.echo(server.logs(job), nl=False)


def _follow(server: JobServer, job: JobState) -> None:
    """Print a job's log until it ends, then its outcome. Raises: typer.Exit with its exit code."""
    from cluster.jobs.client import job_exit_code, outcome

    try:
        ended = server.follow(job, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        raise Interrupted(f"the job runs on: {_hints(server, job)}") from None
    log = server.logs(ended)
    typer.echo(outcome(ended, log), err=True)
    code = job_exit_code(ended, log)
    # A job that was killed or never started has no exit code of its own.
    raise typer.Exit(1 if code is None else code)


def _hints(server: JobServer, job: JobState) -> str:
    """The commands for a running job."""
    where = f"{job.id} --address {server.address}{' --insecure' if server.insecure else ''}"
    return f"kdray logs {where} --follow; kdray status {where}; kdray stop {where}"
