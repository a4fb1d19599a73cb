"""Entry points of the commands: check a config, connect, place, and run, capture, evaluate or test its teachers.

Nothing is left running: replicas, ranks and stores end with the run, and so does a Ray that the run started.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.driver_actor import on_driver_node
from actors.serving.registry import TeacherRegistry
from actors.serving.spec import RunHandles
from cluster.assembly import open_pools
from cluster.capture_run import capture_answers, capture_folder, check_capturable, first_requests, wanted_answers
from cluster.checkpointing import Checkpoint
from cluster.connect import check_local_cpus, connected, connecting
from cluster.evaluation import check_signals, held_out
from cluster.interrupt import run_coroutine
from cluster.peer_runs import run_together
from cluster.planning.head import check_head
from cluster.planning.placement import bundles
from cluster.planning.reservation import driver_node, reserved
from cluster.runner import RunPlan
from cluster.stages.lengths import check_steps
from kdray.capturing.collect import check_alone, lacking
from kdray.checks.inputs import changed_versions, check_inputs, check_revisions, inputs_of, installation
from kdray.checks.preflight import check, check_warm_up
from kdray.checks.trackers import check_trackers
from kdray.config import Config, StudentBackendSettings
from kdray.config.load import load_saved_config, read_saved_config
from kdray.config.resuming import as_begun
from kdray.config.secret_files import set_secrets
from kdray.errors import ConfigError, DataError, LeaseLost, StorageError, ended_with
from kdray.models.identity import pinned
from kdray.models.inspect import decoder
from kdray.runs.checkpoints import NotWhole, discard, newest_checkpoint, read_marker
from kdray.runs.context import Checked, RunContext, resolve_models
from kdray.runs.folder import CAPTURE, RunFolder, check_writable
from kdray.runs.lease import Lease, leased
from kdray.runs.remote_copy import METRICS, StoredRun, num_stored_lines
from kdray.runs.report import write_report
from kdray.runs.reporter import RunReporter
from kdray.runs.results.comparison import intervals_of
from kdray.runs.results.draws import ratios
from kdray.runs.results.seeds import begun, check_seeds, finished, seeded, write_seeds
from kdray.runs.storage import Storage
from kdray.runs.tracking.trackers import Trackers
from kdray.runs.watchdog import Watchdog
from kdray.teachers.peers import peer_configs

OnPhase = Callable[[str | None], None]
"""Called with what goes on until the run shows itself, and then with None."""

_END_S = 120.0
"""Time that a run gets to shut down what is not its pools: ranks, actors, threads, Ray."""
_LAST_WORDS = "the last report to trackers and storage"
_LAST_WORDS_S = 600.0
_CONNECT_S = 1200.0
"""Time for Ray's and Serve's own start; a controller of Serve's that stands still gets `cluster.stuck_after_s` besides."""


_CHECKING = "checking models and data"
_PLACING = "placing its parts"
_AGAIN = "the same command begins anew"


def _unseen(what: str | None) -> None:
    """A listener for programs that show nothing."""


def run(
    config: Config, resume: bool = False, prompts: Iterable[Any] | None = None, on_phase: OnPhase = _unseen
) -> dict[str, Any]:
    """Run a config from its first phase to its summary; returns the contents of summary.json.

    Args: prompts: texts or records, for `data.prompts.type: iterable`; on_phase: see `OnPhase`.
    Raises: ConfigError or DataError before anything starts; Interrupted after a checkpoint; KdrayError with the reason.
    """
    # Before the storage is read, too.
    set_secrets(config.cluster.secret_files("driver"))
    if resume:
        config = _as_begun(config)
        if (summary := _ended(config)) is not None:
            on_phase("reading its results: the run has ended already")
            return summary
    else:
        # Said at once, not after models are read and the cluster has room. `create` says why a folder cannot be read.
        with contextlib.suppress(OSError):
            RunFolder(config.run_folder).check_free()
    if resume and config.run.storage is None:
        RunFolder(config.run_folder).check_resumable(config)
    on_phase(_CHECKING)
    check_trackers(config)
    _quieten(config.training.backend)
    # Places that cannot be written are told of before models are read, as are files that are not there.
    check_writable(config)
    configs, stored = {"": config}, {"": StoredRun.of(config)}
    given = None if prompts is None else list(prompts)
    checked = {"": check(config, given, begins=not resume)}
    if config.peers:
        models = resolve_models(config)
        configs |= peer_configs(config, models.teachers, models.student)
        checked |= {name: check(each, given, begins=not resume) for name, each in configs.items() if name}
        stored |= {name: StoredRun.of(each) for name, each in configs.items() if name}
    with leased(config, stored[""]) as lease:
        for each in stored.values():
            if each is not None:
                each.guard = lease.check_everywhere
        return _run(configs, checked, stored, resume, lease, on_phase)


