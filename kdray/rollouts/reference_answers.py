"""Reference answers from the data as rollouts: classical distillation on a fixed dataset, or a share of real data."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import numpy as np

from kdray.data.references import reference_of
from kdray.errors import DataError
from kdray.interfaces import Sampler, Scorer
from kdray.rollouts.merge import Merged
from kdray.types import WRITERS, Prompt, Reference, Rollout, SampleRequest

_DATA, _ENVIRONMENT = WRITERS.index("data"), WRITERS.index("environment")


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
        self._references: Mapping[int, Reference] = {prompt.prompt_id: reference_of(tokenizer, prompt) for prompt in prompts}
        lengths = {prompt_id: len(reference.answer_ids) for prompt_id, reference in self._references.items()}
        longest = max(lengths, key=lambda prompt_id: lengths[prompt_id])
        if lengths[longest] > limit:
            raise DataError(
                f"rollout.max_new_tokens={limit}, but the reference answer of prompt {longest} has "
                f"{lengths[longest]} tokens; raise it to that"
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
        reference = self._references[request.prompt_id]
        token_ids = reference.token_ids
        return Rollout(
            sample_id=request.sample_id,
            prompt_id=request.prompt_id,
            # Shorter than the request's if earlier turns of the conversation are targets, too.
            prompt_ids=reference.prompt_ids,
            token_ids=token_ids,
            mixture_logprobs=None,
            student_logprobs=None,
            # As for a black box: staleness counts from the time of the request.
            student_versions=np.full(len(token_ids), request.min_version, dtype=np.int32),
            alpha=0.0,
            finish_reason="stop",
            writer=np.where(reference.is_target, _DATA, _ENVIRONMENT).astype(np.int8),
        )
