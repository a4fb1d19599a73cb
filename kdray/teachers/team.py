"""Several teachers behind one interface for the loop: prompts are routed, and an ensemble's answers are combined.

    route      every request goes to its teacher, which samples and scores in one pass.
    ensemble   one teacher samples and scores in its pass; as rollouts end, the others score them by prefill, all are
               queried for the ids that only some had recorded, and `kdray.teachers.ensemble` combines the answers.

With a student-only sampler the teachers only score. A teacher that is lost is waited for, left out, or ends the run, depending
on the settings. Exact KLs of an ensemble are the weighted means of its teachers' KLs: at each prefix they differ from the KL to
the combined distribution by the teachers' disagreement there. Which prefixes occur is up to the student, so losses over whole
responses keep it (`log_z`).
"""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from copy import copy
from dataclasses import fields
from typing import NamedTuple, cast

import numpy as np

from kdray.config import Config, EnsembleSettings, LossSettings, RouteSettings, TeachersSettings
from kdray.errors import EngineError, TeacherGone, first_reason
from kdray.interfaces import Teacher
from kdray.rollouts.columns import at_targets, unscored, value_of, with_columns
from kdray.rollouts.merge import Merged
from kdray.teachers.ensemble import (
    Kind,
    TeacherColumns,
    at_union,
    combine,
    confidence_weights,
    knows,
    renormalise,
    union_ids,
)
from kdray.teachers.routing import Choice, Router, by_domain, by_rules, by_weights, ensemble
from kdray.types import Prompt, Rollout, SampleRequest

Answers = dict[int, dict[str, Rollout]]
"""By sample id, then teacher: the rollout with that teacher's columns."""


class Union(NamedTuple):
    """Ids over which the teachers of a rollout are averaged."""

    ids: np.ndarray  # [T, U] int32; -1 is an unused slot
    of_prefix: np.ndarray  # [T] number of ids, the first ones, that are there whatever token was sampled


def router(settings: TeachersSettings, teachers: Sequence[str], seed: int) -> Router:
    """Build the router of the settings. Args: teachers: all of them, in the order of the config. Raises: ConfigError."""
    if settings.one_target:
        shared = cast(EnsembleSettings, settings)
        chosen = shared.teachers or list(teachers)
        return ensemble(chosen, shared.weights, shared.domain_weights, shared.sampler, seed)
    routed = cast(RouteSettings, settings)
    if routed.map:
        return by_domain(routed.map, routed.default)
    if routed.rules:
        return by_rules([(re.compile(rule.pattern), rule.teacher) for rule in routed.rules], routed.default)
    assert routed.weights is not None
    return by_weights(routed.weights, seed)


