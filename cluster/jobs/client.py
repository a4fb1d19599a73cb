"""Client of a cluster's job server: submits runs as Ray jobs, and turns every failure into a message."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster.jobs.package import JobPackage, write_folder
from kdray.checks.cluster_token import token_refused, token_source
from kdray.config import Config
from kdray.config.base import is_loopback
from kdray.errors import ConfigError, KdrayError

_DASHBOARD_PORT = 8265
_JOB_NAME = "kdray_job"
_RUN_FOLDER = "kdray_run_folder"
_STOP_WAIT = "kdray_stop_wait_s"

# Output of the driver: `cluster.cli` prints its reason to end, `cluster.job_entrypoint` its exit code, the reporter its
# progress.
_REASON = re.compile(r"^(?:kdray: .*|interrupted(?:: .*)?)$", re.MULTILINE)
_EXIT_CODE = re.compile(r"^kdray ended with exit code (\d+)$", re.MULTILINE)
_LEFT = r"(?:, (?:\d+ days?, )?[\d:]+ left)?"
_PROGRESS = re.compile(rf"^(?:prepare \S+|[a-z]+) \d+/\d+\b{_LEFT}|(?<=^still ).+: \d+ s$", re.MULTILINE)
_POLL_S = 0.5
_RECONNECT_S = 2.0
_RECONNECTS = 30
_ANSWER_S = 30.0


def server_address(given: str | None, insecure: bool = False) -> str:
    """The job server's URL: the given one, or the one from Ray's own variables.

    Args: insecure: accept plain http to other machines. Raises: ConfigError.
    """
    setting, address = "--address", given
    if address is None:
        for setting in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
            if address := os.environ.get(setting):
                break
    hint = f"give the URL of the cluster's dashboard, such as http://head:{_DASHBOARD_PORT}"
    if not address:
        raise ConfigError(f"--address: which cluster? {hint}, or set RAY_API_SERVER_ADDRESS")
    url = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"{setting}={address}: {error}; {hint}") from error
    if parts.scheme not in ("http", "https") or not host or parts.path not in ("", "/"):
        raise ConfigError(f"{setting}={address}: not the address of a job server; {hint}")
    if parts.username is not None or parts.password is not None:
        # The value is not repeated, since it may be a secret.
        raise ConfigError(f"{setting}: holds a user or a password; give the token by RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH")
    if parts.scheme == "http":
        if not (insecure or is_loopback(host)):
            raise ConfigError(
                f"{setting}={address}: plain http to another machine, on which anyone in between reads the cluster's token and "
                f"the run's config; use https, or a tunnel (ssh -L {_DASHBOARD_PORT}:localhost:{port or _DASHBOARD_PORT} "
                f"{host}, then --address=localhost:{_DASHBOARD_PORT}), or --insecure on a network that you trust"
            )
        if port is None:
            url = f"http://{parts.netloc}:{_DASHBOARD_PORT}"
    return url.rstrip("/")


@dataclass(frozen=True)
class JobState:
    """State of a job as reported by its server."""

    id: str
    """Ray's submission id."""
    name: str
    """Name of the run, or the value of `--name`; successive jobs may share it."""
    state: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    exit_code: int | None
    """Exit code of the driver, if it ended by itself."""
    started_s: float
    ended_s: float | None
    message: str
    """Ray's message about the state."""
    run_folder: str
    stop_wait_s: int

    @property
    def ended(self) -> bool:
        return self.state in ("SUCCEEDED", "FAILED", "STOPPED")


