"""A program around a teacher, as a Sampler: each request runs chained calls and yields one rollout with only the final answer.

The programs of many requests run concurrently as coroutines. Calls made in the same iteration of the event loop are sent to the
teacher as one call of `sample`: all first stages are batched, and a later stage starts as soon as its own input is there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from copy import copy
from dataclasses import dataclass, fields

import numpy as np

from kdray.config import Config
from kdray.config.programs import ProgramSettings
from kdray.errors import EngineError
from kdray.interfaces import Sampler
from kdray.rollouts.merge import Merged
from kdray.rollouts.seeds import sample_seed
from kdray.teachers.programs import run_program
from kdray.teachers.programs.ask import Answer, Ask, Question, Unparsable
from kdray.teachers.programs.universal import CALLS_OF_ONE
from kdray.types import Prompt, Rollout, SampleRequest

_CALLS_OF_A_STAGE = CALLS_OF_ONE * CALLS_OF_ONE
"""Maximum calls of one stage in a rollout: those of each answer, times the number of answers."""


class _Cut(Unparsable):
    """A token limit truncated a call or an answer."""


@dataclass
class _Counts:
    """Counts of one rollout, or of all that ended since the last report."""

    rollouts: int = 0
    unparsable: int = 0
    cut: int = 0
    calls: int = 0
    teacher_tokens: int = 0
    answer_tokens: int = 0

    def means(self) -> dict[str, float]:
        """Means by the names of `kdray.runs.metrics`; empty before the first rollout."""
        if not self.rollouts:
            return {}
        numbers = {
            "teacher_calls": self.calls / self.rollouts,
            "teacher_tokens": self.teacher_tokens / self.rollouts,
            "unparsable": self.unparsable / self.rollouts,
            "unparsable_cut": self.cut / self.rollouts,
        }
        parsed = self.rollouts - self.unparsable
        return numbers | ({"answer_tokens": self.answer_tokens / parsed} if parsed else {})

    def add(self, other: _Counts) -> None:
        for count in fields(self):
            setattr(self, count.name, getattr(self, count.name) + getattr(other, count.name))


@dataclass(frozen=True)
class TextCodec:
    """Conversion between texts and ids, with the student's tokenizer."""

    prompt: Callable[[str], Prompt]
    """Encodes a question as a prompt of any length, with the chat template: `kdray.data.dataset.question_encoder`."""
    answer: Callable[[str], list[int]]
    """Encodes a response, end-of-sequence last: `kdray.data.dataset.response_encoder`."""
    decode: Callable[[np.ndarray], str]


@dataclass(frozen=True)
class Rows:
    """Settings of the training rows that a program makes."""

    samples_per_prompt: int
    prefix: str
    """`data.prefix`, which is hidden from the teacher."""
    max_prompt_tokens: int
    """Maximum prompt length of a row, tokens."""
    seed: int
    """Seed of the run."""

    @classmethod
    def of(cls, config: Config) -> Rows:
        data = config.data
        return cls(config.rollout.samples_per_prompt, data.prefix, data.max_prompt_tokens, config.run.seed)