def prompts_of(config: Config, teacher: str, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts that a teacher may receive. Raises: ConfigError or DataError, as the router does."""
    settings = config.rollout.teachers
    if settings is None:
        return list(prompts)
    route = router(settings, list(config.teachers), config.run.seed)
    if settings.drawn_per_sample:
        return list(prompts)
    return [prompt for prompt in prompts if teacher in route(prompt, 0).scorers]


def ensemble_mean(settings: EnsembleSettings, loss: LossSettings) -> Kind:
    """The mean that combines several teachers into one target: the one set, or the one that suits the loss."""
    return settings.mean or loss.ensemble_mean


class TeacherTeam:
    """All teachers of a run: a Sampler, and a Scorer for rollouts that one of them or a student-only pool sampled."""

    name = "teachers"

    def __init__(self, config: Config, teachers: Sequence[Teacher], prompts: Sequence[Prompt], vocab_size: int) -> None:
        """Args: prompts: every prompt that may be requested; vocab_size: ids that teachers and student share."""
        settings = config.rollout.teachers
        assert settings is not None
        self._settings: RouteSettings | EnsembleSettings = settings
        self._teachers = {teacher.name: teacher for teacher in teachers}
        self._loss = config.loss
        self._router = router(settings, list(self._teachers), config.run.seed)
        self._prompts = {prompt.prompt_id: prompt for prompt in prompts}
        self._vocab_size = vocab_size
        self._ensemble = cast(EnsembleSettings, settings) if settings.one_target else None
        self._mean = None if self._ensemble is None else ensemble_mean(self._ensemble, config.loss)
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    @property
    def scores(self) -> bool:
        """True if rollouts sampled by a teacher must be scored by others."""
        return self._mean is not None

    def with_fresh_metrics(self) -> TeacherTeam:
        """Copy of the team with separate metrics."""
        other = copy(self)
        other._sums = defaultdict(lambda: [0.0, 0.0])
        return other

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        """See `kdray.interfaces.Sampler`. A request that its teacher can no longer serve goes to another one."""
        parts: dict[str, list[SampleRequest]] = defaultdict(list)
        for request in requests:
            parts[self._sampler(request)].append(request)
        async with Merged[str, list[Rollout]]() as merged:
            for name, part in parts.items():
                merged.add(name, self._sample_at(name, part))
            async for _, rollouts in merged:
                yield rollouts

    async def _sample_at(self, name: str, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        owed = {request.sample_id: request for request in requests}
        try:
            async with self._unless_gone(name, self._teachers[name].sample(requests)) as merged:
                async for _, rollouts in merged:
                    self._note(name, rollouts)
                    for rollout in rollouts:
                        del owed[rollout.sample_id]
                    yield rollouts
        except TeacherGone as error:
            self._leave_out(name, error)
            async with aclosing(self.sample(list(owed.values()))) as stream:
                async for rollouts in stream:
                    yield rollouts

    async def score(self, rollouts: Sequence[Rollout], top_k: bool = True) -> AsyncGenerator[list[Rollout]]:
        """See `kdray.interfaces.Scorer`: the columns of the single teacher, or of the ensemble's target, as one item."""
        choices = {rollout.sample_id: self._choice(rollout.prompt_id, rollout.sample_id) for rollout in rollouts}
        answers: Answers = {rollout.sample_id: {rollout.teacher: rollout} if rollout.teacher else {} for rollout in rollouts}
        of_sampler = self._settings.support_of_sampler
        wanted: dict[str, list[Rollout]] = defaultdict(list)
        for rollout in rollouts:
            for name in choices[rollout.sample_id].scorers:
                if name not in answers[rollout.sample_id]:
                    wanted[name].append(unscored(rollout, rollout.support_ids if of_sampler else None))
        await self._ask(wanted, answers, top_k=top_k and not of_sampler)
        unions: dict[int, Union] = {}
        again: dict[str, list[Rollout]] = defaultdict(list)
        for rollout in rollouts:
            if len(choices[rollout.sample_id].scorers) == 1:
                continue
            given = answers[rollout.sample_id]
            supports = [_columns(answer).support_ids for answer in given.values()]
            # Including the sampled token: its mean over teachers is then a bucket, exact for the geometric mean as well.
            with_token = self._loss.support_with_token and not of_sampler
            of_prefix = union_ids(supports)
            ids = union_ids([of_prefix, rollout.token_ids[:, None]]) if with_token else of_prefix
            unions[rollout.sample_id] = Union(ids, (of_prefix >= 0).sum(axis=1))
            for name, answer in given.items():
                if not knows(_columns(answer), ids):
                    again[name].append(unscored(rollout, ids))
        await self._ask(again, answers, top_k=False)
        yield [
            self._combined(rollout, choices[rollout.sample_id], answers[rollout.sample_id], unions.get(rollout.sample_id))
            for rollout in rollouts
        ]

    def metrics(self) -> dict[str, float]:
        """Means since the last call: each teacher's exact KLs, and the disagreement among the teachers of an ensemble."""
        means = {name: total / tokens for name, (total, tokens) in self._sums.items() if tokens}
        self._sums.clear()
        return means

    # ------------------------------------------------------------------------------------------------------ parts

    def _choice(self, prompt_id: int, sample_id: int) -> Choice:
        return self._router(self._prompts[prompt_id], sample_id)

    def _sampler(self, request: SampleRequest) -> str:
        """The teacher that samples: the chosen one, or the next available one of its ensemble."""
        choice = self._choice(request.prompt_id, request.sample_id)
        if self._settings.missing == "wait":
            return choice.sampler
        reasons = []
        for name in choice.scorers:
            reason = self._teachers[name].availability.reason
            if reason is None:
                return name
            self._leave_out(name, TeacherGone(reason))
            reasons.append(reason)
        raise EngineError(f"no teacher is left for prompt {request.prompt_id}: {'; '.join(reasons)}")

    def _unless_gone(self, name: str, stream: AsyncGenerator[list[Rollout]]) -> Merged[str, list[Rollout]]:
        """The stream, ended by TeacherGone when the teacher is lost, unless the settings say to wait."""
        merged = Merged[str, list[Rollout]]()
        merged.add(name, stream)
        if self._settings.missing != "wait":
            merged.watch(self._teachers[name].availability.lost())
        return merged

    def _leave_out(self, name: str, error: TeacherGone) -> None:
        """Raises: EngineError if the settings do not allow continuing without a teacher, or waiting cannot bring it back."""
        if self._settings.missing != "renormalise":
            raise EngineError(f"{error}; rollout.teachers.missing={self._settings.missing} ends the run") from error

    async def _ask(self, wanted: Mapping[str, Sequence[Rollout]], answers: Answers, top_k: bool) -> None:
        """Let each teacher score its rollouts concurrently, into `answers`; a teacher that is lost leaves none there."""

        async def ask(name: str, rollouts: Sequence[Rollout]) -> None:
            try:
                async with self._unless_gone(name, self._teachers[name].score(rollouts, top_k)) as merged:
                    async for _, scored in merged:
                        self._note(name, [answer for answer in scored if name not in answers[answer.sample_id]])
                        for answer in scored:
                            answers[answer.sample_id][name] = answer
            except TeacherGone as error:
                self._leave_out(name, error)
                for rollout in rollouts:
                    answers[rollout.sample_id].pop(name, None)

        try:
            async with asyncio.TaskGroup() as tasks:
                for name, rollouts in wanted.items():
                    tasks.create_task(ask(name, rollouts))
        except BaseExceptionGroup as group:
            raise first_reason(group) from group

    def _combined(self, rollout: Rollout, choice: Choice, given: Mapping[str, Rollout], union: Union | None) -> Rollout:
        """The rollout with the target's columns; its `teacher` remains the one that sampled."""
        teacher = rollout.teacher or choice.sampler
        present = np.array([name in given for name in choice.scorers])
        if not present.any():
            raise EngineError(f"sample {rollout.sample_id}: none of the teachers {', '.join(choice.scorers)} could score it")
        kept = [given[name] for name in choice.scorers if name in given]
        if union is None:
            # A teacher that teaches a prompt alone; the column is that of the batch's other rollouts.
            log_z = np.zeros(len(rollout.token_ids), np.float32) if self._ensemble is not None else None
            return with_columns(kept[0], {"log_z": log_z}, teacher=teacher)
        assert self._ensemble is not None
        assert self._mean is not None
        columns = [at_union(_columns(answer), union.ids) for answer in kept]
        weights = renormalise(np.array(choice.weights), present)[present]
        if self._ensemble.confidence_temperature is not None:
            logprobs, tails = _of_prefix(columns, union)
            outside = self._vocab_size - union.of_prefix
            weights = confidence_weights(logprobs, tails, self._ensemble.confidence_temperature, outside)
        target = combine(columns, weights, self._mean)
        if self._mean == "geometric":
            log_z = target.log_z[rollout.is_target]
            self._add("teacher_disagreement", -float(log_z.sum()), len(log_z))
        return with_columns(
            rollout,
            target.named(),
            teacher=teacher,
            reverse_kl=_mean_kl([answer.reverse_kl for answer in kept], weights),
            forward_kl=_mean_kl([answer.forward_kl for answer in kept], weights),
        )

    def _note(self, name: str, rollouts: Sequence[Rollout]) -> None:
        for rollout in rollouts:
            for metric in ("reverse_kl", "forward_kl"):
                values = at_targets([rollout], metric)
                if len(values):
                    self._add(f"teacher/{name}/{metric}", float(values.sum(dtype=np.float64)), len(values))

    def _add(self, metric: str, total: float, tokens: int) -> None:
        sums = self._sums[metric]
        sums[0] += total
        sums[1] += tokens


def _columns(answer: Rollout) -> TeacherColumns:
    said = {each.name: value_of(answer, each.name) for each in fields(TeacherColumns)}
    given = {name: values for name, values in said.items() if values is not None}
    if len(given) < len(said):
        raise EngineError(f"sample {answer.sample_id}: teacher {answer.teacher} returned no support; an ensemble needs one")
    return TeacherColumns(**given)


def _of_prefix(columns: Sequence[TeacherColumns], union: Union) -> tuple[np.ndarray, np.ndarray]:
    """log p of the teachers on the ids that do not depend on the sampled token [n, T, U], and of the rest [n, T].

    A weight that depended on the token would make another target of each token that the same prefix may go on with.
    """
    logprobs, tails = (np.stack([getattr(one, name) for one in columns]) for name in ("support_logprobs", "tail_logprobs"))
    added = np.arange(union.ids.shape[1]) >= union.of_prefix[:, None]
    of_token = np.where(added, logprobs, -np.inf)
    return np.where(added, -np.inf, logprobs), np.logaddexp(tails, np.logaddexp.reduce(of_token, axis=-1))


def _mean_kl(values: Sequence[np.ndarray | None], weights: np.ndarray) -> np.ndarray | None:
    """Weighted mean over teachers of KLs [T]; None if any teacher gave none. Args: weights: [n] or [n, T]."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    stacked = np.stack(known)
    return (stacked * weights.reshape(len(values), -1)).sum(axis=0).astype(np.float32)
