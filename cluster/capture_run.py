"""Command `kdray capture`: starts only the config's teacher, and requests every answer that the folder lacks.

No student rank and no student replica runs: the recorded answers depend only on the teacher and the tokenizer.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from actors.driver_actor import on_driver_node
from actors.serving.registry import TeacherRegistry
from actors.serving.spec import RunHandles
from cluster.assembly import open_pools, training_sources
from cluster.engine_specs import canary
from cluster.interrupt import on_interrupt
from cluster.parts import Pools
from kdray.capturing.collect import ask, by_key
from kdray.capturing.writer import CaptureFolder, CaptureKeySpec
from kdray.config import Config
from kdray.data.dataset import PromptStream, encode_answer
from kdray.errors import ConfigError, Interrupted
from kdray.models.vocab import tokenizer_hash
from kdray.rollouts.draw import LoopSettings, sample_request
from kdray.rollouts.schedules import Schedules
from kdray.runs.context import Checked, RunContext
from kdray.runs.watchdog import Watchdog
from kdray.teachers.fingerprint import Fingerprint
from kdray.teachers.kind import kind_of
from kdray.types import SampleRequest


@dataclass(frozen=True)
class Captured:
    """Results of a start of `kdray capture`."""

    path: str
    wanted: int
    """Answers that this config requests."""
    held_before: int
    """Answers that the folder had when this start began."""
    asked: int
    """Answers that this start requested from the teacher."""
    held: int
    """Answers that the folder has now."""
    asked_ever: int
    """Answers requested from the teacher over all starts."""
    asked_again: int
    """Of these, answers in flight when a start ended early: requested, never stored, and requested once more."""
    retried: int
    """Answers that this start's pools retried by themselves, because a replica died or an endpoint failed."""
    seconds: float


def check_capturable(config: Config) -> None:
    """Raises: ConfigError if the config's answers do not come from a single teacher alone."""
    names = ", ".join(config.teachers)
    if len(config.teachers) > 1:
        raise ConfigError(
            f"teachers {names}: a capture holds the answers of one teacher; capture each with a config of its own, and give "
            "the captures to rollout.teachers.type=route"
        )
    (name,) = config.teachers
    if not kind_of(config, name).capturable:
        raise ConfigError(
            f"teachers.{name}.type={config.teachers[name].type}: its answers cannot be captured; use a teacher of type "
            "vllm, hf or openai"
        )
    program = config.rollout.program
    if program is not None and program.paired_rows:
        raise ConfigError(
            f"rollout.program.type={program.type}: its rows have prompts of their own, and a capture finds answers by "
            "the data's; run it with the teacher"
        )
    if config.rollout.environment is not None:
        raise ConfigError(
            f"rollout.environment.type={config.rollout.environment.type}: a capture holds answers of one turn; remove it, or "
            "run with the teacher"
        )
    if config.data.turns == "all" and config.trains_on_references:
        raise ConfigError(
            "data.turns=all: a capture finds reference answers by the prompt before the last turn; set data.turns=each, for a "
            "prompt of its own for every turn, or data.turns=last"
        )
    for setting, schedule in config.training.schedules.items():
        if schedule.follows is not None and setting.startswith("rollout."):
            raise ConfigError(
                f"training.schedules.{setting}.type={schedule.type}: a capture has no student whose signals it could "
                "follow; use linear or cosine"
            )


def key_spec(context: RunContext) -> CaptureKeySpec:
    """Everything that determines an answer, except its prompt and its seed."""
    config = context.config
    (name,) = config.teachers
    kind, rollout = kind_of(config, name), config.rollout
    how: dict[str, Any] = {
        "type": kind.settings.type,
        "max_new_tokens": rollout.max_new_tokens,
        "stop_ids": list(context.stop_ids),
    }
    if rollout.program is not None:
        how["program"] = rollout.program.model_dump(mode="json")
    how |= kind.identity(context.models.teachers.get(name), context.vocab_size)
    return CaptureKeySpec(tokenizer_hash(context.tokenizer), context.vocab_size, how)


