"""Rewards of responses, and their advantages over the other responses to the same prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kdray.data.graders import Grading
from kdray.types import Prompt, Rollout


@dataclass(frozen=True)
class Rewards:
    """Rewards of a batch, by sample id."""

    values: Mapping[int, float]
    """The grader's value of each response whose prompt can be graded."""
    advantages: Mapping[int, float]
    """Value minus the mean value of the prompt's other responses, for every response of the batch; 0 where that is unknown."""
    contrast: float
    """Share of the graded prompts whose responses differ in value; the others have no advantage to learn from."""

    def metrics(self) -> dict[str, float]:
        """Metrics of the step; empty if nothing was graded."""
        if not self.values:
            return {}
        return {"reward": float(np.mean(list(self.values.values()))), "reward_contrast": self.contrast}


class Rewarding:
    """Computation of a batch's rewards by the run's grader.

    The baseline leaves the response itself out, so that it does not depend on what it is subtracted from: the policy gradient
    stays unbiased for any number of responses, and it is not divided by their spread, which would weight prompts by it.
    Source: Kool, van Hoof & Welling 2019; Ahmadian et al. 2024 (arXiv 2402.14740), equation 9.
    """

    def __init__(self, decode: Callable[[np.ndarray], str], grade: Grading, prompts: Mapping[int, Prompt]) -> None:
        """Args: prompts: all prompts that are sampled for, by id."""
        self._decode = decode
        self._grade = grade
        self._prompts = prompts

    def __call__(self, rollouts: Sequence[Rollout]) -> Rewards:
        """Grade a batch of whole prompts. Raises: ResponseError if the grader failed."""
        values: dict[int, float] = {}
        groups: dict[int, list[int]] = {}
        for rollout in rollouts:
            prompt = self._prompts[rollout.prompt_id]
            # The data's own answers were not drawn by the student.
            if rollout.has_writer("data") or not self._grade.can_grade(prompt):
                continue
            values[rollout.sample_id] = self._grade.value(prompt, self._decode(rollout.token_ids).strip())
            groups.setdefault(rollout.prompt_id, []).append(rollout.sample_id)
        advantages = {rollout.sample_id: 0.0 for rollout in rollouts}
        differing = 0
        for sample_ids in groups.values():
            group = np.array([values[sample_id] for sample_id in sample_ids])
            differing += bool(np.ptp(group) > 0)
            if len(group) > 1:
                others = (group.sum() - group) / (len(group) - 1)
                advantages |= dict(zip(sample_ids, (group - others).tolist(), strict=True))
        return Rewards(values, advantages, differing / len(groups) if groups else 0.0)
