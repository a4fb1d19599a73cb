"""Verification from a run's files that every sample was trained once, in its step, or excluded by a named rule.

The order of samples is a function of the config: step s trains ids [(s - 1) * batch_size, s * batch_size), and the prompt of an
id follows from the seed. So the files are checked against the config, against each other, and, if the prompts are available,
against the prompts. Works on runs that have ended, were interrupted, or are still going; a step counts once its line is
complete. Ledger and metrics are read as streams: memory does not grow with the samples.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec

from kdray.config import Config
from kdray.config.load import load_saved_config
from kdray.data.dataset import Dataset, PromptStream, load_dataset
from kdray.errors import DataError, KdrayError
from kdray.runs.checkpoints import COMMITTED
from kdray.runs.folder import CHANGED, RunFolder, started_in
from kdray.runs.lines.events import Events, read_events
from kdray.runs.lines.occurrences import Occurrences
from kdray.runs.lines.streams import raw_lines, stream
from kdray.runs.verification.blocks import BlockChecks, in_blocks
from kdray.runs.verification.proof import SHOWN, Proof
from kdray.runs.verification.records import RecordChecks
from kdray.runs.verification.step_checks import Rules, check_ids, check_outcomes, check_prompts
from kdray.runs.verification.steps import Step, steps_in

__all__ = ["Proof", "verify"]

_ENDS = {
    "start": "unfinished",
    "finished": "finished",
    "interrupted": "interrupted",
    "stopped": "interrupted",
    "failed": "failed",
}


def verify(run: Path) -> Proof:
    """Verify the files of a run. Raises: DataError if `run` is not a run folder; ConfigError if its config cannot be read."""
    folder = RunFolder.open(run)
    proof = Proof()
    told = _events(proof, folder.events)
    events = told.kept
    config = load_saved_config(folder.config, started_in(events))
    proof.state = next((_ENDS[kind] for kind in map(_kind, reversed(events)) if kind in _ENDS), "unfinished")
    dataset = _prompts_of(proof, config)
    checkpoints = sorted(folder.checkpoints.glob(f"step-*/{COMMITTED}"))
    read = {marker: _read_checkpoint(proof, marker) for marker in checkpoints}
    ledger = _Ledger(proof, config, events, dataset, [each["step"] for each in read.values() if each is not None])
    path = folder.path / "ledger.jsonl"
    for lines in in_blocks(raw_lines(path), ledger.block_lines):
        if not ledger.take([raw for _, raw in lines]):
            for line in steps_in(proof, path, lines):
                ledger.add(line)
    ledger.close()
    has_metrics = _check_metrics(proof, ledger, folder.metrics, events)
    # A run killed before the end of its first step may not have them yet.
    if proof.state == "finished" or ledger.num_steps > 1 or has_metrics:
        for each in (path, folder.metrics, folder.events):
            if not each.exists():
                proof.wrong("missing", f"{each.name} is not there")
    if config.run.storage is not None:
        proof.notes.append("checkpoints in run.storage were not looked at")
    for marker, progress in read.items():
        if progress is not None:
            _check_checkpoint(proof, marker, progress, ledger)
    if proof.state == "finished":
        _check_summary(proof, folder, ledger, events, dataset)
    proof.facts = _facts(proof, ledger, told, len(checkpoints))
    return proof


# ------------------------------------------------------------------------------------------------------------ reading


def _events(proof: Proof, path: Path) -> Events:
    """Read the events; empty if there is no file, or it cannot be read."""
    try:
        return read_events(path)
    except DataError as error:
        proof.wrong("unreadable", str(error))
    return Events()


def _kind(line: Mapping[str, Any]) -> str:
    """Return the kind of an event."""
    return str(line.get("kind"))


def _resumed_step(events: Sequence[Mapping[str, Any]]) -> int | None:
    """Checkpoint from which the last driver went on; None if it began the run."""
    return next((line.get("resumed_step") for line in reversed(events) if _kind(line) == "start"), None)


def _recorded_from(events: Sequence[Mapping[str, Any]]) -> int | None:
    """Steps that were done when the first driver began that says its versions: from it on the ranks say what they trained."""
    said = (line for line in events if _kind(line) == "start" and "versions" in line)
    return next((int(line.get("resumed_step") or 0) for line in said), None)


def _prompts_of(proof: Proof, config: Config) -> Dataset | None:
    """Return the prompts, if available."""
    try:
        return _dataset(config)
    except KdrayError as error:
        proof.notes.append(f"which prompt a sample is was not computed again: {error}")
        return None


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


# ------------------------------------------------------------------------------------------------------------- ledger


class _Numbers:
    """Numbers of steps in a file: how often each is there, and in which order."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._counts = Occurrences()
        self.last = 0
        """Greatest number."""
        self._begin, self._end = 0, 0
        """The latest numbers in a row, which are not counted yet, and the one that would be next."""
        self._disordered: int | None = None

    def add(self, step: int) -> None:
        if step == self._end and self._begin < self._end:
            self._end += 1
            self.last = max(self.last, step)
        else:
            self.add_run(step, 1)

    def add_run(self, first: int, count: int) -> None:
        """Add `count` numbers from `first` on."""
        if self._begin < self._end and first < self._end - 1 and self._disordered is None:
            self._disordered = first
        self._count()
        self._begin, self._end = first, first + count
        self.last = max(self.last, self._end - 1)

    def _count(self) -> None:
        if self._begin < self._end:
            self._counts.add_run(self._begin, self._end - self._begin)
            self._begin = self._end

    @property
    def total(self) -> int:
        """Numbers that were added."""
        return self._counts.total + self._end - self._begin

    def check(self, proof: Proof, done: int) -> None:
        """Check for steps 1 to `done`, each once, in order."""
        name = self._name
        self._count()
        for begin, end in self._counts.missing(1, done + 1):
            proof.wrong_range("gap", begin, end, lambda step: f"{name} has no lines of step {step}")
        beyond = []
        for begin, end, times in self._counts.ranges():
            if times > 1:
                told = f"{name} has {times} lines of step {{}}"
                proof.wrong_range("twice", max(1, begin), max(1, min(end, done + 1)), told.format)
            beyond += [*range(begin, min(end, 1))[:SHOWN], *range(max(begin, done + 1), end)[:SHOWN]]
        if beyond:
            proof.wrong("beyond", f"{name} has lines of steps {beyond[:SHOWN]}, and the run has {done} steps")
        if self._disordered is not None:
            proof.wrong("order", f"{name}: step {self._disordered} stands after later ones")