def first_requests(checked: Checked, epochs: int) -> list[SampleRequest]:
    """Requests of a run in its first epochs over the training prompts, in its order."""
    config = checked.config
    settings, prompts = LoopSettings.of(config), PromptStream(checked.dataset.train, config.run.seed)
    count = len(checked.dataset.train) * config.rollout.samples_per_prompt * epochs
    schedules = Schedules.of(config)
    return [
        sample_request(settings, prompts, sample_id, values=schedules.at(sample_id // settings.batch_size))
        for sample_id in range(count)
    ]


async def capture_answers(
    context: RunContext,
    folder: CaptureFolder,
    wanted: dict[bytes, SampleRequest],
    missing: dict[bytes, SampleRequest],
    on_progress: Callable[[int, int], None],
    watchdog: Watchdog,
) -> Captured:
    """Request the answers that the folder lacks.

    Args: wanted, missing: by key, the answers that the config needs, and those of them to be requested; on_progress: called
    with the numbers of answers held and wanted; watchdog: is told of every answer.
    Raises: DataError if the stored answers are another teacher's; Interrupted if the user stops it, with all received answers
    stored.
    """
    with _stoppable(folder):
        started, held_before, asked_before = time.monotonic(), folder.held, folder.asked
        there = len(wanted) - len(missing)
        folder.note("start", held=held_before, wanted=len(wanted), missing=len(missing))
        retried = 0
        if missing:

            def on_answers(count: int) -> None:
                nonlocal there
                there += count
                watchdog.heard()
                on_progress(there, len(wanted))

            config = context.config
            alone = replace(context, route=context.route.without_student())
            registry = on_driver_node(TeacherRegistry).remote({}) if config.served_teachers else None
            known = folder.fingerprint
            compared = canary(context) if known is None else known.canary[: config.max_model_len]
            async with open_pools(alone, RunHandles(registry=registry), folder.note, canary=compared) as pools:
                pools.tell(watchdog)
                folder.begin(_joined(await _fingerprint(context, pools, registry, compared), known))
                sampler, scorer = training_sources(alone, pools)
                await ask(folder, missing, sampler, scorer, _in_flight(config), on_answers)
                retried = pools.retried
        manifest = folder.complete()
        captured = Captured(
            path=str(folder.path),
            wanted=len(wanted),
            held_before=held_before,
            asked=manifest.asked - asked_before,
            held=folder.held,
            asked_ever=manifest.asked,
            asked_again=manifest.asked - manifest.rollouts,
            retried=retried,
            seconds=round(time.monotonic() - started, 3),
        )
        folder.note("complete", **{name: value for name, value in asdict(captured).items() if name != "path"})
        return captured


@contextlib.contextmanager
def _stoppable(folder: CaptureFolder) -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP cancel the running task, which then ends with Interrupted."""
    main = asyncio.current_task()
    assert main is not None
    with on_interrupt(main.cancel):
        try:
            yield
        except asyncio.CancelledError as error:
            folder.note("interrupted", held=folder.held)
            raise Interrupted(
                f"stopped with {folder.held} answers in {folder.path}; the same command goes on from there"
            ) from error


async def _fingerprint(context: RunContext, pools: Pools, registry: Any, compared: tuple[int, ...]) -> Fingerprint | None:
    """The teacher's fingerprint, over the canary; None for a black box."""
    (name,) = context.config.teachers
    if context.config.teachers[name].served:
        return Fingerprint.from_dict((await registry.known.remote())[name])
    (teacher,) = pools.others
    return await teacher.fingerprint(compared)


def _joined(found: Fingerprint | None, known: Fingerprint | None) -> Fingerprint | None:
    """The fingerprint found, extended to the previous one's canary length."""
    if found is None or known is None or len(found.canary) >= len(known.canary):
        return found
    # This run's sequences are shorter. A token's score does not depend on the tokens after it: the remainder is unchanged.
    return replace(found, canary=known.canary, scores=found.scores + known.scores[len(found.scores) :])


def _in_flight(config: Config) -> int:
    """Number of answers that keeps the teacher busy while others are in transit: twice its concurrency."""
    (name,) = config.teachers
    return 2 * kind_of(config, name).in_flight


def capture_folder(context: RunContext, path: Path) -> CaptureFolder:
    """The folder of this config's answers, not yet opened."""
    return CaptureFolder(path, key_spec(context))


def wanted_answers(checked: Checked, folder: CaptureFolder, requests: Sequence[SampleRequest]) -> dict[bytes, SampleRequest]:
    """The requests by the key of their answer."""
    by_id = {prompt.prompt_id: prompt for prompt in checked.dataset.train}

    @cache
    def reference(prompt_id: int) -> np.ndarray:
        return encode_answer(checked.tokenizer, by_id[prompt_id])

    return by_key(folder, requests, reference)
