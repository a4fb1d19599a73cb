"""Privileged teacher: its prompt differs from the student's, with the answer, an instruction or a worked example added."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace

import numpy as np

from kdray.interfaces import Scorer
from kdray.types import Rollout


class PrivilegedScorer:
    """A Scorer (`kdray.interfaces`): scores the student's responses as continuations of the teacher's own prompts."""

    def __init__(self, scorer: Scorer, prompts: Mapping[int, np.ndarray]) -> None:
        """Args: prompts: token ids of the teacher's prompts, by prompt id."""
        self.name = scorer.name
        self._scorer = scorer
        self._prompts = prompts

    async def score(self, rollouts: Sequence[Rollout], top_k: bool = True) -> AsyncGenerator[list[Rollout]]:
        """See `kdray.interfaces.Scorer`. Exact KLs are None, since the two models read different prompts."""
        prompts = {rollout.sample_id: rollout.prompt_ids for rollout in rollouts}
        asked = [replace(rollout, prompt_ids=self._prompts[rollout.prompt_id]) for rollout in rollouts]
        async with aclosing(self._scorer.score(asked, top_k)) as stream:
            async for scored in stream:
                yield [
                    replace(rollout, prompt_ids=prompts[rollout.sample_id], reverse_kl=None, forward_kl=None)
                    for rollout in scored
                ]
