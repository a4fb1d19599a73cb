"""What a run's files cost as it grows: `python -m benchmarks.growth [STEPSxBATCH ...]`.

Plants the folder of a killed run on two ranks, with a checkpoint 10 steps before its end, and measures on it, each in a process
of its own: sending it to `run.storage` at every checkpoint, from its first step on; `kdray verify`; restoring the files at a
resume, without and with a storage; the counts at the end of a run; the report. Seconds are of the CPU, so that other work on
the machine does not count; memory is the process's peak, with everything that it has imported. Prints a row for each size and
writes benchmarks/results/.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import shutil
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from kdray.config import Config, parse_config
from kdray.data.dataset import PromptStream, load_dataset
from kdray.models.resolve import task_tokenizer
from kdray.rollouts.schedules import Schedules
from kdray.runs.folder import RunFolder
from kdray.runs.ledger import Ledger, Totals, ledger_line
from kdray.runs.metrics import METRICS
from kdray.runs.remote_copy import StoredRun
from kdray.runs.report import write_report
from kdray.runs.resume import final_counts, restore_run_state
from kdray.runs.training_record import as_ranges
from kdray.runs.verify import verify

SIZES = ("1000x64", "10000x64", "100000x64", "10000x512", "100000x512")
CHECKPOINT_EVERY = 50
KILLED_AFTER = 10
"""Steps between the last checkpoint and the kill."""
HEDGES = 4
"""Calls of a step that were hedged: an event each."""
RANKS, SIBLINGS, STALENESS, TOKENS = 2, 4, 2, 64
COLUMNS = (
    "ledger MB", "metrics MB", "events MB", "bytes sent / size", "verify s", "verify MiB", "µs a sample",
    "resume s", "resume MiB", "with storage s", "with storage MiB", "end s", "end MiB", "report s", "report MiB",
)  # fmt: skip


def recipe(output: Path, steps: int, batch_size: int, name: str = "planted", storage: str | None = None) -> Config:
    """Config of the planted run."""
    return parse_config(
        {
            "run": {"name": name, "output": str(output), "storage": storage},
            "data": {"prompts": {"type": "task", "size": 2_000}, "heldout_size": 4},
            "student": {"model": {"type": "tiny"}},
            "teachers": {"toy": {"model": {"type": "tiny", "layers": 4}}},
            "rollout": {"samples_per_prompt": SIBLINGS, "max_staleness": STALENESS, "filters": {"distinct": True}},
            "training": {"steps": steps, "batch_size": batch_size, "checkpoint_every": CHECKPOINT_EVERY, "ranks": RANKS},
        }
    )


class Planted:
    """Lines of a run in which everything went well, two samples of every tenth step left out."""

    def __init__(self, config: Config) -> None:
        self._batch = config.training.batch_size
        self._dataset = load_dataset(config, task_tokenizer())
        self._stream = PromptStream(self._dataset.train, config.run.seed)
        self._random = np.random.default_rng(0)
        self.trained = self.drawn = 0

    def lines(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Lines of a step for ledger and metrics."""
        first, batch = (step - 1) * self._batch, self._batch
        ids = list(range(first, first + batch))
        prompts = [self._stream.at(first // SIBLINGS + index).prompt_id for index in range(batch // SIBLINGS)]
        tokens = self._random.integers(1, TOKENS, batch)
        newest = max(0, step - 2)
        oldest = np.maximum(0, newest - self._random.integers(0, 2, batch))
        dropped = {ids[0]: "distinct", ids[1]: "distinct"} if step % 10 == 0 else {}
        rank_of = self._random.permutation(batch) % RANKS
        kept = tokens.copy()
        kept[: len(dropped)] = 0
        shards = []
        for rank in range(RANKS):
            own = np.flatnonzero(rank_of == rank)
            record = {
                "samples": as_ranges(own.tolist()),
                "digest": f"{step * RANKS + rank:032x}",
                "targets": int(kept[own].sum()),
            }
            shards.append(record | {"updates": step})
        self.trained += int(kept.sum())
        self.drawn += int(tokens.sum())
        facts = {
            "prompt_ids": [prompt for prompt in prompts for _ in range(SIBLINGS)],
            "tokens": tokens.tolist(),
            "oldest": oldest.tolist(),
            "newest": newest,
            "scored_by": "toy",
            "responses_sha256": f"{step:064x}",
            "trained_tokens": int(kept.sum()),
            "dealt": rank_of.tolist(),
            "dealt_digests": [shard["digest"] for shard in shards],
            "trained": shards,
        }
        numbers = {name: float(value) for name, value in zip(METRICS, self._random.random(len(METRICS)), strict=True)}
        numbers |= {"staleness_max": float(step - 1 - oldest.min()), "response_tokens": float(tokens.sum() / batch)}
        numbers["filtered"] = len(dropped) / batch
        if not dropped:
            del numbers["filtered"]
        metrics = {"step": step, "time": "2026-01-01T00:00:00.000+00:00"} | dict(list(numbers.items())[:60])
        return ledger_line(step, ids, dropped, facts), metrics


def plant(output: Path, steps: int, batch_size: int) -> Path:
    """Write the folder of a run that was killed `KILLED_AFTER` steps after a checkpoint."""
    config = recipe(output, steps + CHECKPOINT_EVERY, batch_size)
    folder = RunFolder.create(config)
    planted = Planted(config)
    progress: dict[str, Any] = {}
    folder.append_event("start", resumed_step=None)
    with (folder.path / "ledger.jsonl").open("w") as ledger, folder.metrics.open("w") as metrics:
        for step in range(1, steps + 1):
            for file, line in zip((ledger, metrics), planted.lines(step), strict=True):
                file.write(json.dumps(line) + "\n")
            for _ in range(HEDGES):
                folder.append_event("hedge", pool="toy", call="sample", rollouts=batch_size // HEDGES)
            if step % CHECKPOINT_EVERY == 0:
                folder.append_event("checkpoint", step=step)
            if step == steps - KILLED_AFTER:
                totals = {"prompts_consumed": step * batch_size // SIBLINGS, "trained_tokens": planted.trained}
                totals |= {"tokens_generated": planted.drawn, "tokens_scored": planted.drawn}
                progress = {"step": step, "totals": totals, "schedules": Schedules.of(config).state()}
    marker = folder.checkpoints / f"step-{progress['step']:06d}" / "COMMITTED.json"
    marker.parent.mkdir()
    marker.write_text(json.dumps(progress | {"files": {}}))
    return folder.path


def send(run: Path, output: Path, steps: int, batch_size: int) -> float:
    """Grow a run as `run` did, sending it at every checkpoint and at the end; return bytes sent as a share of the size."""
    storage = output / "storage"
    storage.mkdir()
    stored = StoredRun.of(recipe(output, steps, batch_size, "sent", storage.as_uri()))
    assert stored is not None
    names = ("ledger.jsonl", "metrics.jsonl")
    stored.folder.path.mkdir()
    stored.folder.config.write_text("run: {name: sent}\n")
    sent = 0
    sources = [(run / name).open("rb") for name in names]
    for step in range(1, steps + 1):
        for source, name in zip(sources, names, strict=True):
            with (stored.folder.path / name).open("ab") as file:
                file.write(source.readline())
        if step % CHECKPOINT_EVERY == 0 or step == steps:
            sent += stored.send()
    return sent / sum((run / name).stat().st_size for name in names)


def restore(run: Path, steps: int, batch_size: int) -> None:
    """Restore the files as a resume does: all that reads or writes them before the first step."""
    config = recipe(run.parent, steps + CHECKPOINT_EVERY, batch_size)
    progress = json.loads(next(run.glob("checkpoints/*/COMMITTED.json")).read_text())
    folder = RunFolder.create(config, resume=True, step=progress["step"])
    ledger = Ledger(folder.path / "ledger.jsonl")
    start, _ = restore_run_state(folder, ledger, Schedules.of(config), config.training.steps, progress)
    assert start == steps - KILLED_AFTER
    assert ledger.not_finite_steps() == []


def restore_from_storage(run: Path, storage: Path, steps: int, batch_size: int) -> None:
    """Compare the local files with those of a storage as a resume does, which keeps them, and restore them."""
    config = recipe(run.parent, steps + CHECKPOINT_EVERY, batch_size, storage=storage.as_uri())
    stored = StoredRun.of(config)
    assert stored is not None
    assert not stored.fetch(steps - KILLED_AFTER)
    restore(run, steps, batch_size)
    stored.send()


def end(run: Path, steps: int, batch_size: int) -> None:
    """Count the samples as at the end of a run."""
    counts = final_counts(Ledger(run / "ledger.jsonl"), Totals(), recipe(run.parent, steps - KILLED_AFTER, batch_size))
    assert (counts["lost_samples"], counts["duplicated_samples"]) == (0, 0), counts


def prove(run: Path) -> None:
    """Verify the run."""
    proof = verify(run)
    assert proof.problems == [], proof.described()


def store(run: Path, output: Path, steps: int, batch_size: int) -> Path:
    """Send the run whole to a storage of its own."""
    storage = output / "stored"
    storage.mkdir()
    stored = StoredRun.of(recipe(run.parent, steps, batch_size, storage=storage.as_uri()))
    assert stored is not None
    stored.send()
    return storage


def _child(work: Callable[..., Any], arguments: tuple[Any, ...], answer: Any) -> None:
    started = time.process_time()
    work(*arguments)
    answer.put((time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def measured(work: Callable[..., Any], *arguments: Any) -> tuple[float, float]:
    """Run work in a fresh process; return its seconds and peak MiB."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_child, args=(work, arguments, answer))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{work.__name__} failed")
    seconds, peak = answer.get()
    return seconds, peak


def row(size: str, with_sending: bool) -> dict[str, float]:
    """Measure one size."""
    steps, batch_size = map(int, size.split("x"))
    with TemporaryDirectory(prefix="growth-") as name:
        output = Path(name)
        run = plant(output, steps, batch_size)
        found = {
            "ledger MB": (run / "ledger.jsonl").stat().st_size / 1e6,
            "metrics MB": (run / "metrics.jsonl").stat().st_size / 1e6,
            "events MB": (run / "events.jsonl").stat().st_size / 1e6,
        }
        if with_sending:
            found["bytes sent / size"] = send(run, output, steps, batch_size)
        found["verify s"], found["verify MiB"] = measured(prove, run)
        found["µs a sample"] = found["verify s"] / steps / batch_size * 1e6
        found["report s"], found["report MiB"] = measured(write_report, run)
        # What a resume drops is trained again.
        again = Path(shutil.copytree(run, output / "again" / run.name))
        storage = store(run, output, steps, batch_size)
        arguments = run, storage, steps, batch_size
        found["with storage s"], found["with storage MiB"] = measured(restore_from_storage, *arguments)
        found["resume s"], found["resume MiB"] = measured(restore, again, steps, batch_size)
        found["end s"], found["end MiB"] = measured(end, again, steps, batch_size)
        return {column: found[column] for column in COLUMNS if column in found}


def main() -> None:
    """Print the table and write it down."""
    arguments = sys.argv[1:]
    with_sending = "--no-sending" not in arguments
    rows = {}
    for size in [argument for argument in arguments if not argument.startswith("-")] or SIZES:
        rows[size] = row(size, with_sending)
        print(size, *(f"{column}: {value:.4g}" for column, value in rows[size].items()), sep="  ", flush=True)
    results = Path(__file__).parent / "results" / "growth.json"
    results.write_text(json.dumps({"date": datetime.now(UTC).date().isoformat(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
