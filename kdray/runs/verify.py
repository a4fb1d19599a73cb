"""Verification from a run's files that every sample was trained once, in its step, or excluded by a named rule.

The order of samples is a function of the config: step s trains ids [(s - 1) * batch_size, s * batch_size), and the prompt of an
id follows from the seed. So the files are checked against the config, against each other, and, if the prompts are available,
against the prompts. Works on runs that have ended, were interrupted, or are still going; a step counts once its line is
complete.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, TypeGuard

from kdray.config import Config, load_config
from kdray.config.filters import FILTERS
from kdray.data.dataset import Dataset, PromptStream, load_dataset
from kdray.errors import DataError, KdrayError
from kdray.runs.checkpoints import COMMITTED
from kdray.runs.folder import CHANGED, RunFolder, read_lines, started_in
from kdray.runs.ledger import NOT_FINITE
from kdray.runs.training_record import compare_records, described

_FATES = ("prompt_ids", "tokens", "oldest", "newest", "scored_by")
_ENDS = {
    "start": "unfinished",
    "finished": "finished",
    "interrupted": "interrupted",
    "stopped": "interrupted",
    "failed": "failed",
}
_SHOWN = 5
"""Maximum number of problems of one kind that are listed individually."""


@dataclass
class Proof:
    """Result of verifying the files of a run."""

    state: str = "unfinished"
    """`finished`, `interrupted`, `failed`, or `unfinished`: still going, or killed."""
    facts: list[tuple[str, str]] = field(default_factory=list)
    """(name, value) pairs."""
    notes: list[str] = field(default_factory=list)
    """Checks that were not possible, with the reason."""
    problems: list[tuple[str, str]] = field(default_factory=list)
    """(kind, description with location) pairs."""

    def wrong(self, kind: str, what: str) -> None:
        self.problems.append((kind, what))

    def described(self) -> list[str]:
        """Describe the problems, at most a few of each kind."""
        lines = []
        for kind in dict.fromkeys(kind for kind, _ in self.problems):
            found = [f"{kind}: {what}" for one, what in self.problems if one == kind]
            lines += found[:_SHOWN] + ([f"{kind}: {len(found) - _SHOWN} more"] if len(found) > _SHOWN else [])
        return lines


@dataclass(frozen=True)
class _Step:
    """Well-formed line of the ledger."""

    step: int
    sample_ids: list[int]
    by_rule: Mapping[str, list[int]]
    line: Mapping[str, Any]

    @cached_property
    def dropped(self) -> set[int]:
        return {sample_id for ids in self.by_rule.values() for sample_id in ids}

    def column(self, name: str) -> list[Any]:
        """Return one value per sample; see `kdray.runs.ledger.sample_outcomes`."""
        value = self.line[name]
        return value if isinstance(value, list) else [value] * len(self.sample_ids)

    @property
    def is_left_out(self) -> bool:
        """True if the whole batch was left out because its loss or gradient was not finite."""
        return NOT_FINITE in self.by_rule

    @cached_property
    def kept_tokens(self) -> int:
        pairs = zip(self.sample_ids, self.column("tokens"), strict=True)
        return sum(tokens for sample_id, tokens in pairs if sample_id not in self.dropped)

    @cached_property
    def staleness(self) -> int:
        return max((self.step - 1 - version for version in self.column("oldest") if version is not None), default=0)


def verify(run: Path) -> Proof:
    """Verify the files of a run. Raises: DataError if `run` is not a run folder; ConfigError if its config cannot be read."""
    folder = RunFolder.open(run)
    proof = Proof()
    events = _lines(proof, folder.events)
    config = load_config(folder.config, (), started_in(events))
    proof.state = next((_ENDS[kind] for kind in map(_kind, reversed(events)) if kind in _ENDS), "unfinished")
    ledger = folder.path / "ledger.jsonl"
    steps, metrics = list(_steps(proof, ledger)), _lines(proof, folder.metrics)
    # A run killed before the end of its first step may not have them yet.
    if proof.state == "finished" or len(steps) > 1 or metrics:
        for path in (ledger, folder.metrics, folder.events):
            if not path.exists():
                proof.wrong("missing", f"{path.name} is not there")
    done = config.training.steps if proof.state == "finished" else max((line.step for line in steps), default=0)
    _check_ids(proof, steps, done, config.training.batch_size)
    _check_dropped(proof, steps, config, events)
    told = _with_outcomes(proof, steps)
    _check_outcomes(proof, told, config)
    _check_training(proof, told, config)
    _check_metrics(proof, steps, told, metrics, events, config)
    dataset = _check_prompts(proof, told, config)
    if config.run.storage is not None:
        proof.notes.append("checkpoints in run.storage were not looked at")
    checkpoints = sorted(folder.checkpoints.glob(f"step-*/{COMMITTED}"))
    for marker in checkpoints:
        _check_checkpoint(proof, marker, told, config)
    if proof.state == "finished":
        _check_summary(proof, folder, steps, told, events, dataset, config)
    proof.facts = _facts(proof, steps, told, events, len(checkpoints), config)
    return proof


# ------------------------------------------------------------------------------------------------------------ reading


def _lines(proof: Proof, path: Path) -> list[dict[str, Any]]:
    """Read the lines of a file; empty if it does not exist."""
    try:
        return read_lines(path) if path.exists() else []
    except (DataError, UnicodeDecodeError) as error:
        proof.wrong("unreadable", str(error) if isinstance(error, DataError) else f"{path}: not UTF-8 text")
    return []


def _steps(proof: Proof, path: Path) -> Iterator[_Step]:
    for number, line in enumerate(_lines(proof, path), start=1):
        ids, by_rule = line.get("sample_ids"), line.get("dropped", {})
        named = isinstance(by_rule, dict) and all(_whole_numbers(left_out) for left_out in by_rule.values())
        if type(line.get("step")) is int and _whole_numbers(ids) and named:
            yield _Step(line["step"], ids, by_rule, line)
        else:
            proof.wrong("unreadable", f"{path.name} line {number} does not say which samples a step trained")


def _kind(line: Mapping[str, Any]) -> str:
    """Return the kind of an event."""
    return str(line.get("kind"))


def _whole_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _with_outcomes(proof: Proof, steps: Sequence[_Step]) -> list[_Step]:
    """Return the steps if all their lines have the outcome columns; empty if one has only ids."""
    lacking = [line.step for line in steps if not all(name in line.line for name in (*_FATES, "trained_tokens"))]
    if lacking and len(lacking) == len(steps):
        proof.notes.append("the ledger is of an older version: versions, tokens and prompts of its samples are not known")
        return []
    uneven = [line.step for line in steps if line.step not in lacking and not _even(line)]
    for step in lacking + uneven:
        proof.wrong("outcomes", f"step {step}: its line does not tell versions, tokens and prompt of every sample")
    return [] if lacking or uneven else list(steps)


def _even(line: _Step) -> bool:
    """Return True if every column has a value of the right type for every sample."""
    kinds: dict[str, tuple[type, ...]] = {"oldest": (int, type(None)), "newest": (int, type(None)), "scored_by": (str,)}
    return type(line.line["trained_tokens"]) is int and all(
        len(values := line.column(name)) == len(line.sample_ids) and all(type(v) in kinds.get(name, (int,)) for v in values)
        for name in _FATES
    )


# ----------------------------------------------------------------------------------------------------------- checking


def _check_ids(proof: Proof, steps: Sequence[_Step], done: int, batch_size: int) -> None:
    """Check that every step occurs once and in order, and every sample once and in its step."""
    numbers = [line.step for line in steps]
    _check_numbers(proof, "ledger.jsonl", numbers, done)
    for line in steps:
        if len(line.sample_ids) != batch_size:
            proof.wrong("batch_size", f"step {line.step} has {len(line.sample_ids)} samples, the config {batch_size}")
        for sample_id in line.sample_ids:
            if sample_id // batch_size != line.step - 1:
                proof.wrong("misplaced", f"sample {sample_id} stands in step {line.step}, not {sample_id // batch_size + 1}")
    counts = Counter(sample_id for line in steps for sample_id in line.sample_ids)
    for sample_id in range(done * batch_size):
        if counts[sample_id] == 0:
            proof.wrong("lost", f"sample {sample_id}, of step {sample_id // batch_size + 1}, has no outcome")
    for sample_id, count in counts.items():
        if count > 1:
            proof.wrong("twice", f"sample {sample_id} stands there {count} times")


def _check_numbers(proof: Proof, name: str, numbers: Sequence[int], done: int) -> None:
    """Check for steps 1 to `done`, each once, in order."""
    counts = Counter(numbers)
    for step in range(1, done + 1):
        if counts[step] != 1:
            kind = "twice" if counts[step] else "gap"
            proof.wrong(kind, f"{name} has {counts[step] or 'no'} lines of step {step}")
    if beyond := sorted(step for step in counts if not 1 <= step <= done):
        proof.wrong("beyond", f"{name} has lines of steps {beyond[:_SHOWN]}, and the run has {done} steps")
    if list(numbers) != sorted(numbers):
        at = next(after for before, after in pairwise(numbers) if after < before)
        proof.wrong("order", f"{name}: step {at} stands after later ones")


def _check_dropped(proof: Proof, steps: Sequence[_Step], config: Config, events: Sequence[Mapping[str, Any]]) -> None:
    """Check that an excluded sample belongs to its step and is excluded once, by a rule of the config at the time."""
    filters = config.rollout.filters
    rules = set() if filters is None else {rule.type for rule in filters.in_order()}
    if config.training.skips_not_finite:
        rules.add(NOT_FINITE)
    # A resume may have changed them; events name the settings, not every rule that they turned on.
    changed = _last_change(events, "rollout.filters"), _last_change(events, "training.on_not_finite")
    for line in steps:
        if line.is_left_out and set(line.by_rule[NOT_FINITE]) != set(line.sample_ids):
            proof.wrong("rule", f"step {line.step}: {NOT_FINITE} leaves out a part of its batch, and not the whole")
        before = {*FILTERS.names()} if line.step <= changed[0] else set()
        before |= {NOT_FINITE} if line.step <= changed[1] else set()
        for rule in line.by_rule.keys() - rules - before:
            proof.wrong("rule", f"step {line.step}: left out by {rule!r}; the config has {sorted(rules) or 'no rules'}")
        counts = Counter(sample_id for ids in line.by_rule.values() for sample_id in ids)
        for sample_id, count in counts.items():
            if count > 1:
                proof.wrong("twice", f"sample {sample_id} is left out {count} times in step {line.step}")
            if sample_id not in line.sample_ids:
                proof.wrong("dropped", f"sample {sample_id} is left out of step {line.step}, which it is no part of")


def _check_outcomes(proof: Proof, told: Sequence[_Step], config: Config) -> None:
    """Check that excluded samples were not trained, staleness is within its bound, and samples of a prompt are adjacent."""
    siblings, bound = config.rollout.samples_per_prompt, config.rollout.max_staleness
    for line in told:
        if line.line["trained_tokens"] != line.kept_tokens:
            proof.wrong(
                "tokens",
                f"step {line.step} trained {line.line['trained_tokens']} tokens; its samples, without those left out, have "
                f"{line.kept_tokens}",
            )
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
        by_prompt = groupby(zip(line.sample_ids, line.column("prompt_ids"), strict=True), lambda pair: pair[0] // siblings)
        for _, group in by_prompt:
            pairs = list(group)
            if len({prompt_id for _, prompt_id in pairs}) > 1:
                proof.wrong("prompts", f"samples {[sample_id for sample_id, _ in pairs]} are of one prompt, and have several")


def _last_change(events: Sequence[Mapping[str, Any]], setting: str) -> int:
    """Return the step of the last resume that changed a setting, or one below it; 0 if none did."""
    names = [(str(line.get("setting")), line.get("step")) for line in events if _kind(line) == CHANGED]
    changed = [step for name, step in names if name == setting or name.startswith(f"{setting}.")]
    return max((step for step in changed if type(step) is int), default=0)


def _check_training(proof: Proof, told: Sequence[_Step], config: Config) -> None:
    """Check each rank's own record of what it trained against the rollouts that it was given, and its optimizer's counter."""
    notes, problems = compare_records([line.line for line in told], config.training)
    proof.notes += notes
    for what in problems:
        proof.wrong("training", what)


def _resumed_step(events: Sequence[Mapping[str, Any]]) -> int | None:
    """Checkpoint from which the last driver went on; None if it began the run."""
    return next((line.get("resumed_step") for line in reversed(events) if _kind(line) == "start"), None)


def _check_metrics(
    proof: Proof,
    steps: Sequence[_Step],
    told: Sequence[_Step],
    metrics: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    config: Config,
) -> None:
    """Check for one line per step of the ledger, and for agreement of the numbers that both files have."""
    numbers = [line.get("step") for line in metrics]
    if not _whole_numbers(numbers):
        proof.wrong("unreadable", "metrics.jsonl has a line without a step")
        return
    last, reached = max((line.step for line in steps), default=0), max(numbers, default=0)
    # A step's line is written to the ledger first; after a kill at that point, or during the write, the other is missing. A
    # resume takes lines back from metrics.jsonl first, and may be killed at that point too.
    cut = proof.state != "finished" and reached in (last - 1, _resumed_step(events)) and reached <= last
    _check_numbers(proof, "metrics.jsonl", numbers, reached if cut else last)
    by_step = {line.step: line for line in told}
    for line in metrics:
        step, staleness = line["step"], line.get("staleness_max")
        if isinstance(staleness, int | float) and staleness > config.rollout.max_staleness:
            proof.wrong(
                "staleness", f"step {step}: staleness_max={staleness:g}; rollout.max_staleness={config.rollout.max_staleness}"
            )
        if (entry := by_step.get(step)) is None:
            continue
        size = len(entry.sample_ids)
        wanted = {
            "staleness_max": float(entry.staleness),
            "response_tokens": sum(entry.column("tokens")) / size if size else 0.0,
            "filtered": len(entry.dropped) / size if entry.dropped else None,
        }
        for name, value in wanted.items():
            found = line.get(name)
            alike = isinstance(found, int | float) and value is not None and math.isclose(found, value, rel_tol=1e-9)
            if not alike and not found is value is None:
                proof.wrong("metrics", f"step {step}: {name}={found}, and the ledger says {value}")


def _check_prompts(proof: Proof, told: Sequence[_Step], config: Config) -> Dataset | None:
    """Check that seed and position give every sample's prompt; return the prompts, if available."""
    try:
        dataset = _dataset(config)
    except KdrayError as error:
        proof.notes.append(f"which prompt a sample is was not computed again: {error}")
        return None
    stream = PromptStream(dataset.train, config.run.seed)
    for line in told:
        for sample_id, prompt_id in zip(line.sample_ids, line.column("prompt_ids"), strict=True):
            wanted = stream.at(max(0, sample_id) // config.rollout.samples_per_prompt).prompt_id
            if prompt_id != wanted:
                proof.wrong("prompts", f"sample {sample_id} was prompt {prompt_id}; seed and data give prompt {wanted}")
    return dataset


def _dataset(config: Config) -> Dataset:
    """Load the prompts of the run. Raises: DataError if they are not on this machine, or cannot be read."""
    from kdray.models.inspect import loaded_from, student_tokenizer

    source, model = config.data.prompts, config.student.model
    if not source.local:
        raise DataError(f"data.prompts.type={source.type} is not on this machine")
    folder = loaded_from(model)
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise DataError(
            f"student.model={folder} is no folder on this machine, and its tokenizer decides which prompts are too long"
        )
    return load_dataset(config, student_tokenizer(config), references=False)


def _check_checkpoint(proof: Proof, marker: Path, told: Sequence[_Step], config: Config) -> None:
    """Check that the totals of a checkpoint are those of its steps."""
    name = marker.parent.name
    try:
        progress = json.loads(marker.read_text(encoding="utf-8"))
        step, totals = progress["step"], progress["totals"]
        if type(step) is not int:
            raise TypeError(f"step={step!r}")
        consumed, trained, generated = (totals[key] for key in ("prompts_consumed", "trained_tokens", "tokens_generated"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        proof.wrong("checkpoint", f"{name}/{marker.name} cannot be read: {error!r}")
        return
    if not told or step > config.training.steps:
        return
    if step > told[-1].step:
        if proof.state == "finished":
            proof.wrong("checkpoint", f"{name} has {step} steps, the ledger {told[-1].step}")
        else:
            proof.notes.append(f"{name} is ahead of the ledger: the run goes on from an older one")
        return
    known = [line for line in told if line.step <= step]
    _agree(proof, "checkpoint", name, "prompts_consumed", consumed, _prompts(known, config))
    _agree(proof, "checkpoint", name, "trained_tokens", trained, sum(line.kept_tokens for line in known))
    _at_least(proof, "checkpoint", name, generated, known)


def _check_summary(
    proof: Proof,
    folder: RunFolder,
    steps: Sequence[_Step],
    told: Sequence[_Step],
    events: Sequence[Mapping[str, Any]],
    dataset: Dataset | None,
    config: Config,
) -> None:
    """Check that the numbers of summary.json agree with the other files."""
    try:
        summary = folder.read_summary()
    except DataError as error:
        proof.wrong("summary", str(error))
        return
    counts = Counter(sample_id for line in steps for sample_id in line.sample_ids)
    starts = [line for line in events if _kind(line) == "start"]
    wanted: dict[str, Any] = {
        "steps": config.training.steps,
        "lost_samples": sum(not counts[sample_id] for sample_id in range(config.training.steps * config.training.batch_size)),
        "duplicated_samples": sum(count - 1 for count in counts.values()),
        "prompts_consumed": config.training.steps * config.training.batch_size // config.rollout.samples_per_prompt,
    }
    if starts:
        wanted["resumed_from_step"] = starts[-1].get("resumed_step")
    if dataset is not None:
        wanted["dropped_prompts"] = dataset.dropped
    if told and not config.training.finetune.steps:
        wanted["trained_tokens"] = sum(line.kept_tokens for line in told)
    for key, value in wanted.items():
        _agree(proof, "summary", "summary.json", key, summary.get(key, "nothing"), value)
    if told:
        _at_least(proof, "summary", "summary.json", summary.get("tokens_generated"), told)


def _agree(proof: Proof, kind: str, name: str, key: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        proof.wrong(kind, f"{name} says {key}={found}, the other files {wanted}")


def _at_least(proof: Proof, kind: str, name: str, generated: Any, told: Sequence[_Step]) -> None:
    """Check for at least the expected tokens: samples redrawn after a kill were generated twice, so more are consistent."""
    drawn = sum(sum(line.column("tokens")) for line in told)
    if not isinstance(generated, int) or generated < drawn:
        proof.wrong(kind, f"{name} says tokens_generated={generated}, and the ledger alone has {drawn}")


def _prompts(steps: Sequence[_Step], config: Config) -> int:
    return sum(len(line.sample_ids) // config.rollout.samples_per_prompt for line in steps)


# --------------------------------------------------------------------------------------------------------- reporting


def _changed(event: Mapping[str, Any]) -> str:
    return f"{event.get('setting')} after step {event.get('step')}: {event.get('old')} -> {event.get('new')}"


def _facts(
    proof: Proof,
    steps: Sequence[_Step],
    told: Sequence[_Step],
    events: Sequence[Mapping[str, Any]],
    checkpoints: int,
    config: Config,
) -> list[tuple[str, str]]:
    rules = Counter({rule: 0 for line in steps for rule in line.by_rule})
    for line in steps:
        rules.update({rule: len(ids) for rule, ids in line.by_rule.items()})
    samples = sum(len(line.sample_ids) for line in steps)
    resumed = [line["resumed_step"] for line in events if _kind(line) == "start" and line.get("resumed_step") is not None]
    retries = [line.get("rollouts") for line in events if _kind(line) == "retry"]
    facts = [
        ("run", f"{proof.state}, {len(steps)} of {config.training.steps} steps"),
        ("samples", f"{samples}, each with one outcome"),
        ("trained", f"{samples - sum(rules.values())}, each in its step"),
        ("left out", ", ".join(f"{count} by {rule}" for rule, count in rules.items()) or "0"),
    ]
    if batches := [line.step for line in steps if line.is_left_out]:
        facts.append(("batches left out", f"{len(batches)}, not finite: step {', '.join(map(str, batches[:_SHOWN]))}"))
    if told:
        scorers = Counter(teacher for line in told for teacher in line.column("scored_by"))
        named = (f"{count} by {teacher}" if teacher else f"{count} not scored" for teacher, count in scorers.items())
        facts += [
            ("scored", ", ".join(named)),
            ("tokens trained", str(sum(line.kept_tokens for line in told))),
            ("ranks", described([line.line for line in told])),
            ("staleness", f"at most {max(line.staleness for line in told)} of {config.rollout.max_staleness} steps"),
        ]
    facts += [
        ("metrics", "a line a step, as in the ledger"),
        ("checkpoints", str(checkpoints)),
        ("settings changed", "; ".join(_changed(line) for line in events if _kind(line) == CHANGED) or "none"),
        ("resumed", ", ".join(f"at step {step}" for step in resumed) or "never"),
        ("asked again", f"{sum(number for number in retries if type(number) is int)} samples in {len(retries)} retries"),
    ]
    return facts