def run_seeds(
    config: Config,
    count: int,
    resume: bool = False,
    on_start: Callable[[Config], None] = lambda config: None,
    on_phase: OnPhase = _unseen,
) -> dict[str, Any]:
    """Run a config with `count` seeds, one after another; returns the content of seeds.json, which is written after each.

    With `resume`, seeds that have ended are skipped, one that was interrupted goes on, and those not begun are started.
    Those of an earlier command that are beyond `count` stay in seeds.json.
    Args: on_start: called with each config that is about to run; on_phase: see `OnPhase`.
    Raises: as `run`, for the seed that fails; the others stay as they are.
    """
    configs = seeded(config, count)
    check_seeds(config, configs, resume)
    # All of them before the first one runs: hours later is too late to learn that one has other settings.
    known = configs | begun(config) if resume else {}
    ended = {seed: summary for seed, each in known.items() if (summary := finished(each)) is not None}
    found: dict[str, Any] = {}
    for seed, each in configs.items():
        if seed not in ended:
            on_start(each)
            ended[seed] = run(each, resume and _begun(each), on_phase=on_phase)
        found = write_seeds(config.run_folder, known | configs, ended)
    return found


def _as_begun(config: Config) -> Config:
    """The config with the defaults that the run to resume began with, where they have changed since."""
    folder = RunFolder(config.run_folder)
    if folder.config.is_file():
        return as_begun(load_saved_config(folder.config), config)
    stored = StoredRun.of(config)
    content = None if stored is None else stored.storage.read("config.yaml")
    return config if content is None else as_begun(read_saved_config(content, f"{config.run.storage}: config.yaml"), config)


def _ended(config: Config) -> dict[str, Any] | None:
    """Summary of a run that has ended with these settings, and whose student is there; None if there is something to do."""
    try:
        exported = read_marker(Storage.local(config.run_folder), "student") is not None
        return finished(config) if exported else None
    except (ConfigError, DataError):
        # It goes on with others, or is refused with the reason.
        return None


def _begun(config: Config) -> bool:
    """True if there is a run to resume, here or in the storage."""
    if RunFolder(config.run_folder).config.is_file():
        return True
    stored = StoredRun.of(config)
    return stored is not None and stored.storage.read("config.yaml") is not None


