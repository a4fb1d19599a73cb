"""Held-out evaluation through the same interfaces as the loop: the student's own samples, drawn with fixed seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np

from kdray.data.graders import Grading
from kdray.data.rouge import rouge_l
from kdray.errors import EngineError
from kdray.interfaces import Sampler, Scorer
from kdray.rollouts.draw import draw_scored
from kdray.rollouts.seeds import sample_seed
from kdray.runs.results.draws import Draw, ratios
from kdray.types import Prompt, Rollout, SampleRequest

_LONGEST_LOOP = 64
"""Most tokens of an n-gram whose repetition is looked for."""
_LEAST_REPEATS = 3
_LEAST_LOOP_TOKENS = 6
"""Tokens that the repeated n-grams must cover, so that the digits of 1000 are no loop."""


@dataclass(frozen=True)
class Measurement:
    """Result of an evaluation."""

    numbers: dict[str, float]
    """Metrics by name, as `HeldOut` describes them."""
    rollouts: list[Rollout]
    """The responses: of the first prompt, of the second and so on."""
    draws: list[Draw]
    """Numbers of each rollout, from which the metrics and their intervals follow."""


@dataclass(frozen=True)
class HeldOut:
    """A measurement on held-out prompts.

    `reverse_kl` and `forward_kl` are in nats per response token, over the whole vocabulary, on temperature-1 samples of the
    student, averaged over tokens. `exact_match` in [0, 1], the share that `grade` accepts, is present if prompts can be graded,
    `exact_match/<domain>` if they have several domains, and `pass_at_<k>` for each k of `pass_at`. `step_match` is the mean
    share of right steps, if the grader knows steps. `response_tokens`, `truncated`, `repetition` (the share of responses that
    end in a loop) and `distinct_<n>` (the share of n-grams that differ) tell whether responses degenerate; `top_overlap` is the
    share of the student's top ids that are also the teacher's.
    """

    prompts: Sequence[Prompt]
    sampler: Sampler
    scorer: Scorer | None
    """Scores rollouts that the sampler left unscored; None if rollouts come back scored."""
    decode: Callable[[np.ndarray], str]
    grade: Grading | None
    """Decides whether a response is right; None if nothing grades the prompts."""
    max_new_tokens: int
    seed: int
    """Seed of the run: the same seed draws the same samples under the same weights."""
    alpha: float = 0.0
    """0 measures the student, 1 the teacher itself."""
    exact: bool = True
    """Measure KLs, which needs replicas that hold both teacher and student."""
    samples_per_prompt: int = 1
    """Responses drawn to each prompt."""
    pass_at: Sequence[int] = ()
    """Values of k for which `pass_at_<k>` is measured, at most `samples_per_prompt`."""
    siblings: int = 1
    """Distance of sample ids for a sampler that tells a prompt's samples apart by them: each response is the first sample."""
    top_ids: tuple[int, int] | None = None
    """Numbers of the teacher's and the student's top ids in the recorded support; None leaves their overlap out."""
    rouge_l: bool = False
    """Measure the overlap of responses with the prompts' reference answers, `rouge_l`."""

    async def measure(self, version: int) -> Measurement:
        """Evaluate a student version.

        Raises: EngineError if the replicas cannot give full-vocabulary KLs, or another version answered; ResponseError if the
        grader failed.
        """
        asked = [(prompt, draw) for prompt in self.prompts for draw in range(self.samples_per_prompt)]
        # Replicas update to `min_version` before they sample.
        requests = [
            SampleRequest(
                sample_id=index * self.siblings,
                prompt_id=prompt.prompt_id,
                prompt_ids=prompt.token_ids,
                alpha=self.alpha,
                # The first response has the seed that it has if it is the only one.
                seed=sample_seed(self.seed, f"heldout/{draw}" if draw else "heldout", prompt.prompt_id),
                max_new_tokens=self.max_new_tokens,
                min_version=version,
            )
            for index, (prompt, draw) in enumerate(asked)
        ]
        async with aclosing(draw_scored(self.sampler, self.scorer, requests)) as stream:
            rollouts = [rollout async for part in stream for rollout in part]
        rollouts.sort(key=lambda rollout: rollout.sample_id)
        if self.alpha < 1.0:
            _refuse_others(rollouts, version)
        draws = [self._draw(prompt, draw, rollout) for (prompt, draw), rollout in zip(asked, rollouts, strict=True)]
        numbers = {name: ratio.value for name, ratio in ratios(draws, self.pass_at).items()}
        responses = [_targets(rollout) for rollout in rollouts]
        numbers |= {f"distinct_{n}": share for n in (1, 2, 3) if (share := distinct(responses, n)) is not None}
        numbers |= {"prompts": float(len(self.prompts)), "responses": float(len(rollouts))}
        return Measurement(numbers, rollouts, draws)

    def _draw(self, prompt: Prompt, draw: int, rollout: Rollout) -> Draw:
        grade = self.grade if self.grade is not None and self.grade.can_grade(prompt) else None
        return Draw(
            prompt_id=prompt.prompt_id,
            draw=draw,
            domain=prompt.domain,
            tokens=rollout.num_targets,
            truncated=rollout.finish_reason == "length",
            repeats=ends_in_a_loop(_targets(rollout)),
            exact_match=bool(grade(prompt, self.decode(rollout.token_ids))) if grade else None,
            reverse_kl=_sum_of(rollout, rollout.reverse_kl) if self.exact else None,
            forward_kl=_sum_of(rollout, rollout.forward_kl) if self.exact else None,
            top_overlap=None if self.top_ids is None else _overlap(rollout, *self.top_ids),
            rouge_l=rouge_l(prompt, self.decode(rollout.token_ids)) if self.rouge_l else None,
            step_match=grade.step_match(prompt, self.decode(rollout.token_ids)) if grade else None,
        )


