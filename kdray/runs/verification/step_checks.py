"""Checks of one line of a ledger: its samples, what was left out, the samples' outcomes and prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from kdray.config import Config
from kdray.config.filters import FILTERS
from kdray.data.dataset import PromptStream
from kdray.runs.folder import CHANGED
from kdray.runs.ledger import NOT_FINITE
from kdray.runs.verification.proof import Proof
from kdray.runs.verification.steps import NO_VERSION, Step


def check_ids(proof: Proof, line: Step, batch_size: int) -> None:
    """Check that the samples are those of the step."""
    if line.is_one_batch(batch_size):
        return
    if len(line.sample_ids) != batch_size:
        proof.wrong("batch_size", f"step {line.step} has {len(line.sample_ids)} samples, the config {batch_size}")
    for sample_id in line.sample_ids:
        if sample_id // batch_size != line.step - 1:
            proof.wrong("misplaced", f"sample {sample_id} stands in step {line.step}, not {sample_id // batch_size + 1}")


class Rules:
    """Rules by which samples may be left out of a step, by the config at the time."""

    def __init__(self, config: Config, events: Sequence[Mapping[str, Any]]) -> None:
        filters = config.rollout.filters
        self._now = set() if filters is None else {rule.type for rule in filters.in_order()}
        if config.training.skips_not_finite:
            self._now.add(NOT_FINITE)
        # A resume may have changed them; events name the settings, not every rule that they turned on.
        self._filters_changed = _last_change(events, "rollout.filters")
        self._skipping_changed = _last_change(events, "training.on_not_finite")

    def check(self, proof: Proof, line: Step) -> None:
        """Check that an excluded sample belongs to its step and is excluded once, by a rule of the config at the time."""
        if not line.by_rule:
            return
        there = set(line.sample_ids)
        if line.is_left_out and set(line.by_rule[NOT_FINITE]) != there:
            proof.wrong("rule", f"step {line.step}: {NOT_FINITE} leaves out a part of its batch, and not the whole")
        before = {*FILTERS.names()} if line.step <= self._filters_changed else set()
        before |= {NOT_FINITE} if line.step <= self._skipping_changed else set()
        for rule in line.by_rule.keys() - self._now - before:
            proof.wrong("rule", f"step {line.step}: left out by {rule!r}; the config has {sorted(self._now) or 'no rules'}")
        counts = Counter(sample_id for ids in line.by_rule.values() for sample_id in ids)
        for sample_id, count in counts.items():
            if count > 1:
                proof.wrong("twice", f"sample {sample_id} is left out {count} times in step {line.step}")
            if sample_id not in there:
                proof.wrong("dropped", f"sample {sample_id} is left out of step {line.step}, which it is no part of")


def _last_change(events: Sequence[Mapping[str, Any]], setting: str) -> int:
    """Return the step of the last resume that changed a setting, or one below it; 0 if none did."""
    names = [(str(line.get("setting")), line.get("step")) for line in events if line.get("kind") == CHANGED]
    changed = [step for name, step in names if name == setting or name.startswith(f"{setting}.")]
    return max((step for step in changed if type(step) is int), default=0)


def check_outcomes(proof: Proof, line: Step, config: Config) -> None:
    """Check that excluded samples were not trained, staleness is within its bound, and samples of a prompt are adjacent."""
    siblings, bound = config.rollout.samples_per_prompt, config.rollout.max_staleness
    if line.told.trained_tokens != line.kept_tokens:
        proof.wrong(
            "tokens",
            f"step {line.step} trained {line.told.trained_tokens} tokens; its samples, without those left out, have "
            f"{line.kept_tokens}",
        )
    if not _versions_are_sound(line, bound):
        _tell_versions(proof, line, bound)
    ids, prompts = line.ids, line.prompt_ids
    of_one_prompt = ids[1:] // siblings == ids[:-1] // siblings
    if (of_one_prompt & (prompts[1:] != prompts[:-1])).any():
        by_prompt = groupby(zip(line.sample_ids, prompts.tolist(), strict=True), lambda pair: pair[0] // siblings)
        for _, group in by_prompt:
            pairs = list(group)
            if len({prompt_id for _, prompt_id in pairs}) > 1:
                proof.wrong("prompts", f"samples {[sample_id for sample_id, _ in pairs]} are of one prompt, and have several")


def _versions_are_sound(line: Step, bound: int) -> bool:
    oldest, newest, drawn = line.oldest, line.newest, line.tokens != 0
    within = (oldest >= max(0, line.step - 1 - bound)) & (oldest <= newest) & (newest <= line.step - 1)
    absent = (oldest == NO_VERSION) & (newest == NO_VERSION)
    return bool(np.where(drawn, within, absent).all())


def _tell_versions(proof: Proof, line: Step, bound: int) -> None:
    versions = zip(line.sample_ids, line.column("oldest"), line.column("newest"), line.column("tokens"), strict=True)
    for sample_id, oldest, newest, tokens in versions:
        if (oldest is None) != (tokens == 0) or (newest is None) != (tokens == 0):
            proof.wrong("versions", f"sample {sample_id} has {tokens} tokens, drawn by versions {oldest} to {newest}")
        elif tokens and not max(0, line.step - 1 - bound) <= oldest <= newest <= line.step - 1:
            proof.wrong(
                "staleness",
                f"sample {sample_id} was drawn by versions {oldest} to {newest} and trained on version {line.step - 1}; "
                f"rollout.max_staleness={bound}",
            )


def check_prompts(proof: Proof, line: Step, stream: PromptStream, siblings: int) -> None:
    """Check that seed and position give every sample's prompt."""
    wanted = stream.ids_at(np.maximum(0, line.ids) // siblings)
    for index in np.flatnonzero(line.prompt_ids != wanted).tolist():
        proof.wrong(
            "prompts",
            f"sample {line.sample_ids[index]} was prompt {line.prompt_ids[index]}; seed and data give prompt {wanted[index]}",
        )