class _Ledger:
    """The lines of a ledger: each is checked when it is added, and what the other files should say is summed up."""

    def __init__(
        self,
        proof: Proof,
        config: Config,
        events: Sequence[Mapping[str, Any]],
        dataset: Dataset | None,
        checkpoints: Sequence[int],
    ) -> None:
        """Args: checkpoints: steps with a checkpoint, whose totals are summed up."""
        self._proof = proof
        self.config = config
        self._rules = Rules(config, events)
        self.records = RecordChecks(config.training, _recorded_from(events))
        self._stream = None if dataset is None else PromptStream(dataset.train, config.run.seed)
        self._blocks = BlockChecks(config, self._rules, self._stream)
        self._numbers = _Numbers("ledger.jsonl")
        self.samples = Occurrences()
        self.left_out: Counter[str] = Counter()
        """Samples by the rule that left them out."""
        self.batches_left_out: list[int] = []
        self.scorers: Counter[str] = Counter()
        self.staleness = 0
        self.metrics: dict[int, tuple[int, int, int, int]] = {}
        """Staleness, tokens, samples and samples left out, by step: what the metrics are compared with."""
        self._last_told = 0
        self._boundaries = sorted(set(checkpoints))
        self._sums = [[0, 0, 0] for _ in range(len(self._boundaries) + 1)]
        """Prompts, tokens trained and tokens drawn of the steps up to each boundary, without those up to the one before."""
        self._lacking: list[int] = []
        self._uneven: list[int] = []

    @property
    def block_lines(self) -> int:
        """Number of lines that `take` looks at together."""
        return self._blocks.lines

    def take(self, raw: Sequence[bytes]) -> bool:
        """Take the next lines, if they are sound; otherwise, return False, and each is to be added alone."""
        found = self._blocks.sound(raw, self.records.left_out)
        if found is None:
            return False
        size, siblings = self.config.training.batch_size, self.config.rollout.samples_per_prompt
        self._numbers.add_run(found.first, found.count)
        self.samples.add_run((found.first - 1) * size, found.count * size)
        self.left_out.update(found.rules)
        self.records.take(found.first, found.count, found.ranks)
        self.scorers.update(found.scorers)
        self.staleness = max(self.staleness, *found.staleness)
        self._last_told = found.steps[-1]
        for step, stale, drawn, kept, left_out in zip(
            found.steps, found.staleness, found.drawn, found.kept, found.left_out, strict=True
        ):
            self.metrics[step] = (stale, drawn, size, left_out)
            sums = self._sums[bisect_left(self._boundaries, step)]
            sums[0] += size // siblings
            sums[1] += kept
            sums[2] += drawn
        return True

    def add(self, line: Step) -> None:
        """Check the next line."""
        config = self.config
        self._numbers.add(line.step)
        self.samples.add(line.sample_ids)
        check_ids(self._proof, line, config.training.batch_size)
        self._rules.check(self._proof, line)
        self.left_out.update({rule: len(ids) for rule, ids in line.by_rule.items()})
        if line.is_left_out:
            self.batches_left_out.append(line.step)
        if line.outcomes is None:
            (self._lacking if line.lacks_outcomes else self._uneven).append(line.step)
            return
        check_outcomes(self._proof, line, config)
        self.records.check(self._proof, line)
        if self._stream is not None:
            check_prompts(self._proof, line, self._stream, config.rollout.samples_per_prompt)
        self._sum_up(line)

    def _sum_up(self, line: Step) -> None:
        scored = line.told.scored_by
        self.scorers.update(scored if isinstance(scored, list) else {scored: len(line.sample_ids)})
        self.staleness = max(self.staleness, line.staleness)
        self.metrics[line.step] = (line.staleness, line.drawn_tokens, len(line.sample_ids), len(line.dropped))
        self._last_told = line.step
        sums = self._sums[bisect_left(self._boundaries, line.step)]
        sums[0] += len(line.sample_ids) // self.config.rollout.samples_per_prompt
        sums[1] += line.kept_tokens
        sums[2] += line.drawn_tokens

    def close(self) -> None:
        """Check what only the whole file tells."""
        proof, batch_size = self._proof, self.config.training.batch_size
        done = self.config.training.steps if proof.state == "finished" else self._numbers.last
        self._numbers.check(proof, done)
        for begin, end in self.samples.missing(0, done * batch_size):
            proof.wrong_range("lost", begin, end, lambda id_: f"sample {id_}, of step {id_ // batch_size + 1}, has no outcome")
        for begin, end, times in self.samples.ranges():
            if times > 1:
                proof.wrong_range("twice", begin, end, f"sample {{}} stands there {times} times".format)
        if self._lacking and len(self._lacking) == self.num_steps:
            proof.notes.append("the ledger is of an older version: versions, tokens and prompts of its samples are not known")
        else:
            for step in self._lacking + self._uneven:
                proof.wrong("outcomes", f"step {step}: its line does not tell versions, tokens and prompt of every sample")
        if self.is_told:
            proof.notes += self.records.notes()
        for name in self.scorers.keys() - {*self.config.teachers, ""}:
            proof.wrong("scored", f"{self.scorers[name]} samples were scored by {name!r}, which is no teacher of the config")

    @property
    def num_steps(self) -> int:
        """Number of lines."""
        return self._numbers.total

    @property
    def last(self) -> int:
        """Last step of the ledger."""
        return self._numbers.last

    @property
    def last_told(self) -> int:
        """Step of the last line with outcomes."""
        return self._last_told

    @property
    def is_told(self) -> bool:
        """True if every line has outcomes, and there are lines."""
        return bool(self.metrics) and not self._lacking and not self._uneven

    def sums(self, step: int | None = None) -> tuple[int, int, int]:
        """Prompts, tokens trained and tokens drawn in the steps up to a checkpoint's; of all without one."""
        until = len(self._boundaries) if step is None else self._boundaries.index(step)
        *_, found = accumulate(self._sums[: until + 1], lambda one, other: [a + b for a, b in zip(one, other, strict=True)])
        return found[0], found[1], found[2]


