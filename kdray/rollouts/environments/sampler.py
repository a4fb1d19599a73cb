"""Rollouts of several turns: the model draws, the environment answers, and the model goes on from there.

Each draw is a request of its own, whose prompt is everything before it. It ends at a token after which the environment may
answer; that is decided by the tokens alone, so every token stays a draw from the density that its row records, under any
sampler. What the environment wrote is context: writer `environment`, never a target.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from kdray.config.environments import EnvironmentSettings
from kdray.config.plugins import implemented
from kdray.errors import ConfigError, ResponseError
from kdray.interfaces import Sampler
from kdray.rollouts.columns import Column, rollout_columns, scored_columns, value_of, with_columns
from kdray.rollouts.environments.episode import Environment, Reply
from kdray.rollouts.environments.turn_text import TurnText
from kdray.rollouts.merge import Merged
from kdray.rollouts.seeds import sample_seed
from kdray.types import Prompt, Rollout, SampleRequest, written_by

Result = TypeVar("Result")

_SETTING = "rollout.environment"


def in_environment(
    sampler: Sampler, settings: EnvironmentSettings | None, tokenizer: object, vocab_size: int, prompts: Sequence[Prompt]
) -> Sampler:
    """The sampler, with the environment of the settings between its draws; as it is without one.

    Args: tokenizer: the student's; prompts: all that may be requested.
    Raises: ConfigError if the environment cannot be built, or the tokenizer lacks its characters.
    """
    if settings is None:
        return sampler
    environment, text = _built(settings, tokenizer, vocab_size)
    return EnvironmentSampler(sampler, environment, settings, text, {prompt.prompt_id: prompt for prompt in prompts})


def check_environment(settings: EnvironmentSettings, tokenizer: object, vocab_size: int, prompts: Sequence[Prompt]) -> str:
    """A line for the user. Args: as for `in_environment`.

    Raises: ConfigError if the environment cannot be built, lacks its characters, or cannot start from one of the prompts.
    """
    environment, text = _built(settings, tokenizer, vocab_size)
    for prompt in prompts:
        try:
            environment.start(prompt, 0)
        # An environment of another distribution may raise anything.
        except Exception as error:
            raise ConfigError(
                f"{_SETTING}.type={settings.type} cannot start from prompt {prompt.prompt_id}: {type(error).__name__}: {error}"
            ) from error
    return (
        f"environment: {settings.type}, asked after each of the {len(text.pause_ids)} tokens with "
        f"{' or '.join(map(repr, environment.pauses))}; at most {settings.max_turns} turns, with up to "
        f"{settings.max_reply_tokens} tokens after each"
    )


def _built(settings: EnvironmentSettings, tokenizer: object, vocab_size: int) -> tuple[Environment, TurnText]:
    environment: Environment = implemented(settings)
    return environment, TurnText.of(tokenizer, vocab_size, environment.pauses, f"{_SETTING}.type={settings.type}")


class EnvironmentSampler:
    """Sampler (`kdray.interfaces`) whose rollouts have the turns of the wrapped one's model, and the environment's replies."""

    def __init__(
        self,
        sampler: Sampler,
        environment: Environment,
        settings: EnvironmentSettings,
        text: TurnText,
        prompts: Mapping[int, Prompt],
    ) -> None:
        self._sampler = sampler
        self._environment = environment
        self._settings = settings
        self._text = text
        self._prompts = prompts

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        """See `kdray.interfaces.Sampler`. A rollout that pauses does not hold up the others.

        Raises: ResponseError if the environment failed.
        """
        running = {request.sample_id: self._begin(request) for request in requests}
        async with Merged[str, list[Rollout]]() as merged:
            merged.add("drawn", self._sampler.sample([play.next_request() for play in running.values()]))
            async for _, drawn in merged:
                ended, again = [], []
                for rollout in drawn:
                    play = running[rollout.sample_id]
                    if play.add(rollout):
                        again.append(play.next_request())
                    else:
                        ended.append(running.pop(rollout.sample_id).rollout())
                if again:
                    merged.add("drawn", self._sampler.sample(again))
                if ended:
                    yield ended

    def _begin(self, request: SampleRequest) -> _Play:
        return _Play(request, self._environment, self._settings, self._text, self._prompts[request.prompt_id])


class _Play:
    """A rollout in progress."""

    def __init__(
        self, request: SampleRequest, environment: Environment, settings: EnvironmentSettings, text: TurnText, prompt: Prompt
    ) -> None:
        self._request = request
        self._settings = settings
        self._text = text
        # Seeded by the sample, not by its draws, so that a sample that is drawn again meets the same environment.
        seed = sample_seed(request.seed, "environment", 0)
        self._episode = self._guarded(lambda: environment.start(prompt, seed))
        self._parts: list[Rollout] = []
        """Draws and replies in order; a reply is the rollout of a draw with other tokens."""
        self._turn: list[int] = []
        """Tokens of the turn that has not finished."""
        self._draws = 0
        self._turns = 0
        self._drawn_tokens = 0
        self._finish_reason = ""

    def next_request(self) -> SampleRequest:
        """The request of the next draw."""
        request = self._request
        return replace(
            request,
            prompt_ids=np.concatenate([request.prompt_ids, *(part.token_ids for part in self._parts)]).astype(np.int32),
            # A request counts its draws from 0: with one seed, every turn would repeat the same random numbers.
            seed=request.seed if not self._draws else sample_seed(request.seed, "turn", self._draws),
            max_new_tokens=request.max_new_tokens - self._drawn_tokens,
            stop_ids=self._text.pause_ids,
        )

    def add(self, drawn: Rollout) -> bool:
        """Add a draw, and the environment's reply to it. Returns: whether the rollout goes on."""
        self._parts.append(drawn)
        self._draws += 1
        self._drawn_tokens += len(drawn.token_ids)
        self._turn += drawn.token_ids.tolist()
        self._finish_reason = drawn.finish_reason
        if drawn.finish_reason != "pause":
            return False
        self._finish_reason = "length"
        reply = self._guarded(lambda: self._episode.reply(self._text.decode(self._turn)))
        if reply is not None and not self._answer(drawn, reply):
            return False
        return self._drawn_tokens < self._request.max_new_tokens

    def _answer(self, drawn: Rollout, reply: Reply) -> bool:
        token_ids = self._guarded(lambda: self._text.encode(reply.text))
        if len(token_ids) > self._settings.max_reply_tokens:
            return False
        self._turns += 1
        self._turn = []
        if len(token_ids):
            self._parts.append(_context(drawn, token_ids))
        if reply.last:
            self._finish_reason = "ended"
        return not reply.last and self._turns < self._settings.max_turns

    def rollout(self) -> Rollout:
        """The whole rollout, under the request's own prompt."""
        columns: dict[str, np.ndarray | None] = {column.name: _joined(column, self._parts) for column in rollout_columns()}
        made = with_columns(self._parts[-1], columns, prompt_ids=self._request.prompt_ids, finish_reason=self._finish_reason)
        if len({part.teacher for part in self._parts}) > 1:
            # A teacher was lost on the way, and another drew on: no teacher has scored all of it.
            return with_columns(made, {column.name: None for column in scored_columns()}, teacher="")
        return made

    def _guarded(self, call: Callable[[], Result]) -> Result:
        """What the environment returns. Raises: ResponseError that says where it failed."""
        request = self._request
        try:
            return call()
        # An environment of another distribution may raise anything.
        except Exception as error:
            where = f"{_SETTING}.type={self._settings.type} on prompt {request.prompt_id}, sample {request.sample_id}"
            reason = str(error) if isinstance(error, ResponseError) else f"{type(error).__name__}: {error}"
            raise ResponseError(f"{where}: {reason}") from error


def _context(drawn: Rollout, token_ids: np.ndarray) -> Rollout:
    """A reply as a part of its own, with the columns of the draw that it answers."""
    count = len(token_ids)
    columns: dict[str, np.ndarray | None] = {}
    for column in rollout_columns():
        values = value_of(drawn, column.name)
        if values is not None:
            columns[column.name] = np.full((count, *values.shape[1:]), column.fill, dtype=values.dtype)
    columns["token_ids"] = token_ids
    columns["writer"] = written_by("environment", count)
    # The version of the turn before, so that no version of the rollout is older than what its request allows.
    columns["student_versions"] = np.full(count, drawn.student_versions[-1], dtype=np.int32)
    return with_columns(drawn, columns)


def _joined(column: Column, parts: Sequence[Rollout]) -> np.ndarray | None:
    """A column of all parts, one after the other; None where a part lacks it."""
    values = [value_of(part, column.name) for part in parts]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    if column.width == "support":
        # Unused slots: a part whose ids were asked for may have more of them than another.
        width = max(value.shape[1] for value in known)
        known = [np.pad(value, ((0, 0), (0, width - value.shape[1])), constant_values=column.fill) for value in known]
    return np.concatenate(known)