class JobServer:
    """Jobs of kdray on one cluster, by Ray's Jobs API. Every failure becomes a message; no message contains the token."""

    def __init__(self, address: str | None, insecure: bool = False) -> None:
        """Raises: ConfigError if nothing answers, something else answers, the token is not the cluster's, or the connection
        would be readable to others and that is not accepted (`insecure`)."""
        self.address = server_address(address, insecure)
        self.insecure = insecure
        # Ray's variables take precedence over a given address, and Ray sends an existing token only in this mode, which it
        # reads once, when it is imported.
        for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
            os.environ.pop(name, None)
        if token_source() is not None:
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        from cluster.connect import unreachable

        if problem := unreachable(self.address):
            raise ConfigError(
                f"--address={problem}; give the URL of the cluster's dashboard, and make its port reachable from here (such as "
                f"ssh -L {_DASHBOARD_PORT}:localhost:{_DASHBOARD_PORT} head)"
            )
        with self._explained():
            from ray.job_submission import JobSubmissionClient

            for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
                logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
            self._client = JobSubmissionClient(self.address)

    def submit(
        self, config: Config, package: JobPackage, environment: dict[str, str], name: str, flags: Sequence[str] = ()
    ) -> JobState:
        """Submit a run. Args: flags: options of `kdray run`, such as --resume.

        Raises: ConfigError if a job with this name, or one that writes the same folder, has not ended."""
        earlier = self.jobs()
        for job in earlier:
            if job.ended:
                continue
            end = f"end it with `kdray stop {job.id}`"
            if job.run_folder == str(config.run_folder):
                raise ConfigError(
                    f"run.name={config.run.name}: job {job.id} is {job.state} and writes the same run folder, "
                    f"{job.run_folder}; {end}, or choose another run.name or run.output"
                )
            if job.name == name:
                setting = "run.name" if name == config.run.name else "--name"
                raise ConfigError(
                    f"{setting}={name}: job {job.id} is {job.state} with this name; {end}, or choose another {setting}"
                )
        arguments = ["python", "-m", "cluster.job_entrypoint", "run", "config.yaml", *flags]
        with self._explained(), tempfile.TemporaryDirectory(prefix="kdray-job-") as folder:
            write_folder(package, Path(folder))
            used = {job.submission_id for job in self._client.list_jobs()}
            submission_id = self._client.submit_job(
                entrypoint=shlex.join(arguments),
                submission_id=free_id(name, used),
                runtime_env={"working_dir": folder, "env_vars": environment},
                metadata={
                    _JOB_NAME: name,
                    _RUN_FOLDER: str(config.run_folder),
                    _STOP_WAIT: str(config.cluster.job.stop_wait_s),
                },
            )
        return self.job(submission_id)

    def asks_for_token(self) -> bool:
        """True unless the server tells a stranger, who sends no token, what jobs there are."""
        import requests

        with self._explained():
            return requests.get(f"{self.address}/api/jobs/", timeout=_ANSWER_S).status_code in (401, 403)

    def jobs(self) -> list[JobState]:
        """Jobs that kdray submitted, the newest first."""
        with self._explained():
            found = [_state(job) for job in self._client.list_jobs() if _JOB_NAME in (job.metadata or {})]
        return sorted(found, key=lambda job: job.started_s, reverse=True)

    def job(self, name: str) -> JobState:
        """The newest job of a run's name, or the one with this id. Raises: ConfigError if there is none."""
        jobs = self.jobs()
        for job in jobs:
            if job.name == name:
                return job
        for job in jobs:
            if job.id == name:
                return job
        known = ", ".join(dict.fromkeys(job.name for job in jobs)) or "none yet"
        raise ConfigError(f"{name}: no such job at {self.address}; jobs of kdray there: {known}")

    def logs(self, job: JobState) -> str:
        """Log of the job so far."""
        with self._explained():
            return str(self._client.get_job_logs(job.id))

    def logs_of(self, jobs: Iterable[JobState]) -> dict[JobState, str | KdrayError]:
        """Log of each job so far, or the error that prevents reading it: a lost log does not hide other jobs."""
        found: dict[JobState, str | KdrayError] = {}
        for job in jobs:
            try:
                found[job] = self.logs(job)
            except KdrayError as error:
                found[job] = error
        return found

    def follow(self, job: JobState, write: Callable[[str], None]) -> JobState:
        """Pass on the job's log until it ends, and return its final state. A broken connection is restored.

        Raises: KdrayError if the server is unreachable for a minute; the job is not affected.
        """
        seen = failures = 0

        async def tail() -> None:
            nonlocal seen, failures
            position = 0
            async for text in self._client.tail_job_logs(job.id):
                # The server starts each connection at the beginning of the log.
                new = text[max(0, seen - position) :]
                position += len(text)
                if new:
                    seen, failures = position, 0
                    write(new)

        while True:
            try:
                with self._explained():
                    asyncio.run(tail())
                # Ray updates the state a moment after the log's last line.
                found = self.wait(job, limit_s=10.0)
                if found.ended:
                    return found
                failures = 0
            except ConfigError:
                # Another token, or another server: retrying helps with neither.
                raise
            except KdrayError:
                failures += 1
                if failures > _RECONNECTS:
                    raise
                time.sleep(_RECONNECT_S)

    def stop(self, job: JobState) -> JobState:
        """Ask a job to write a checkpoint and end; return its state once it has ended, or the time for that is over."""
        with self._explained():
            self._client.stop_job(job.id)
        # Ray kills it after that time, which takes a moment.
        return self.wait(job, limit_s=job.stop_wait_s + 30.0)

    def wait(self, job: JobState, limit_s: float) -> JobState:
        """Return the job's state once it has ended, or after `limit_s`."""
        deadline = time.monotonic() + limit_s
        while True:
            with self._explained():
                found = _state(self._client.get_job_info(job.id))
            if found.ended or time.monotonic() > deadline:
                return found
            time.sleep(_POLL_S)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Convert Ray's errors to kdray's."""
        try:
            yield
        except KdrayError:
            raise
        except Exception as error:
            raise self._told(error) from None

    def _told(self, error: Exception) -> KdrayError:
        from aiohttp import ClientConnectionError, ClientError
        from ray.exceptions import AuthenticationError
        from requests.exceptions import ConnectionError as RequestsConnectionError
        from requests.exceptions import RequestException, Timeout

        if isinstance(error, AuthenticationError):
            return token_refused(self.address, is_wrong="Forbidden" in str(error))
        if isinstance(error, ConnectionError | RequestsConnectionError | Timeout | ClientConnectionError):
            return ConfigError(f"--address={self.address}: no job server of Ray answers there; give the dashboard's address")
        if isinstance(error, RequestException | ClientError | KeyError) or "Version check" in str(error):
            return ConfigError(
                f"--address={self.address}: what answers there is no job server of Ray; give the dashboard's address, such as "
                f"http://head:{_DASHBOARD_PORT}"
            )
        # A server's error may be a traceback, whose last line holds the message.
        message = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
        return KdrayError(f"the job server at {self.address} says: {message.replace(token, '***') if token else message}")


def _state(job: Any) -> JobState:
    metadata = job.metadata or {}
    return JobState(
        id=str(job.submission_id),
        name=metadata.get(_JOB_NAME, str(job.submission_id)),
        state=str(job.status.value),
        exit_code=job.driver_exit_code,
        started_s=(job.start_time or 0) / 1000.0,
        ended_s=None if not job.end_time else job.end_time / 1000.0,
        message=job.message or "",
        run_folder=metadata.get(_RUN_FOLDER, ""),
        stop_wait_s=int(metadata.get(_STOP_WAIT, "0")),
    )


def free_id(name: str, used: set[str | None]) -> str:
    """`name`, or `name-2`, `name-3` and so on if earlier jobs used it: Ray never reuses an id."""
    number, candidate = 1, name
    while candidate in used:
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def check_name(name: str) -> str:
    """Check a job's name and return it. Raises: ConfigError for one that Ray or a shell cannot handle."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"--name {name!r}: use letters, digits, dot, dash and underscore, as in run.name")
    return name