# -------------------------------------------------------------------------------------------------------- other files


class _Metrics(msgspec.Struct):
    """Line of metrics.jsonl, of whose values those that are checked may be anything."""

    step: int
    staleness_max: Any = None
    response_tokens: Any = None
    filtered: Any = None


def _check_metrics(proof: Proof, ledger: _Ledger, path: Path, events: Sequence[Mapping[str, Any]]) -> bool:
    """Check for one line per step of the ledger, and for agreement of the numbers that both files have.

    Returns: True if there are lines.
    """
    numbers, unreadable = _Numbers("metrics.jsonl"), False

    def wrong(error: DataError) -> None:
        nonlocal unreadable
        unreadable = True
        proof.wrong("unreadable", str(error))

    bound, is_told = ledger.config.rollout.max_staleness, ledger.is_told
    for line, _ in stream(path, _Metrics, wrong):
        numbers.add(line.step)
        staleness = line.staleness_max
        if isinstance(staleness, int | float) and staleness > bound:
            proof.wrong("staleness", f"step {line.step}: staleness_max={staleness:g}; rollout.max_staleness={bound}")
        if is_told and (entry := ledger.metrics.get(line.step)) is not None:
            _compare(proof, line, *entry)
    if not unreadable:
        last, reached = ledger.last, numbers.last
        # A step's line is written to the ledger first; after a kill at that point, or during the write, the other is missing.
        # A resume takes lines back from metrics.jsonl first, and may be killed at that point too.
        cut = proof.state != "finished" and reached in (last - 1, _resumed_step(events)) and reached <= last
        numbers.check(proof, reached if cut else last)
    return numbers.total > 0


