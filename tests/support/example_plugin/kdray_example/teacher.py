"""A teacher without a model: it knows the answer to every prompt, and gives the right next token almost all of the mass."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from kdray.config import TeacherSettings
from kdray.config.signals import Signal
from kdray.data.dataset import encode_answer
from kdray.interfaces import Availability
from kdray.rollouts.seeds import uniforms
from kdray.teachers.fingerprint import Fingerprint
from kdray.teachers.kind import TeacherContext, TeacherKind
from kdray.types import Rollout, SampleRequest


class OracleSettings(TeacherSettings):
    """The reference answers, as a distribution over tokens."""

    implementation = "kdray_example.teacher:OracleKind"

    type: Literal["oracle"] = "oracle"
    doubt: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.02
    """Mass that all wrong tokens share."""


class OracleKind(TeacherKind[OracleSettings]):
    def offers(self) -> frozenset[Signal]:
        return frozenset(("text", "references", "sampled", "top_k"))

    def open(self, context: TeacherContext) -> Oracle:
        return Oracle(self.name, self.settings, context)


class Oracle:
    """Teacher of `OracleSettings`: after a prefix of the answer comes its next token, after any other text the end."""

    def __init__(self, name: str, settings: OracleSettings, context: TeacherContext) -> None:
        self.name = name
        self.availability = Availability()
        self.retried = 0
        self._doubt = settings.doubt
        self._vocab_size = context.vocab_size
        self._end = context.stop_ids[0]
        self._answers = {prompt.prompt_id: encode_answer(context.tokenizer, prompt) for prompt in context.prompts}

    async def check(self) -> None: ...

    async def close(self) -> None: ...

    async def fingerprint(self, canary: Sequence[int]) -> Fingerprint | None:
        return None

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        yield [self._drawn(request) for request in requests]

    async def score(self, rollouts: Sequence[Rollout], top_k: bool = True) -> AsyncGenerator[list[Rollout]]:
        yield [self._scored(rollout) for rollout in rollouts]

    def _right(self, prompt_id: int, written: Sequence[int]) -> int:
        answer = self._answers[prompt_id]
        on_course = len(written) < len(answer) and list(answer[: len(written)]) == list(written)
        return int(answer[len(written)]) if on_course else self._end

    def _drawn(self, request: SampleRequest) -> Rollout:
        tokens: list[int] = []
        while len(tokens) < request.max_new_tokens and (not tokens or tokens[-1] != self._end):
            right = self._right(request.prompt_id, tokens)
            (u,) = uniforms(np.array([request.seed], dtype=np.uint64), np.array([len(tokens)]))
            # Below the doubt one of the wrong ids, each as likely.
            wrong = int(u / self._doubt * (self._vocab_size - 1))
            tokens.append(right if u >= self._doubt else wrong + (wrong >= right))
        written = np.array(tokens, dtype=np.int32)
        rollout = Rollout(
            sample_id=request.sample_id,
            prompt_id=request.prompt_id,
            prompt_ids=request.prompt_ids,
            token_ids=written,
            mixture_logprobs=None,
            student_logprobs=None,
            student_versions=np.full(len(tokens), request.min_version, dtype=np.int32),
            alpha=1.0,
            finish_reason="stop" if tokens and tokens[-1] == self._end else "length",
        )
        scored = self._scored(rollout)
        return replace(scored, mixture_logprobs=scored.teacher_logprobs)

    def _scored(self, rollout: Rollout) -> Rollout:
        written = rollout.token_ids.tolist()
        right = np.array([self._right(rollout.prompt_id, written[:place]) for place in range(len(written))], dtype=np.int32)
        sure, wrong = np.log1p(-self._doubt), np.log(self._doubt / (self._vocab_size - 1))
        return replace(
            rollout,
            teacher=self.name,
            teacher_logprobs=np.where(rollout.token_ids == right, sure, wrong).astype(np.float32),
            support_ids=right[:, None],
            support_logprobs=np.full((len(written), 1), sure, dtype=np.float32),
            tail_logprobs=np.full(len(written), np.log(self._doubt), dtype=np.float32),
        )
