"""A teacher behind a remote endpoint with an OpenAI-compatible API: it writes whole responses, and holds no student.

Most endpoints return text, which the student's tokenizer encodes again; an endpoint that returns token ids also gives its top
logprobs at every token of a sequence. The `openai` client retries failed requests and respects the delays that the endpoint
asks for; this module rate-limits every attempt, converts answers to records, and explains errors with a remedy. Independent of
Ray.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
from openai import APIConnectionError, APIStatusError, APITimeoutError, AsyncOpenAI, OpenAIError

from kdray.config import OpenAITeacherSettings
from kdray.config.base import is_loopback
from kdray.config.signals import Signal
from kdray.data.dataset import asked_text
from kdray.errors import AwayError, ConfigError, EndpointAway, EngineError, RequestRefused
from kdray.interfaces import Availability
from kdray.teachers.dialect import Dialect, support, text_of, token_id_of
from kdray.teachers.fingerprint import Fingerprint
from kdray.teachers.kind import Found, TeacherContext, TeacherKind
from kdray.teachers.rate_limit import RateLimiter
from kdray.teachers.watched_client import WatchedClient
from kdray.types import Rollout, SampleRequest

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

_PROBE = "Is 12 + 34 equal to 46? Yes, it is: naïve maths — 对 🙂\n"
"""Letters, digits, signs and rarer characters: tokenizers that agree on its ids are considered equal."""
_LONGEST_PAUSE_S = 120.0
"""Longest `Retry-After` that the client respects; it gives up a request that is told to wait longer."""


class OpenAIKind(TeacherKind[OpenAITeacherSettings]):
    """A remote endpoint, called over the network."""

    capturable = True

    def offers(self) -> frozenset[Signal]:
        return frozenset(("text", "references", "sampled", "top_k") if self.settings.logprobs else ("text",))

    def remedy(self, signal: Signal) -> str | None:
        if signal in ("sampled", "top_k"):
            return "set its logprobs, where the endpoint names token ids, or use loss.type=sequence with rollout.alpha=1"
        return None

    def check(self, tokenizer: Any, student_rows: int) -> Found:
        variable = self.settings.api_key_env
        if variable is not None and not os.environ.get(variable, "").strip():
            raise ConfigError(
                f"teachers.{self.name}.api_key_env={variable}: the variable is not set; export it, or set "
                "api_key_env=null for an endpoint without keys"
            )
        url = urlsplit(self.settings.base_url)
        readable = url.scheme == "http" and not is_loopback(url.hostname or "")
        sent = "all prompts" if variable is None else "the key and all prompts"
        warning = f"teachers.{self.name}.base_url={self.settings.base_url}: by plain http {sent} can be read on the way"
        if readable and variable is not None and not self.settings.unsafe_http:
            raise ConfigError(f"{warning}; use https, or a tunnel to this machine, or accept it (unsafe_http=true)")
        key = "" if variable is None else f", which is sent the key in {variable}"
        line = f"teacher {self.name}: {self.settings.model} at {self.settings.base_url}{key}"
        return Found(line, note=f"{warning}; use https" if readable else None)

    @property
    def environment(self) -> dict[str, str]:
        return {} if self.settings.api_key_env is None else {"api_key_env": self.settings.api_key_env}

    @property
    def in_flight(self) -> int:
        return self.settings.max_concurrency

    def identity(self, model: str | None, vocab_size: int) -> dict[str, Any]:
        asked = ["base_url", "model", "chat", "system_prompt", "temperature", "top_p", "logprobs", "token_ids"]
        # Left out where it is off, as before there was such a setting.
        return {setting: getattr(self.settings, setting) for setting in asked + ["thinking"] * self.settings.thinking}

    def open(self, context: TeacherContext) -> RemoteTeacher:
        # A chat endpoint applies its own template, so it gets the question as it was before the student's.
        text_of = asked_text(context.config, context.tokenizer, context.prompts, self.settings.chat)
        of_student = context.tokenizer, text_of, context.vocab_size, context.stop_ids
        teacher = RemoteTeacher(self.name, self.settings, *of_student, context.config.loss.support_with_token)
        teacher.on_event = context.on_event
        return teacher


class RemoteTeacher:
    """A Sampler, and with `logprobs` a Scorer (`kdray.interfaces`). Call `check` before anything else, `close` at the end."""

    def __init__(
        self,
        name: str,
        settings: OpenAITeacherSettings,
        tokenizer: Any,
        text_of: Callable[[SampleRequest], str | list[dict[str, Any]]],
        vocab_size: int,
        stop_ids: Sequence[int],
        support_with_token: bool = True,
    ) -> None:
        """Args: tokenizer: the student's; text_of: a request's prompt for the endpoint, possibly as messages for chat
              completions; unused with `token_ids`; vocab_size: ids of the student; stop_ids: end-of-sequence ids, the
              tokenizer's own first; support_with_token: a token that is not among the top ids is added to them.
        Raises: ConfigError if the key is missing.
        """
        self.name = name
        self.availability = Availability()
        """Always available: an endpoint that does not answer fails the request."""
        self.requests = 0
        """Attempts sent."""
        self.retried = 0
        """Attempts that were retries."""
        self.prompt_tokens = 0
        """Prompt tokens counted by the endpoint."""
        self.completion_tokens = 0
        """Response tokens counted by the endpoint."""
        self.on_event: Callable[..., None] = lambda kind, **fields: None
        """Called with events: kind, and fields by name."""
        self._settings = settings
        self._tokenizer = tokenizer
        self._text_of = text_of
        self._vocab_size = vocab_size
        self._stop_ids = tuple(stop_ids)
        self._support_with_token = support_with_token
        self._free = asyncio.Semaphore(settings.max_concurrency)
        self._turn = asyncio.Lock()
        self._rate_limiter = RateLimiter(settings.requests_per_minute)
        self._dialect = Dialect()
        self._key = _key(name, settings.api_key_env)
        self._client = AsyncOpenAI(
            base_url=settings.base_url,
            # Without a key the client would send the environment's OPENAI_API_KEY to an endpoint that must not see it.
            api_key=self._key or "none",
            timeout=settings.timeout_s,
            max_retries=settings.retries,
            http_client=WatchedClient(
                name,
                lambda kind, **fields: self.on_event(kind, **fields),
                event_hooks={"request": [self._before_attempt], "response": [self._after_attempt]},
            ),
        )

    async def fingerprint(self, canary: Sequence[int]) -> Fingerprint | None:
        """Always None: an endpoint is a black box."""
        return None

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def check(self) -> None:
        """Make a short call that verifies address, key and model; with `token_ids`, also that both sides use the same ids.

        Raises: ConfigError with setting, value and remedy; AwayError if the endpoint does not answer as it should.
        """
        try:
            if self._settings.token_ids:
                await self._check_ids()
            elif self._settings.chat:
                await self._chat(_PROBE, max_tokens=1, seed=0)
            else:
                await self._complete(_PROBE, max_tokens=1)
        except RequestRefused as error:
            raise ConfigError(str(error)) from None
        except EngineError as error:
            raise AwayError(str(error)) from None

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        """See `kdray.interfaces.Sampler`: only the teacher writes. With `logprobs` the rollouts come scored.

        A response longer than max_new_tokens in the student's tokens, including its end, is truncated there.
        Raises: RequestRefused for an alpha other than 1, or what the endpoint refuses; EngineError after the last retry.
        """
        for request in requests:
            if request.alpha != 1.0:
                raise RequestRefused(
                    f"teachers.{self.name} is remote and writes whole responses: it samples at alpha 1, not "
                    f"{request.alpha:g}; set rollout.alpha=1, or let the student sample"
                )
        async with aclosing(self._stream(requests, self._write)) as stream:
            async for rollouts in stream:
                yield rollouts

    async def score(self, rollouts: Sequence[Rollout], top_k: bool = True) -> AsyncGenerator[list[Rollout]]:
        """See `kdray.interfaces.Scorer`. An endpoint returns only its own top ids, not those of the caller: no ensembles.

        Raises: RequestRefused for what it cannot return, or what the endpoint refuses; EngineError after the last retry.
        """
        if not self._settings.logprobs:
            raise RequestRefused(f"teachers.{self.name}.logprobs=0: it cannot score; set logprobs, or loss.type=sequence")
        for rollout in rollouts:
            if rollout.support_ids is not None or not top_k:
                raise RequestRefused(
                    f"sample {rollout.sample_id}: teachers.{self.name} is remote and gives logprobs at its own top ids, not at "
                    "those of others; take it out of the ensemble"
                )
            if not len(rollout.prompt_ids):
                raise RequestRefused(f"sample {rollout.sample_id}: an empty prompt gives the first token no logprob")
        async with aclosing(self._stream(rollouts, self._scored)) as stream:
            async for scored in stream:
                yield scored

    async def _stream(
        self, items: Sequence[Item], answer: Callable[[Item], Awaitable[Rollout]]
    ) -> AsyncGenerator[list[Rollout]]:
        """Answer all items concurrently; those that end together form one item of the stream."""

        async def in_turn(item: Item) -> Rollout:
            async with self._free:
                return await answer(item)

        tasks = [asyncio.create_task(in_turn(item)) for item in items]
        running = set(tasks)
        try:
            while running:
                ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                yield [task.result() for task in ended]
        finally:
            # The reader closed the stream or a request failed: the other answers are no longer needed.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------------------------------------------------- sample and score

    async def _write(self, request: SampleRequest) -> Rollout:
        # Servers differ in the width of a seed; 31 bits work everywhere.
        seed, limit = request.seed % 2**31, request.max_new_tokens
        columns: dict[str, Any] = {}
        if self._settings.token_ids:
            prompt_ids, stop_ids = request.prompt_ids.tolist(), list(self._stop_ids)
            choice = await self._complete(prompt_ids, max_tokens=limit, seed=seed, stop_token_ids=stop_ids)
            token_ids = self._ids(choice, "token_ids")
            if self._settings.logprobs:
                columns = self._columns(choice, token_ids, 0)
        else:
            text = self._text_of(request)
            if self._settings.chat:
                choice = await self._chat(text, max_tokens=limit, seed=seed)
                written = self._text(choice)
            else:
                assert isinstance(text, str), "plain completions continue a text"
                choice = await self._complete(text, max_tokens=limit, seed=seed)
                written = getattr(choice, "text", None)
            token_ids = self._read(written)
            # Any reason but `stop` is external, and empty content is not an end either: reasoning only, or a refusal.
            if written is not None and getattr(choice, "finish_reason", None) == "stop":
                token_ids.append(self._stop_ids[0])
        token_ids = token_ids[:limit]
        return Rollout(
            sample_id=request.sample_id,
            prompt_id=request.prompt_id,
            prompt_ids=request.prompt_ids,
            token_ids=np.array(token_ids, dtype=np.int32),
            mixture_logprobs=None,
            student_logprobs=None,
            student_versions=np.full(len(token_ids), request.min_version, dtype=np.int32),
            alpha=request.alpha,
            finish_reason="stop" if token_ids and token_ids[-1] in self._stop_ids else "length",
            teacher=self.name,
            **{name: column[:limit] for name, column in columns.items()},
        )

    async def _scored(self, rollout: Rollout) -> Rollout:
        start, response = len(rollout.prompt_ids), rollout.token_ids.tolist()
        if not response:
            return replace(rollout, teacher=self.name, **support([], [], self._width, self._vocab_size))
        sequence = [*rollout.prompt_ids.tolist(), *response]
        choice = await self._complete(sequence, max_tokens=0, echo=True)
        return replace(rollout, teacher=self.name, **self._columns(choice, sequence, start))

    def _text(self, choice: Any) -> str | None:
        """Text of a chat completion; None if it has none. Raises: EngineError if it is something else."""
        try:
            return text_of(getattr(choice, "message", None), self._settings.thinking)
        except ValueError as error:
            raise EngineError(f"teachers.{self.name}: {self._where}: {error}; name a model that answers in text") from None

    def _read(self, text: str | None) -> list[int]:
        """Encode the endpoint's text as student ids. Text that looks like a special token stays text and ends nothing."""
        if text is None:
            return []
        answer = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return list(answer["input_ids"])

    def _columns(self, choice: Any, token_ids: list[int], start: int) -> dict[str, Any]:
        """The teacher's columns at `token_ids[start:]`. Raises: EngineError if the endpoint returns them for other tokens."""
        given: Any = getattr(choice, "logprobs", None)
        try:
            named = [token_id_of(token) for token in given.tokens]
            logprobs = list(given.token_logprobs)[start:]
            tops = [{token_id_of(token): logprob for token, logprob in row.items()} for row in given.top_logprobs[start:]]
        except (AttributeError, TypeError, ValueError):
            raise EngineError(
                f"teachers.{self.name}.logprobs={self._settings.logprobs}: {self._where} gives no logprobs named by token id; "
                "set logprobs=0 and token_ids=false"
            ) from None
        if named != token_ids or None in logprobs:
            raise EngineError(f"teachers.{self.name}: {self._where} gave logprobs of other tokens than those asked for")
        for row, token_id, logprob in zip(tops, token_ids[start:], logprobs, strict=True):
            row[token_id] = logprob
            if not self._support_with_token and len(row) > self._settings.logprobs:
                # One more than the top ids, so it is here because it was drawn; sorting would not tell ties apart.
                del row[token_id]
        return support(logprobs, tops, self._width, self._vocab_size)

    @property
    def _width(self) -> int:
        """Slots of the support."""
        return self._settings.logprobs + self._support_with_token

    def _ids(self, choice: Any, name: str) -> list[int]:
        """Token ids returned by the endpoint, all of them the student's. Raises: EngineError."""
        ids = getattr(choice, name, None)
        if not isinstance(ids, list) or not all(isinstance(token_id, int) for token_id in ids):
            raise EngineError(f"teachers.{self.name}.token_ids=true: {self._where} names no ids; set token_ids=false")
        strange = [token_id for token_id in ids if not 0 <= token_id < self._vocab_size]
        if strange:
            raise EngineError(
                f"teachers.{self.name}.token_ids=true: {self._where} gave id {strange[0]}, and the student has "
                f"{self._vocab_size}; set token_ids=false, or serve a model of the student's family"
            )
        return ids

    async def _check_ids(self) -> None:
        ours = self._read(_PROBE)
        # The text is encoded by the endpoint's tokenizer; `echo` returns its ids in the same way as scoring.
        choice = await self._complete(_PROBE, max_tokens=0, echo=True, add_special_tokens=False)
        theirs = self._ids(choice, "prompt_token_ids")
        if theirs != ours:
            raise EngineError(
                f"teachers.{self.name}.token_ids=true: {self._where} reads a test text as ids {theirs[:8]} and the student's "
                f"tokenizer as {ours[:8]} (first 8 of {len(theirs)} and {len(ours)}); set token_ids=false, or serve a model of "
                "the student's family"
            )
        if self._settings.logprobs:
            # The first token has no prefix to be predicted from.
            self._columns(choice, ours, 1)

    # ------------------------------------------------------------------------------------------------- the endpoint

    async def _chat(self, text: str | list[dict[str, Any]], max_tokens: int, seed: int) -> Any:
        settings = self._settings
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else list(text)
        if settings.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": settings.system_prompt})
        return await self._ask(
            self._client.chat.completions.create,
            model=settings.model,
            messages=messages,
            max_tokens=max_tokens,
            seed=seed,
            temperature=settings.temperature,
            top_p=settings.top_p,
        )

    async def _complete(self, prompt: str | list[int], max_tokens: int, seed: int = 0, echo: bool = False, **extra: Any) -> Any:
        settings = self._settings
        arguments: dict[str, Any] = {}
        if settings.token_ids:
            arguments["extra_body"] = {"return_token_ids": True, "return_tokens_as_token_ids": True, **extra}
        if settings.logprobs:
            arguments["logprobs"] = settings.logprobs
        if echo:
            arguments["echo"] = True
        return await self._ask(
            self._client.completions.create,
            model=settings.model,
            prompt=prompt,
            max_tokens=max_tokens,
            seed=seed,
            temperature=settings.temperature,
            top_p=settings.top_p,
            **arguments,
        )

    async def _ask(self, create: Callable[..., Awaitable[Any]], **arguments: Any) -> Any:
        """The single choice of an answer. Raises: RequestRefused, or EngineError after the last retry."""
        sent, answer, learned = self._dialect.spoken(arguments), None, None
        try:
            answer = await create(**sent)
        # `from None` in each: the original error holds the request with its key, and may quote it.
        except APIStatusError as error:
            learned = self._dialect.learn(error.status_code, f"{error.message} {error.body}", arguments, sent)
            if learned is None:
                raise self._explain(error) from None
            if learned:
                logger.warning("teachers.%s: %s refuses a parameter: from now on %s", self.name, self._where, learned)
        except OpenAIError as error:
            raise self._explain(error) from None
        except ValueError as error:
            raise EngineError(f"{self._not_openai}: {self._without_key(str(error))}") from None
        if learned is not None:
            # In other words, which are fewer or new each time.
            return await self._ask(create, **arguments)
        choices = getattr(answer, "choices", None)
        if not isinstance(choices, list) or len(choices) != 1:
            raise EngineError(f"{self._not_openai}: an answer without a choice")
        usage = getattr(answer, "usage", None)
        self.prompt_tokens += getattr(usage, "prompt_tokens", None) or 0
        self.completion_tokens += getattr(usage, "completion_tokens", None) or 0
        return choices[0]

    async def _before_attempt(self, request: Any) -> None:
        """Wait for this attempt's turn; the client calls this for retries too."""
        async with self._turn:
            while delay := self._rate_limiter.delay(time.monotonic()):  # noqa: ASYNC110 - it waits for a time, not an event
                await asyncio.sleep(delay)
            self._rate_limiter.start(time.monotonic())
        self.requests += 1
        self.retried += request.headers.get("x-stainless-retry-count", "0") != "0"

    async def _after_attempt(self, response: Any) -> None:
        """Apply the delay that the endpoint asks of one request to all: the others would be rejected as well."""
        if response.status_code in (429, 503):
            try:
                seconds = float(response.headers.get("retry-after", ""))
            except ValueError:
                # Missing, or a date, which only the client handles.
                return
            if math.isfinite(seconds):
                self._rate_limiter.pause(min(seconds, _LONGEST_PAUSE_S), time.monotonic())

    def _explain(self, error: OpenAIError) -> EngineError:
        """Translate a client error for the user, without the key."""
        setting, where = f"teachers.{self.name}", self._where
        if not isinstance(error, APIStatusError):
            attempts = f"{self._settings.retries + 1} attempts"
            if isinstance(error, APITimeoutError):
                return EndpointAway(
                    f"{setting}.timeout_s={self._settings.timeout_s:g}: {where} did not answer in {attempts}; raise timeout_s, "
                    "or lower max_concurrency"
                )
            if isinstance(error, APIConnectionError):
                reason = self._without_key(str(error.__cause__ or error))
                return EndpointAway(f"{setting}.base_url: {where} cannot be reached in {attempts}: {reason}; correct it")
            return EngineError(f"{self._not_openai}: {self._without_key(str(error))}")
        status = error.status_code
        if status in (401, 403):
            # Endpoints quote parts of a key that they reject, so their message is omitted.
            variable = self._settings.api_key_env
            remedy = "name the variable that holds a key" if variable is None else f"set {variable} to a valid key"
            return RequestRefused(f"{setting}.api_key_env={variable or 'null'}: {where} refuses the key ({status}); {remedy}")
        reason = f"({status}): {self._without_key(error.message)[:500]}"
        if status == 404:
            return RequestRefused(
                f"{setting}.model={self._settings.model}: {where} has no such model or page {reason}; name a model that it "
                "serves, and the base_url of its interface, which usually ends in /v1"
            )
        if status == 429:
            return EndpointAway(
                f"{setting}.retries={self._settings.retries}: {where} still limits the rate {reason}; lower "
                "requests_per_minute or max_concurrency"
            )
        if status < 500 and status not in (408, 409):
            return RequestRefused(
                f"{setting}: {where} refuses the request {reason}; look at chat, token_ids, logprobs, temperature and top_p "
                "(1 is left out where it is refused), and the length of prompt and response"
            )
        return EndpointAway(
            f"{setting}.retries={self._settings.retries}: {where} failed every attempt {reason}; see its log, or raise retries"
        )

    @property
    def _where(self) -> str:
        return f"the endpoint {self._settings.base_url}"

    @property
    def _not_openai(self) -> str:
        return f"teachers.{self.name}.base_url: {self._where} does not answer as OpenAI's interface does"

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "<key>") if self._key else text


def _key(name: str, variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"teachers.{name}.api_key_env={variable}: the variable is not set; export it, or set api_key_env=null for an "
            "endpoint without keys"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        # A header cannot carry it, and the client's error message would quote it.
        raise ConfigError(f"teachers.{name}.api_key_env={variable}: the variable holds no plain word; set it to the key")
    return key