def _compare(proof: Proof, line: _Metrics, staleness: int, tokens: int, size: int, left_out: int) -> None:
    """Compare a line of the metrics with what the ledger has of its step."""
    mean, share = tokens / size if size else 0.0, left_out / size if left_out else None
    if (line.staleness_max, line.response_tokens, line.filtered) == (staleness, mean, share):
        return
    wanted = {
        "staleness_max": (line.staleness_max, float(staleness)),
        "response_tokens": (line.response_tokens, mean),
        "filtered": (line.filtered, share),
    }
    for name, (found, value) in wanted.items():
        alike = isinstance(found, int | float) and value is not None and math.isclose(found, value, rel_tol=1e-9)
        if not alike and not found is value is None:
            proof.wrong("metrics", f"step {line.step}: {name}={found}, and the ledger says {value}")


def _read_checkpoint(proof: Proof, marker: Path) -> dict[str, Any] | None:
    """Read step and totals of a checkpoint; None if its marker cannot be read."""
    try:
        progress = json.loads(marker.read_text(encoding="utf-8"))
        step, totals = progress["step"], progress["totals"]
        if type(step) is not int:
            raise TypeError(f"step={step!r}")
        return {"step": step} | {key: totals[key] for key in ("prompts_consumed", "trained_tokens", "tokens_generated")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        proof.wrong("checkpoint", f"{marker.parent.name}/{marker.name} cannot be read: {error!r}")
        return None


def _check_checkpoint(proof: Proof, marker: Path, progress: Mapping[str, Any], ledger: _Ledger) -> None:
    """Check that the totals of a checkpoint are those of its steps."""
    name, step = marker.parent.name, progress["step"]
    if not ledger.is_told or step > ledger.config.training.steps:
        return
    if step > ledger.last_told:
        if proof.state == "finished":
            proof.wrong("checkpoint", f"{name} has {step} steps, the ledger {ledger.last_told}")
        else:
            proof.notes.append(f"{name} is ahead of the ledger: the run goes on from an older one")
        return
    prompts, trained, drawn = ledger.sums(step)
    _agree(proof, "checkpoint", name, "prompts_consumed", progress["prompts_consumed"], prompts)
    _agree(proof, "checkpoint", name, "trained_tokens", progress["trained_tokens"], trained)
    _at_least(proof, "checkpoint", name, progress["tokens_generated"], drawn)


def _check_summary(
    proof: Proof, folder: RunFolder, ledger: _Ledger, events: Sequence[Mapping[str, Any]], dataset: Dataset | None
) -> None:
    """Check that the numbers of summary.json agree with the other files."""
    try:
        summary = folder.read_summary()
    except DataError as error:
        proof.wrong("summary", str(error))
        return
    config = ledger.config
    starts = [line for line in events if _kind(line) == "start"]
    samples = config.training.steps * config.training.batch_size
    _, trained, drawn = ledger.sums()
    wanted: dict[str, Any] = {
        "steps": config.training.steps,
        "lost_samples": sum(end - begin for begin, end in ledger.samples.missing(0, samples)),
        "duplicated_samples": ledger.samples.repeated,
        "prompts_consumed": samples // config.rollout.samples_per_prompt,
    }
    if starts:
        wanted["resumed_from_step"] = starts[-1].get("resumed_step")
    if dataset is not None:
        wanted["dropped_prompts"] = dataset.dropped
    if ledger.is_told and not config.training.finetune.steps:
        wanted["trained_tokens"] = trained
    for key, value in wanted.items():
        _agree(proof, "summary", "summary.json", key, summary.get(key, "nothing"), value)
    if ledger.is_told:
        _at_least(proof, "summary", "summary.json", summary.get("tokens_generated"), drawn)


def _agree(proof: Proof, kind: str, name: str, key: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        proof.wrong(kind, f"{name} says {key}={found}, the other files {wanted}")


def _at_least(proof: Proof, kind: str, name: str, generated: Any, drawn: int) -> None:
    """Check for at least the expected tokens: samples redrawn after a kill were generated twice, so more are consistent."""
    if not isinstance(generated, int) or generated < drawn:
        proof.wrong(kind, f"{name} says tokens_generated={generated}, and the ledger alone has {drawn}")


# --------------------------------------------------------------------------------------------------------- reporting


def _changed(event: Mapping[str, Any]) -> str:
    return f"{event.get('setting')} after step {event.get('step')}: {event.get('old')} -> {event.get('new')}"


def _facts(proof: Proof, ledger: _Ledger, told: Events, checkpoints: int) -> list[tuple[str, str]]:
    events = told.kept
    rules, samples, config = ledger.left_out, ledger.samples.total, ledger.config
    resumed = [line["resumed_step"] for line in events if _kind(line) == "start" and line.get("resumed_step") is not None]
    facts = [
        ("run", f"{proof.state}, {ledger.num_steps} of {config.training.steps} steps"),
        ("samples", f"{samples}, each with one outcome"),
        ("trained", f"{samples - sum(rules.values())}, each in its step"),
        ("left out", ", ".join(f"{count} by {rule}" for rule, count in rules.items()) or "0"),
    ]
    if batches := ledger.batches_left_out:
        facts.append(("batches left out", f"{len(batches)}, not finite: step {', '.join(map(str, batches[:SHOWN]))}"))
    if ledger.is_told:
        named = (f"{count} by {teacher}" if teacher else f"{count} not scored" for teacher, count in ledger.scorers.items())
        facts += [
            ("scored", ", ".join(named)),
            ("tokens trained", str(ledger.sums()[1])),
            ("ranks", ledger.records.described()),
            ("staleness", f"at most {ledger.staleness} of {config.rollout.max_staleness} steps"),
        ]
    facts += [
        ("metrics", "a line a step, as in the ledger"),
        ("checkpoints", str(checkpoints)),
        ("settings changed", "; ".join(_changed(line) for line in events if _kind(line) == CHANGED) or "none"),
        ("resumed", ", ".join(f"at step {step}" for step in resumed) or "never"),
        ("asked again", f"{told.rollouts['retry']} samples in {told.counts['retry']} retries"),
    ]
    return facts