def ends_in_a_loop(token_ids: np.ndarray) -> bool:
    """True if the last tokens repeat one n-gram, of up to 64 tokens, at least three times and over at least six tokens."""
    for n in range(1, min(_LONGEST_LOOP, len(token_ids) // _LEAST_REPEATS) + 1):
        repeats = max(_LEAST_REPEATS, -(-_LEAST_LOOP_TOKENS // n))
        if repeats * n <= len(token_ids):
            tail = token_ids[-repeats * n :].reshape(repeats, n)
            if (tail == tail[0]).all():
                return True
    return False


def distinct(responses: Sequence[np.ndarray], n: int) -> float | None:
    """Number of different n-grams in all responses over the number of n-grams; None if there are none.

    Source: Li et al. 2016 (arXiv 1510.03055), with n-grams in place of tokens as the denominator.
    """
    found = [np.lib.stride_tricks.sliding_window_view(each, n) for each in responses if len(each) >= n]
    if not found:
        return None
    grams = np.concatenate(found)
    return len(np.unique(grams, axis=0)) / len(grams)


def _refuse_others(rollouts: Sequence[Rollout], version: int) -> None:
    """Refuse numbers of a mixture of versions: training goes on beside an evaluation. Raises: EngineError."""
    drew = {int(each) for rollout in rollouts for each in np.unique(rollout.target_versions)}
    if drew - {version}:
        raise EngineError(
            f"the evaluation of student version {version} was answered by version {', '.join(map(str, sorted(drew)))}: it "
            "would be of neither; continue with --resume, and report it with the run folder if it happens again"
        )


def _targets(rollout: Rollout) -> np.ndarray:
    """Token ids that the model chose, without the end-of-sequence token."""
    chosen = rollout.token_ids[rollout.is_target]
    return chosen[:-1] if rollout.finish_reason == "stop" else chosen


def _sum_of(rollout: Rollout, column: np.ndarray | None) -> float:
    if column is None:
        raise EngineError("held-out KL needs replicas that hold teacher and student together")
    return float(column[rollout.is_target].sum(dtype=np.float64))


def _overlap(rollout: Rollout, teacher_top: int, student_top: int) -> float | None:
    """Sum over the targets of the overlap of top ids; None if the rollout has no such support.

    The student's slots of the support hold only those of its top ids that are not among the teacher's.
    """
    support = rollout.support_ids
    if support is None or not student_top or support.shape[-1] != teacher_top + student_top:
        return None
    apart = np.count_nonzero(support[rollout.is_target, teacher_top:] >= 0, axis=-1)
    return float((1.0 - apart / student_top).sum())