def _run(
    configs: Mapping[str, Config],
    checked: Mapping[str, Checked],
    stored: Mapping[str, StoredRun | None],
    resume: bool,
    lease: Lease,
    on_phase: OnPhase,
) -> dict[str, Any]:
    """Run what is checked, under a lease of the first run's folder and storage. Args: by the name of the concurrent run."""
    config = configs[""]
    checkpoints: dict[str, Checkpoint | None] = dict.fromkeys(configs)
    passed_over: dict[str, list[NotWhole]] = {name: [] for name in configs}
    for name, each in configs.items():
        held = stored[name]
        if resume:
            checkpoints[name], passed_over[name] = _checkpoint_to_resume(each, held)
            if checkpoints[name] is None:
                check_warm_up(each)
        elif held is not None:
            held.refuse_another()
    records = {name: _record(checked[name], checkpoints[name]) for name in configs}
    wanted = [bundle for each in configs.values() for bundle in bundles(each)]
    check_local_cpus(config, wanted)
    with contextlib.ExitStack() as opened:
        watchdog = opened.enter_context(_watchdog(config))
        on_phase(connecting(config))
        opened.enter_context(_connected(config, watchdog))
        check_head([*configs.values()], [driver_node()])
        on_phase(_PLACING)
        room = opened.enter_context(reserved(wanted, config.cluster, _tell))
        plans: dict[str, RunPlan] = {}
        on_phase(None)
        with contextlib.ExitStack() as reporters:
            for name, each in configs.items():
                # Only now: a config that cannot run leaves no folder that would block the corrected one.
                fetched = _fetch(each, stored[name], checkpoints[name]) if resume else False
                found = checkpoints[name]
                folder = RunFolder.create(each, resume, 0 if found is None else found.step, lease.check)
                # Peers report to their folders only: a terminal shows one run at a time.
                console = Console(quiet=True) if name else None
                decode = decoder(checked[name].tokenizer)
                trackers = Trackers(each, folder.path)
                reporter = RunReporter(folder, each.training.steps, console, decode=decode, trackers=trackers)
                reporters.callback(reporter.close)
                reporter.references = checked[name].dataset.answers
                if fetched:
                    reporter.event("fetched", storage=each.run.storage)
                for bad in passed_over[name]:
                    reporter.event("checkpoint_not_whole", checkpoint=bad.key, reason=bad.reason)
                    lease.check_everywhere()
                    discard(bad)
                _tell_changes(reporter, found, records[name])
                its_models = pinned(checked[name].config, records[name]["inputs"])
                plans[name] = RunPlan(
                    replace(checked[name], config=its_models),
                    folder,
                    reporter,
                    found,
                    stored[name],
                    lease,
                    records[name],
                    on_start=room.release,
                )
            reporters.push(watchdog.before_closing(_LAST_WORDS, _LAST_WORDS_S))
            try:
                summaries = run_coroutine(run_together(plans, lease, watchdog))
            except (StorageError, LeaseLost):
                raise
            except Exception as error:
                watchdog.must_end(_LAST_WORDS, _LAST_WORDS_S, ended_with(error))
                # The events go to the storage, too, since the machine itself may not persist.
                for plan in plans.values():
                    _send_last(plan)
                raise
        # Before Ray is shut down, which may hang. The storage has deadlines of its own.
        watchdog.ended()
        lease.check_everywhere()
        for plan in plans.values():
            write_report(plan.folder.path)
            if plan.stored is not None:
                plan.stored.send_results()
    return summaries[""]


def _watchdog(config: Config, **remedy: str) -> Watchdog:
    cluster = config.cluster
    return Watchdog(cluster.stuck_run_after_s, cluster.teardown_s + _END_S, config.run_folder / "logs", **remedy)


@contextlib.contextmanager
def _connected(config: Config, watchdog: Watchdog) -> Iterator[None]:
    """As `connected`, with a deadline for either end."""
    watchdog.must_end("the connection to Ray and Ray Serve", _CONNECT_S + config.cluster.stuck_after_s)
    with contextlib.ExitStack() as opened:
        opened.enter_context(connected(config))
        opened.push(watchdog.before_closing("the shutdown of Ray"))
        watchdog.ended()
        yield


def _fetch(config: Config, stored: StoredRun | None, checkpoint: Checkpoint | None) -> bool:
    """Download the run folder from the storage, to continue from the checkpoint in it; False if it was already here."""
    step = 0 if checkpoint is None else min(checkpoint.step, config.training.steps)
    return stored is not None and stored.fetch(step)