TABLE = ("job", "state", "exit code", "progress", "started", "duration")


def table_rows(jobs: Mapping[JobState, str | KdrayError]) -> Iterator[tuple[str, ...]]:
    """The columns of `TABLE` for each job, from its log or from the reason why it cannot be read."""
    for job, log in jobs.items():
        text = "" if isinstance(log, KdrayError) else log
        code = job_exit_code(job, text) if job.ended else None
        started = datetime.fromtimestamp(job.started_s).astimezone()
        seconds = (job.ended_s or time.time()) - job.started_s
        yield (
            job.id,
            job.state,
            "" if code is None else str(code),
            "no log" if isinstance(log, KdrayError) else progress(text) or "",
            started.strftime("%Y-%m-%d %H:%M:%S"),
            str(timedelta(seconds=round(max(0.0, seconds)))),
        )


def reason(log: str) -> str | None:
    """Line in which the driver gave its reason to end; None if there is none."""
    lines = _REASON.findall(log)
    return lines[-1] if lines else None


def progress(log: str) -> str | None:
    """Phase and progress, such as `distill 3/12` or `starting engines: 20 s`, from the last line that tells one."""
    found = _PROGRESS.findall(log)
    return found[-1] if found else None


def job_exit_code(job: JobState, log: str) -> int | None:
    """Exit code of `kdray run`: 0, 1, 2 or 130; None if it was killed, or has not ended.

    Ray stores none for a job that was asked to stop, but the log contains it.
    """
    said = _EXIT_CODE.findall(log)
    if said:
        return int(said[-1])
    return job.exit_code if job.exit_code is None or job.exit_code in (0, 1, 2, 130) else 1


def explanation(job: JobState, log: str) -> str:
    """Reason why a job ended incomplete."""
    if job.state == "STOPPED" and job_exit_code(job, log) is None:
        return (
            f"killed before it could write a checkpoint within cluster.job.stop_wait_s={job.stop_wait_s}; submit it with "
            "--resume to go on from its newest one"
        )
    # Ray appends the end of the log to its message.
    return reason(log) or job.message.partition(", last available logs")[0].strip()


def outcome(job: JobState, log: str | KdrayError) -> str:
    """Outcome of a job in one line."""
    if isinstance(log, KdrayError):
        # Only Ray's own state: the existence of a checkpoint and the reason to end are known from the log alone.
        return f"{job.id}: {job.state}; its log cannot be had: {log}"
    code = job_exit_code(job, log)
    if not job.ended:
        return f"{job.id}: still {job.state}; kdray logs {job.id} shows what it does"
    if code == 0:
        return f"{job.id}: {job.state}, complete; run folder {job.run_folder}"
    described = "" if code is None else f" with exit code {code}"
    return f"{job.id}: {job.state}{described}: {explanation(job, log)}"