class ProgramSampler:
    """A Sampler (`kdray.interfaces`) over another one. Rollouts have no log-densities, and every token counts as maximally
    stale.

    A rollout without a parsable answer has no tokens and the finish reason `unparsable`; all others end with `stop`.
    """

    def __init__(
        self,
        settings: ProgramSettings,
        teacher: Sampler,
        name: str,
        prompts: Sequence[Prompt],
        codec: TextCodec,
        rows: Rows,
        on_awaited: Callable[[Sequence[int]], None] = lambda sample_ids: None,
    ) -> None:
        """Args: name: teacher name in the rollouts; prompts: all that may be requested; on_awaited: called with the teacher's
        samples that the trainer waits for.
        """
        self.teacher = teacher
        """The sampler that answers the calls."""
        self._settings = settings
        self._name = name
        self._questions = {prompt.prompt_id: _text(prompt).removeprefix(rows.prefix) for prompt in prompts}
        self._codec = codec
        self._rows = rows
        self._on_awaited = on_awaited
        self._stages = {name: number for number, name in enumerate((*settings.stages, "choose"))}
        self._counts = _Counts()
        self._awaited: frozenset[int] = frozenset()
        self._in_flight: set[int] = set()

    def with_fresh_metrics(self) -> ProgramSampler:
        """Copy of the program with separate metrics."""
        other = copy(self)
        other._counts = _Counts()
        return other

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        """See `kdray.interfaces.Sampler`. A repeated request makes the same calls, with the same seeds."""
        remaining = len(requests)
        async with Merged[str, list[Rollout]]() as merged:
            calls = _Calls(self, merged)
            try:
                for request in requests:
                    merged.add("rollout", self._run(request, calls))
                async for _, rollouts in merged:
                    remaining -= len(rollouts)
                    yield rollouts
            finally:
                calls.closed = True
                self._in_flight.difference_update(calls.asked)
        if remaining:
            raise EngineError(f"{self._settings.type}: {remaining} rollouts are missing at the end")

    def awaited(self, sample_ids: Sequence[int]) -> None:
        """Mark rollouts, and thereby the teacher's samples drawn for them, as awaited by the trainer from now on."""
        self._awaited = frozenset(sample_ids)
        self._tell_awaited()

    def metrics(self) -> dict[str, float]:
        """Means over the rollouts since the last call, by the names of `kdray.runs.metrics`."""
        means = self._counts.means()
        self._counts = _Counts()
        return means

    # ------------------------------------------------------------------------------------------------------ parts

    async def _run(self, request: SampleRequest, calls: _Calls) -> AsyncGenerator[list[Rollout]]:
        """Run one request and yield its rollout."""
        sibling = request.sample_id % self._rows.samples_per_prompt
        prompt_ids, token_ids = request.prompt_ids, []
        counts = _Counts(rollouts=1)
        try:
            question = Question(self._questions[request.prompt_id], sibling)
            answer = await run_program(self._settings, question, calls.of(request, counts))
            if answer.question is not None:
                prompt_ids = self._codec.prompt(answer.question).token_ids
            token_ids = self._row(answer, prompt_ids, request)
            counts.answer_tokens += len(token_ids)
        except Unparsable as error:
            counts.unparsable += 1
            counts.cut += isinstance(error, _Cut)
        self._counts.add(counts)
        yield [
            Rollout(
                sample_id=request.sample_id,
                prompt_id=request.prompt_id,
                prompt_ids=prompt_ids,
                token_ids=np.array(token_ids, dtype=np.int32),
                mixture_logprobs=None,
                student_logprobs=None,
                student_versions=np.full(len(token_ids), request.min_version, dtype=np.int32),
                alpha=1.0,
                finish_reason="stop" if token_ids else "unparsable",
                teacher=self._name,
            )
        ]

    def _row(self, answer: Answer, prompt_ids: np.ndarray, request: SampleRequest) -> list[int]:
        """Token ids to train on. Raises: Unparsable if they do not fit; an answer is never truncated."""
        token_ids = self._codec.answer(answer.text)
        if len(token_ids) > request.max_new_tokens or len(prompt_ids) > max(
            self._rows.max_prompt_tokens, len(request.prompt_ids)
        ):
            raise _Cut(f"sample {request.sample_id}: {len(prompt_ids)} prompt and {len(token_ids)} answer tokens do not fit")
        return token_ids

    def _call(self, request: SampleRequest, text: str, stage: str, index: int) -> SampleRequest:
        """Build one call of a request's program. Raises: Unparsable if the text leaves no room for a response."""
        settings = self._settings
        prompt, limit = self._codec.prompt(text), settings.response_tokens(stage)
        if len(prompt.token_ids) + limit > settings.max_stage_tokens:
            raise _Cut(f"sample {request.sample_id}: stage {stage} has {len(prompt.token_ids)} prompt tokens")
        # Both rows of a pair come from one response, so the seed is the pair's.
        pair = settings.paired_rows
        seed = sample_seed(self._rows.seed, "pair", request.sample_id // 2) if pair else request.seed
        return SampleRequest(
            sample_id=(request.sample_id * len(self._stages) + self._stages[stage]) * _CALLS_OF_A_STAGE + index,
            prompt_id=request.prompt_id,
            prompt_ids=prompt.token_ids,
            alpha=1.0,
            seed=sample_seed(seed, f"program/{stage}", index),
            max_new_tokens=limit,
            # Only the teacher writes, so the replica need not hold any version of the student.
            min_version=0,
            question=text,
        )

    def _tell_awaited(self) -> None:
        width = len(self._stages) * _CALLS_OF_A_STAGE
        self._on_awaited([call for call in self._in_flight if call // width in self._awaited])


class _Calls:
    """Calls of one `sample`, batched per iteration of the event loop."""

    def __init__(self, sampler: ProgramSampler, merged: Merged[str, list[Rollout]]) -> None:
        self.asked: dict[int, asyncio.Future[Rollout]] = {}
        """By the teacher's sample id, until answered."""
        self.closed = False
        """True once the stream is closed: calls of the last iteration are then not sent."""
        self._sampler = sampler
        self._merged = merged
        self._waiting: list[SampleRequest] = []
        self._same: dict[tuple[int, str], asyncio.Future[Rollout]] = {}

    def of(self, request: SampleRequest, counts: _Counts) -> Ask:
        """Bind the calls to one request's program and its counts."""

        async def ask(text: str, stage: str, index: int = 0) -> str:
            rollout = await self._send(self._sampler._call(request, text, stage, index), counts)
            if rollout.finish_reason != "stop":
                raise _Cut(f"sample {request.sample_id}: stage {stage} was cut after {len(rollout.token_ids)} tokens")
            response = self._sampler._codec.decode(rollout.token_ids).strip()
            if not response:
                raise Unparsable(f"sample {request.sample_id}: stage {stage} got an empty response")
            return response

        return ask

    async def _send(self, call: SampleRequest, counts: _Counts) -> Rollout:
        """Return the teacher's response, shared by all calls with the same text and seed, such as the rows of a pair."""
        key = (call.seed, call.question or "")
        is_new = key not in self._same
        if is_new:
            self._same[key] = self.asked[call.sample_id] = asyncio.get_running_loop().create_future()
            if not self._waiting:
                # When it runs, every program that resumed in this iteration has made its calls.
                asyncio.get_running_loop().call_soon(self._flush)
            self._waiting.append(call)
        # Shielded: cancelling one of two rollouts must not take the response from the other.
        rollout = await asyncio.shield(self._same[key])
        if is_new:
            counts.calls += 1
            counts.teacher_tokens += len(rollout.token_ids)
        return rollout

    def _flush(self) -> None:
        if self.closed:
            return
        calls, self._waiting = self._waiting, []
        self._sampler._in_flight |= {call.sample_id for call in calls}
        self._merged.add("calls", self._answers(calls))
        self._sampler._tell_awaited()

    async def _answers(self, calls: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        """Read the teacher's answers; yields nothing, but fails if the teacher does."""
        missing = len(calls)
        async with aclosing(self._sampler.teacher.sample(calls)) as stream:
            async for rollouts in stream:
                for rollout in rollouts:
                    missing -= 1
                    self._sampler._in_flight.discard(rollout.sample_id)
                    self.asked.pop(rollout.sample_id).set_result(rollout)
        if missing:
            raise EngineError(f"{self._sampler._name} ended its answer with {missing} calls missing")
        return
        yield []


def _text(prompt: Prompt) -> str:
    assert isinstance(prompt.question, str), "kdray.teachers.programs.check_prompts lets texts through alone"
    return prompt.question
