"""Reference answers from the data as rollouts: classical distillation on a fixed dataset, or a share of real data."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import numpy as np

from kdray.data.dataset import encode_answer
from kdray.errors import DataError
from kdray.interfaces import Sampler, Scorer
from kdray.rollouts.merge import Merged
from kdray.types import Prompt, Rollout, SampleRequest, written_by


class WithReferences:
    """Sampler (`kdray.interfaces`) that returns the prompt's reference answer for requests with the writer `data`.

    Other requests go to the wrapped sampler. An answer's sampling distribution is unknown, so its log q and log m are None.
    """

    def __init__(self, sampler: Sampler, scorer: Scorer | None, prompts: Sequence[Prompt], tokenizer: Any, limit: int) -> None:
        """Args: scorer: adds the teacher's columns to reference answers, as the sampler's rollouts have them; None if those
              are scored later, or need no columns; limit: longest answer allowed, in tokens.
        Raises: DataError if a prompt has no answer, or a longer one.
        """
        self._sampler = sampler
        self._scorer = scorer
        self._answers: Mapping[int, np.ndarray] = {prompt.prompt_id: encode_answer(tokenizer, prompt) for prompt in prompts}
        longest = max(self._answers, key=lambda prompt_id: len(self._answers[prompt_id]))
        if len(self._answers[longest]) > limit:
            raise DataError(
                f"rollout.max_new_tokens={limit}, but the reference answer of prompt {longest} has "
                f"{len(self._answers[longest])} tokens; raise it to that"
            )

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncGenerator[list[Rollout]]:
        """See `kdray.interfaces.Sampler`."""
        references = [self._reference(request) for request in requests if request.writer == "data"]
        drawn = [request for request in requests if request.writer != "data"]
        async with Merged[str, list[Rollout]]() as merged:
            if drawn:
                merged.add("drawn", self._sampler.sample(drawn))
            if references and self._scorer is not None:
                merged.add("scored", self._scorer.score(references))
            elif references:
                yield references
            async for _, rollouts in merged:
                yield rollouts

    def _reference(self, request: SampleRequest) -> Rollout:
        token_ids = self._answers[request.prompt_id]
        return Rollout(
            sample_id=request.sample_id,
            prompt_id=request.prompt_id,
            prompt_ids=request.prompt_ids,
            token_ids=token_ids,
            mixture_logprobs=None,
            student_logprobs=None,
            # As for a black box: staleness counts from the time of the request.
            student_versions=np.full(len(token_ids), request.min_version, dtype=np.int32),
            alpha=0.0,
            finish_reason="stop",
            writer=written_by("data", len(token_ids)),
        )
