"""Which responses of a batch are trained on. The others keep their place in it and teach nothing.

Slots are what makes the staleness bound a guarantee, so a filter takes a response's tokens out of the loss and not its sample
out of the batch; the ledger says which rule did it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from kdray.config import FilterSettings
from kdray.types import Rollout


class Filters:
    """The rules of `rollout.filters`, in the order of their settings; the first that a response fails is named.

    The data's own answers pass every rule and have no vote.
    """

    def __init__(
        self,
        settings: FilterSettings,
        decode: Callable[[np.ndarray], str],
        grade: Callable[[str, str], bool] | None,
        answers: Mapping[int, str | None],
    ) -> None:
        """Args: grade: needed by `correct`; answers: reference answer by prompt id."""
        self._settings = settings
        self._decode = decode
        self._grade = grade
        self._answers = answers
        self._pattern = None if settings.pattern is None else re.compile(settings.pattern)

    def __call__(self, rollouts: Sequence[Rollout]) -> dict[int, str]:
        """The rule that each left-out rollout failed, by sample id. Rollouts of one prompt are compared with each other."""
        drawn = [rollout for rollout in rollouts if not rollout.has_writer("data")]
        texts = {rollout.sample_id: self._decode(rollout.token_ids).strip() for rollout in drawn}
        groups: dict[int, list[Rollout]] = {}
        for rollout in rollouts:
            if rollout.sample_id in texts:
                groups.setdefault(rollout.prompt_id, []).append(rollout)
        dropped: dict[int, str] = {}
        for group in groups.values():
            failed = {rollout.sample_id: rule for rollout in group if (rule := self._fails(rollout, texts[rollout.sample_id]))}
            votes = {rollout.sample_id: texts[rollout.sample_id] for rollout in group if rollout.sample_id not in failed}
            dropped |= failed | self._disagreeing(votes, len(group))
        return dropped

    def _fails(self, rollout: Rollout, text: str) -> str | None:
        """The rule that a response fails by itself."""
        settings = self._settings
        if settings.finished and rollout.finish_reason != "stop":
            return rollout.finish_reason if rollout.finish_reason == "unparsable" else "finished"
        if self._pattern is not None and not self._pattern.search(text):
            return "pattern"
        if settings.correct:
            answer = self._answers.get(rollout.prompt_id)
            assert self._grade is not None
            if answer is None or not self._grade(text, answer):
                return "correct"
        return None

    def _disagreeing(self, votes: Mapping[int, str], size: int) -> dict[int, str]:
        """Those of a group that its agreement leaves out. Args: votes: answers that failed no rule yet; size: of the group."""
        agreement = self._settings.agreement
        dropped: dict[int, str] = {}
        if agreement is not None and size < 2:
            # Beside the data's answers, one that was drawn alone agrees with nobody.
            dropped = dict.fromkeys(votes, "agreement")
        elif agreement is not None and votes:
            ranked = Counter(votes.values()).most_common()
            answer, count = ranked[0]
            tied = len(ranked) > 1 and ranked[1][1] == count
            # An answer that failed another rule counts as a vote against.
            enough = {"plurality": not tied, "majority": 2 * count > size, "unanimous": count == size}[agreement]
            dropped = {sample_id: "agreement" for sample_id, text in votes.items() if not enough or text != answer}
        if self._settings.distinct:
            seen: set[str] = set()
            for sample_id, text in votes.items():
                if sample_id not in dropped and text in seen:
                    dropped[sample_id] = "distinct"
                seen.add(text)
        return dropped
