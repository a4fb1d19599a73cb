"""Reporting of a run: metrics.jsonl, events.jsonl, samples for inspection, the terminal, and trackers such as TensorBoard."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.text import Text

from kdray.data.token_texts import token_texts
from kdray.runs.folder import RunFolder, utc_now
from kdray.runs.reports.progress import progress_line
from kdray.runs.results.draws import Draw, write_draws
from kdray.runs.ticks import Ticks
from kdray.runs.tracking.trackers import DISTILL, Trackers
from kdray.types import Rollout, StepReport

SAMPLE_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),  # train, or the name of a held-out evaluation
        pa.field("step", pa.int64()),  # null for held-out samples
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("prompt_id", pa.int64(), nullable=False),
        pa.field("prompt", pa.string()),
        pa.field("response", pa.string()),
        pa.field("alpha", pa.float64(), nullable=False),
        pa.field("writer", pa.string()),  # writers of the response, in order
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("reverse_kl", pa.float64()),  # mean over the response, nats per token; null if it was not recorded
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        # Of the first tokens (`kdray.data.token_texts`): their texts, and KL(student || teacher) at each, nats; null at
        # tokens that an environment wrote. Both are null without a decoder or recorded KLs.
        pa.field("token_texts", pa.list_(pa.string())),
        pa.field("token_reverse_kl", pa.list_(pa.float32())),
        pa.field("reference", pa.string()),  # the prompt's reference answer; null if it has none
    ]
)

_PLAIN_LINE_EVERY_S = 30.0
_PACE_S = 10.0
"""Time after which the pace of a phase is known well enough to tell what is left of it."""
_GOES_ON = {"start": "preparing models", "starting": "starting engines", "serving": "starting the student"} | dict.fromkeys(
    ("finished", "failed", "interrupted"), "closing"
)
"""Events after which a run works on without steps to count, and at what."""
_ADVANCES = ("start", "serving", "parity", "signals", "evaluation", "checkpoint", "finished")
"""Events after which a run has come further, beside its steps."""
_SHOWN = {"start": ("resumed_step", "host")}
"""Fields of an event that the terminal shows, where it does not show all; the rest is in events.jsonl."""
_WAITS = {"rollout": "rollouts", "teacher": "scores", "sync": "weights"}
"""What the trainer waits for, by metric. Scores that come with a rollout are part of it: only later ones are `scores`."""


class RunReporter:
    """`Reporter` of a run.

    Args: total_steps: steps of the distillation phase.
          console: the terminal; if it is not interactive, a plain line every few steps replaces the progress bar.
          decode: token ids -> text, for the samples; without it they contain ids only.
          sample_every, sample_count: of every `sample_every`-th step, the first step and the last, the first
              `sample_count` rollouts are stored in samples/.
          trackers: the run's trackers, which the reporter starts and closes.
          line_every: steps between plain lines; default: a twentieth of the run. A line is printed after 30 s in any case.
    """

    def __init__(
        self,
        run_folder: RunFolder,
        total_steps: int,
        console: Console | None = None,
        *,
        decode: Callable[[np.ndarray], str] | None = None,
        sample_every: int = 10,
        sample_count: int = 8,
        line_every: int | None = None,
        trackers: Trackers | None = None,
    ) -> None:
        self._folder = run_folder
        self._total_steps = total_steps
        self._console = console or Console()
        self._decode = decode
        self._sample_every = sample_every
        self._sample_count = sample_count
        self._line_every = line_every or max(1, total_steps // 20)
        self._phase = ""
        self._phase_total = 0
        self._phase_from: tuple[int, float] | None = None
        """First step of the phase that was reported, and when."""
        self._last_line_at = -math.inf
        self._trackers = trackers
        self.references: Mapping[int, str] = {}
        """Reference answers by prompt id, stored with the samples; a prompt without one is not among them."""
        self._summary: Mapping[str, Any] | None = None
        self.advanced_at = time.monotonic()
        """Time of the latest step, or of the start or end of a part of the run, by `time.monotonic`."""
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._ticks = Ticks(self._tick)
        if self._console.is_terminal:
            self._progress = progress_line(self._console)
            self._progress.start()
        if self._trackers is not None:
            self._trackers.start(self.event)

    def phase(self, name: str, total: int) -> None:
        """Announce a phase (sft, distill, control, evaluation) of `total` steps or prompts, and restart the progress bar."""
        self.advanced_at = time.monotonic()
        self._record("phase", name=name, total=total)
        self._show_phase(name, total)

    def heard(self) -> None:
        """Note a sign of life between two steps."""
        self.advanced_at = time.monotonic()

    def preparing(self, what: str, done: int, total: int) -> None:
        """Show the progress of a model that is trained before the run: steps made, and in all. Only the terminal shows it."""
        name, self.advanced_at = f"prepare {what}", time.monotonic()
        if self._phase != name:
            self._show_phase(name, total)
            self._last_line_at = time.monotonic()
        self._ticks.now(f"{name} {done}/{total}")
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done)
        elif time.monotonic() - self._last_line_at > _PLAIN_LINE_EVERY_S:
            self._last_line_at = time.monotonic()
            self._print(f"{name} {done}/{total}")

    def _show_phase(self, name: str, total: int) -> None:
        self._phase, self._phase_total, self._last_line_at = name, total, -math.inf
        self._phase_from = None
        self._ticks.begin(f"{name} 0/{total}")
        if self._progress is None:
            self._print(f"{name}: {total} to do")
            return
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=total, values=())

    def phase_step(self, report: StepReport) -> None:
        """Report an optimizer step of a phase other than distillation: trackers and terminal, no line in metrics.jsonl."""
        line = _numbers(report)
        self._track(report.step, line)
        self._advance(report.step, line)

    def step(self, report: StepReport, metrics: Mapping[str, float]) -> None:
        """Write a step: the report's own numbers, its metrics, then the caller's, which take precedence."""
        line = {**_numbers(report), **metrics}
        self._folder.append_metrics({"step": report.step, "time": utc_now()} | line)
        if self._phase != DISTILL:
            self.phase(DISTILL, self._total_steps)
        self._track(report.step, line)
        self._advance(report.step, line)

    def event(self, kind: str, **fields: Any) -> None:
        """Write an event and show it."""
        if kind in _ADVANCES:
            self.advanced_at = time.monotonic()
        self._record(kind, **fields)
        if kind in _GOES_ON:
            self._begin(_GOES_ON[kind])
        shown = _SHOWN.get(kind, fields)
        self._print(" ".join([kind, *(f"{name}={_short(fields[name])}" for name in shown if name in fields)]))

    def _begin(self, what: str) -> None:
        """Start an activity of unknown length."""
        self._ticks.begin(what)
        if self._progress is not None:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(what, total=None, values=())

    def _tick(self, what: str, seconds: float) -> None:
        if self._progress is None:
            self._print(f"still {what}: {seconds:.0f} s")
        elif self._task is not None:
            self._progress.update(self._task, values=(f"{seconds:.0f} s",))

    def say(self, text: str) -> None:
        """Show a line that is no event."""
        self._print(text)

    def samples(self, rollouts: Sequence[Rollout], step: int) -> None:
        """Store the first rollouts of a step, if it is one whose samples are stored."""
        if not rollouts or (step % self._sample_every and step > 1 and step != self._total_steps):
            return
        self._write_samples(f"step-{step:08d}", [self._sample(r, "train", step) for r in rollouts[: self._sample_count]])

    def heldout_samples(self, rollouts: Sequence[Rollout], name: str) -> None:
        """Store the first rollouts of a held-out evaluation (before, after, control), replacing one of the same name."""
        self._write_samples(f"heldout-{name}", [self._sample(r, name, None) for r in rollouts[: self._sample_count]])

    def heldout_draws(self, draws: Sequence[Draw], name: str) -> None:
        """Store the numbers of every response of a held-out evaluation, replacing one of the same name."""
        write_draws(self._folder.evaluations / f"{name}.parquet", draws, self._folder.guard)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Keep the content of summary.json for the trackers, which receive it when they are closed."""
        self._summary = summary

    def close(self) -> None:
        """Release the terminal and close the trackers."""
        self._ticks.close()
        if self._progress is not None:
            self._progress.stop()
        if self._trackers is not None:
            self._trackers.close(self._summary)

    def _record(self, kind: str, **fields: Any) -> None:
        """Write an event without showing it."""
        self._folder.append_event(kind, **fields)
        if self._trackers is not None:
            self._trackers.event(kind, fields)

    def _track(self, step: int, line: Mapping[str, float]) -> None:
        if self._trackers is not None:
            self._trackers.log(step, line, self._phase)

    def _advance(self, completed: int, metrics: Mapping[str, float]) -> None:
        self.advanced_at = time.monotonic()
        values = _describe(metrics)
        if completed == self._phase_total:
            # What follows has no steps: weights travel, checkpoints are written, the student is measured.
            self._ticks.begin(f"finishing {self._phase}")
        else:
            self._ticks.now(f"{self._phase} {completed}/{self._phase_total}")
        if self._progress is not None:
            self._ticks.said()
            if self._task is not None:
                self._progress.update(self._task, completed=completed, values=values)
            return
        self._phase_from = self._phase_from or (completed, self.advanced_at)
        due = completed % self._line_every == 0 or completed == self._phase_total
        if due or time.monotonic() - self._last_line_at > _PLAIN_LINE_EVERY_S:
            self._last_line_at = time.monotonic()
            self._print(
                f"{self._phase} {completed}/{self._phase_total}{self._left(completed, *self._phase_from)}  "
                f"{'  '.join(values)}".rstrip()
            )

    def _left(self, completed: int, first: int, since: float) -> str:
        """Time left of the phase at its pace so far, as text; empty at its end, and as long as its pace is not known."""
        spent, made = self.advanced_at - since, completed - first
        if spent < _PACE_S or not made or completed >= self._phase_total:
            return ""
        return f", {timedelta(seconds=round(spent / made * (self._phase_total - completed)))} left"

    def _write_samples(self, name: str, rows: list[dict[str, Any]]) -> None:
        table = pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA)
        path = self._folder.samples / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".partial")
        pq.write_table(table, temporary)
        # As late as can be: a driver that another one replaces meanwhile must not replace its file.
        self._folder.guard()
        os.replace(temporary, path)

    def _sample(self, rollout: Rollout, source: str, step: int | None) -> dict[str, Any]:
        def text(token_ids: np.ndarray) -> str | None:
            return None if self._decode is None else self._decode(token_ids)

        kls = rollout.reverse_kl if rollout.reverse_kl is None else rollout.reverse_kl[rollout.is_target]
        return {
            "source": source,
            "step": step,
            "sample_id": rollout.sample_id,
            "prompt_id": rollout.prompt_id,
            "prompt": text(rollout.prompt_ids),
            "response": text(rollout.token_ids),
            "alpha": rollout.alpha,
            "writer": ", ".join(rollout.writers),
            "finish_reason": rollout.finish_reason,
            "reverse_kl": float(np.mean(kls)) if kls is not None and len(kls) else None,
            "token_ids": rollout.token_ids,
            "reference": self.references.get(rollout.prompt_id),
            **self._tokens(rollout),
        }

    def _tokens(self, rollout: Rollout) -> dict[str, Any]:
        """Columns of a sample that say what each of its first tokens is and how far the models are apart there."""
        if self._decode is None or rollout.reverse_kl is None:
            return {"token_texts": None, "token_reverse_kl": None}
        texts = token_texts(rollout.token_ids, self._decode)
        kls = zip(rollout.reverse_kl[: len(texts)].tolist(), rollout.is_target[: len(texts)].tolist(), strict=True)
        return {"token_texts": texts, "token_reverse_kl": [kl if chosen else None for kl, chosen in kls]}

    def _print(self, text: str) -> None:
        self._ticks.said()
        # Plain text, not markup: a path or a message may contain square brackets.
        self._console.print(Text(text), soft_wrap=True)


def _numbers(report: StepReport) -> dict[str, Any]:
    return {
        "loss": report.loss,
        "response_tokens": report.num_target_tokens,
        "grad_norm": report.grad_norm,
        "learning_rate": report.learning_rate,
        "train_step_s": report.seconds,
        **report.metrics,
    }


def _describe(metrics: Mapping[str, float]) -> list[str]:
    """Format the most important metrics as short texts, the most important first."""
    parts = [f"{name} {_short(metrics[name])}" for name in ("loss", "reverse_kl") if name in metrics]
    if "tokens_per_s" in metrics:
        parts.append(f"{_short(metrics['tokens_per_s'])} tokens/s")
    waits = [
        f"{what} {metrics[f'wait_{name}_s']:.2f}s" for name, what in _WAITS.items() if metrics.get(f"wait_{name}_s") is not None
    ]
    if waits:
        parts.append("waits " + " ".join(waits))
    return parts


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