def _record(checked: Checked, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """What every checkpoint of the run records of its inputs and installation.

    Raises: ConfigError if the inputs are not those of the checkpoint to resume from; DataError.
    """
    record = {"inputs": inputs_of(checked), "installation": installation(checked)}
    if checkpoint is not None:
        folder = RunFolder(checked.config.run_folder)
        recorded = checkpoint.progress.get("inputs")
        # Settings first: another one is the reason for what it names. A folder that is only in the storage is compared later.
        found = folder.changes(checked.config) if folder.config.is_file() else []
        check_revisions(recorded, found)
        if recorded is not None:
            check_inputs(checked.config, recorded, record["inputs"], _changed_versions(checkpoint, record))
    return record


def _changed_versions(checkpoint: Checkpoint, record: Mapping[str, Any]) -> dict[str, list[Any]]:
    before = checkpoint.progress.get("installation")
    return {} if before is None else changed_versions(before, record["installation"])


def _tell_changes(reporter: RunReporter, checkpoint: Checkpoint | None, record: Mapping[str, Any]) -> None:
    """Write the events of a resume with another installation, or with inputs that could not be compared."""
    if checkpoint is None:
        return
    if "inputs" not in checkpoint.progress:
        reason = "the checkpoint is of an earlier version of kdray: whether data and models are still the same is not known"
        reporter.event("inputs_unknown", step=checkpoint.step, reason=reason)
    if changed := _changed_versions(checkpoint, record):
        reporter.event("versions_changed", step=checkpoint.step, changed=changed)


def _send_last(plan: RunPlan) -> None:
    if plan.stored is None:
        return
    # A run that ends for another reason does not wait for its storage.
    plan.stored.storage.patience_s = 0.0
    try:
        plan.stored.send()
    except StorageError as error:
        plan.reporter.event("storage_failed", reason=str(error))


def _quieten(backend: StudentBackendSettings) -> None:
    """Silence libraries' notices and progress bars of single files: they tell a user nothing, and the terminal is the run's."""
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        for name, value in backend.environment_on_cpus.items():
            os.environ.setdefault(name, value)


def _checkpoint_to_resume(config: Config, stored: StoredRun | None) -> tuple[Checkpoint | None, list[NotWhole]]:
    """The newest complete checkpoint of the config's run, None if there is none yet; and newer ones that are incomplete.

    Raises: ConfigError if the config's steps do not match it, or a trained run has no checkpoint; DataError.
    """
    # A run may have begun without a storage, or with another one.
    places = ([] if stored is None else [stored.storage]) + [Storage.local(config.run_folder)]
    found, passed_over = newest_checkpoint(places)
    if found is None:
        for place in places:
            trained = num_stored_lines(place, METRICS)
            if trained:
                looked = " or ".join(f"{place.url}/checkpoints" for place in places)
                raise ConfigError(
                    f"{place.url}: the run was trained for {trained} steps, but there is no checkpoint in {looked}; set "
                    "run.storage to where they are, or choose another run.name"
                )
        return None, passed_over
    checkpoint = Checkpoint(folder=config.run_folder.absolute() / found.key, progress=found.progress)
    check_steps(config.training, checkpoint)
    return checkpoint, passed_over


def evaluate(config: Config, student: Path | None = None, on_phase: OnPhase = _unseen) -> dict[str, Any]:
    """Evaluate a student against its teacher on the held-out prompts; `student` is a folder, None the config's own model.

    Args: on_phase: see `OnPhase`.
    Returns: the numbers by name, and the bounds of their intervals under `intervals`.
    """
    # If the teacher is the student itself, it remains the recipe's model, whichever student is evaluated.
    teachers = resolve_models(config).teachers
    if student is not None:
        config = config.model_copy(update={"student": config.student.model_copy(update={"model": str(student)})})
    on_phase(_CHECKING)
    checked = check(config)
    on_phase(connecting(config))
    with _watchdog(config, remedy=_AGAIN) as watchdog, _connected(config, watchdog):
        on_phase(_PLACING)
        _await_room(config, lambda role: role != "student")
        on_phase("starting engines and measuring")
        context = checked.with_models(replace(resolve_models(config), teachers=teachers))
        return run_coroutine(watchdog.over(_evaluate(context, watchdog)))


@contextlib.contextmanager
def student_of_step(source: str, run_folder: Path, step: int) -> Iterator[Path]:
    """The student of a run's checkpoint, in a folder that is deleted afterwards.

    Args: source: the run's folder or URL; run_folder: its files here.
    Raises: DataError if there is no such checkpoint, or it is not whole; TrainingError if it cannot be read.
    """
    from actors.student.checkpoints.whole_student import write_student

    config = RunFolder(run_folder).load_config()
    if "://" in source:
        places = [Storage(source)]
    else:
        places = [Storage.local(run_folder.absolute())]
        if config.run.storage is not None:
            places.append(Storage(config.run.storage, config.run.name))
    # Run folders are readable from every node.
    near = config.run.output.absolute() / ".models"
    near.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".step-{step}-", dir=near) as folder:
        student = Path(folder) / "student"
        write_student(config, step, student, places)
        yield student


