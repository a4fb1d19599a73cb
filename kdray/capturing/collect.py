"""Collection of a capture (`kdray capture`): requests every answer that a run would need, and stores each as it arrives.

The requests are those of a run with the same config, built by the same code, so that the same seed trains the same rollouts in
the same order from the capture as from the teacher. Answers already in the folder are not requested again. The number of
answers in flight is bounded: at most that many are lost if the process is killed, and requested again.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from kdray.capturing.format import digest
from kdray.capturing.writer import CaptureFolder
from kdray.errors import ConfigError, EngineError
from kdray.interfaces import Sampler, Scorer
from kdray.rollouts.draw import draw_scored
from kdray.rollouts.merge import Merged
from kdray.types import Rollout, SampleRequest

_CHUNKS = 4
"""Number of calls over which the answers in flight are spread: the next is sent when a quarter of them has ended."""


def check_alone(requests: Sequence[SampleRequest]) -> None:
    """Check that the teacher alone writes each answer. Raises: ConfigError if a student would write part of one."""
    for request in requests:
        if request.writer not in ("teacher", "data"):
            raise ConfigError(
                f"rollout.alpha={request.alpha:g}: a capture holds what the teacher writes alone, and a student would write "
                "some of it; set rollout.alpha=1, with a loss that learns from the teacher's samples (loss.type=forward_kl or "
                "sequence)"
            )


def by_key(
    folder: CaptureFolder, requests: Sequence[SampleRequest], references: Callable[[int], np.ndarray]
) -> dict[bytes, SampleRequest]:
    """The requests by the key of their answer; the first of those with equal keys.

    Args: references: by prompt id, the data's reference answer, which a request for it receives.
    """
    wanted: dict[bytes, SampleRequest] = {}
    for request in requests:
        reference = references(request.prompt_id) if request.writer == "data" else None
        wanted.setdefault(folder.key(request, reference), request)
    return wanted


def lacking(folder: CaptureFolder, wanted: Mapping[bytes, SampleRequest], reuse: bool = False) -> dict[bytes, SampleRequest]:
    """Wanted requests whose answers are not in the folder.

    Args: reuse: count any samples of a prompt, whatever their seeds, so that only new prompts are requested.
    """
    missing = {key: request for key, request in wanted.items() if key not in folder}
    if not reuse:
        return missing
    owed = Counter(digest(request.prompt_ids) for request in wanted.values() if request.writer != "data") - folder.draws()
    chosen = {}
    for key, request in missing.items():
        prompt = digest(request.prompt_ids)
        if request.writer == "data" or owed[prompt] > 0:
            owed[prompt] -= request.writer != "data"
            chosen[key] = request
    return chosen


async def ask(
    folder: CaptureFolder,
    missing: Mapping[bytes, SampleRequest],
    sampler: Sampler,
    scorer: Scorer | None,
    in_flight: int,
    on_answers: Callable[[int], None] = lambda count: None,
) -> None:
    """Request the missing answers and store them.

    Args: in_flight: maximum number of answers requested and not yet received; on_answers: called with the number of answers
    received.
    Raises: EngineError if the teacher answers something other than what was requested; exceptions of sampler and scorer.
    """
    keys = {request.sample_id: key for key, request in missing.items()}
    waiting = deque(missing.values())
    size = max(1, in_flight // _CHUNKS)
    owed: dict[int, set[int]] = {}
    async with Merged[int, list[Rollout]]() as merged:

        def send() -> None:
            chunk = [waiting.popleft() for _ in range(min(size, len(waiting)))]
            if not chunk:
                return
            # Recorded first: answers lost to a kill were requested, too.
            folder.note("asked", answers=len(chunk))
            number = chunk[0].sample_id
            owed[number] = {request.sample_id for request in chunk}
            merged.add(number, draw_scored(sampler, scorer, chunk))

        for _ in range(_CHUNKS):
            send()
        async for number, rollouts in merged:
            for rollout in rollouts:
                if rollout.sample_id not in owed[number]:
                    raise EngineError(f"sample {rollout.sample_id} arrived that was not asked for, or arrived twice")
                owed[number].remove(rollout.sample_id)
            folder.add(
                [
                    (key, None if missing[key].writer == "data" else missing[key].seed, rollout)
                    for rollout in rollouts
                    for key in [keys[rollout.sample_id]]
                ]
            )
            on_answers(len(rollouts))
            if not owed[number]:
                send()
    lost = sum(map(len, owed.values()))
    if lost:
        raise EngineError(f"the teacher ended with {lost} answers missing")