def capture(
    config: Config,
    to: Path | None = None,
    epochs: int = 1,
    reuse: bool = False,
    prompts: Iterable[Any] | None = None,
    on_progress: Callable[[int, int], None] = lambda held, wanted: None,
    on_phase: OnPhase = _unseen,
) -> dict[str, Any]:
    """Record the teacher's answers to every training prompt; returns `cluster.capture_run.Captured` as a dict.

    Args: to: the folder, None for `<run folder>/capture`; epochs: passes over the prompts, each with its own samples; reuse:
          see `kdray.capturing.collect.lacking`; prompts: as for `run`; on_progress: called with the answers held and wanted;
          on_phase: see `OnPhase`.
    Raises: ConfigError or DataError before anything starts, and for another teacher than that of the stored answers;
    Interrupted with all received answers stored.
    """
    on_phase(_CHECKING)
    _quieten(config.training.backend)
    check_capturable(config)
    checked = check(config, prompts)
    requests = first_requests(checked, epochs)
    check_alone(requests)
    context = checked.with_models()
    with capture_folder(context, to or config.run_folder / CAPTURE) as folder:
        wanted = wanted_answers(checked, folder, requests)
        missing = lacking(folder, wanted, reuse)
        with contextlib.ExitStack() as stack:
            watchdog = stack.enter_context(_watchdog(config, remedy="the same command goes on from there"))
            watchdog.on_event = folder.note
            # A teacher in this process or on an external endpoint needs no cluster, and a complete folder needs no teacher.
            if config.served_teachers and missing:
                on_phase(connecting(config))
                stack.enter_context(_connected(config, watchdog))
                on_phase(_PLACING)
                _await_room(config, lambda role: role.startswith("teacher"))
                on_phase("starting engines")
            work = capture_answers(context, folder, wanted, missing, on_progress, watchdog)
            return asdict(run_coroutine(watchdog.over(work)))


def check_teachers(config: Config, on_phase: OnPhase = _unseen) -> dict[str, dict[str, float]]:
    """Start only the teachers and check their signals; returns the numbers of `kdray.checks.teacher_signal` by teacher.

    Args: on_phase: see `OnPhase`. Raises: SignalError.
    """
    on_phase(_CHECKING)
    _quieten(config.training.backend)
    checked = check(config)
    on_phase(connecting(config))
    with _watchdog(config, remedy=_AGAIN) as watchdog, _connected(config, watchdog):
        check_head([config], [driver_node()])
        on_phase(_PLACING)
        _await_room(config, lambda role: role != "student")
        on_phase("starting engines and asking them")
        return run_coroutine(watchdog.over(_check_teachers(checked.with_models(), watchdog)))


async def _check_teachers(context: RunContext, watchdog: Watchdog) -> dict[str, dict[str, float]]:
    async with open_pools(context, RunHandles(registry=on_driver_node(TeacherRegistry).remote({}))) as pools:
        pools.tell(watchdog)
        return {each.name: await check_signals(context, each) for each in pools.named}


async def _evaluate(context: RunContext, watchdog: Watchdog) -> dict[str, Any]:
    async with open_pools(context, RunHandles(registry=on_driver_node(TeacherRegistry).remote({}))) as pools:
        pools.tell(watchdog)
        found = await held_out(context, pools).measure(version=0)
        return found.numbers | {"intervals": intervals_of(ratios(found.draws, context.config.evaluation.passes))}


def _await_room(config: Config, starts: Callable[[str], bool]) -> None:
    """Wait for enough capacity for the roles that are about to start."""
    with reserved([bundle for bundle in bundles(config) if starts(bundle.role)], config.cluster, _tell):
        pass


def _tell(line: str) -> None:
    Console(stderr=True).print(line, highlight=False)
