"""SIGKILL of the driver at random moments: what the files say in the end is what an undisturbed run's say.

The driver is `tests.support.stub_run`: the true loop, ledger, reporter, run folder and resume over small exact models.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from kdray.config import Config
from kdray.runs.verify import verify
from tests.support.stub_run import files_of, main, stub_config

KILLS = 20


@pytest.fixture(scope="module")
def forked() -> Any:
    """Processes that begin with everything imported: a driver's life is then mostly training."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.stub_run", "torch.utils.tensorboard", "transformers"])
    return context


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def recipe(folder: Path, config: Config) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(config.dump())
    return path


def undisturbed(forked: Any, folder: Path, **sections: Any) -> Path:
    config = stub_config(folder, "whole", **sections)
    driver = forked.Process(target=main, args=(recipe(folder, config),))
    driver.start()
    driver.join(120)
    assert driver.exitcode == 0
    return config.run_folder


def moments(seed: int, steps: int) -> Iterator[tuple[int, float]]:
    """(steps that are done, seconds after that) at which a driver dies; a third of them, with 0 steps, while it starts.

    Enough steps are left for a driver not to end by itself on a busy machine.
    """
    rng = np.random.default_rng(seed)
    for reached in sorted(rng.integers(1, steps - 15, size=KILLS).tolist()):
        yield (0, rng.uniform(0.0, 0.3)) if rng.random() < 0.33 else (reached, rng.uniform(0.0, 0.04))


def starts(run: Path) -> list[dict[str, Any]]:
    """The lines of every driver that had begun to train; a line that was being written when it died does not count."""
    events = run / "events.jsonl"
    lines = events.read_text().split("\n")[:-1] if events.exists() else []
    return [entry for entry in map(json.loads, lines) if entry["kind"] == "start"]


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def dying_driver(recipe: Path, run: Path, reached: int, wait_s: float) -> None:
    """A driver with a thread that kills it: a watcher in another process may get its turn too late on a busy machine."""
    before = len(starts(run))

    def die() -> None:
        # An earlier driver may have done as many steps already: this one's own start is waited for too.
        while reached and (len(starts(run)) == before or lines_of(run / "ledger.jsonl") < reached):
            time.sleep(0.001)
        time.sleep(wait_s)
        os.kill(os.getpid(), signal.SIGKILL)

    Thread(target=die, daemon=True).start()
    main(recipe)


def killed_and_resumed(forked: Any, folder: Path, seed: int, **sections: Any) -> Path:
    """A run whose driver dies at each of the moments, and then ends."""
    config = stub_config(folder, "killed", **sections)
    path, run = recipe(folder, config), config.run_folder
    going = 0
    for reached, wait_s in moments(seed, config.training.steps):
        driver = forked.Process(target=dying_driver, args=(path, run, reached, wait_s))
        driver.start()
        driver.join(120)
        assert driver.exitcode == -signal.SIGKILL
        going += reached > 0
        # A folder is consistent after every death, too: nobody has to resume it to see what it did.
        if (run / "events.jsonl").exists():
            assert verify(run).problems == []
    assert len(starts(run)) >= going > KILLS / 2
    driver = forked.Process(target=main, args=(path,))
    driver.start()
    driver.join(120)
    assert driver.exitcode == 0
    return run


def trained_prompts(run: Path) -> Counter[tuple[int, int]]:
    """(prompt id, sample id) of everything that was trained, as often as it was."""
    counts: Counter[tuple[int, int]] = Counter()
    for line in json_lines(run / "ledger.jsonl"):
        left_out = {sample_id for ids in line.get("dropped", {}).values() for sample_id in ids}
        pairs = zip(line["prompt_ids"], line["sample_ids"], strict=True)
        counts.update((prompt_id, sample_id) for prompt_id, sample_id in pairs if sample_id not in left_out)
    return counts


def test_a_driver_killed_20_times_ends_with_the_same_prompts_and_the_same_curve(forked: Any, tmp_path: Path) -> None:
    whole, killed = undisturbed(forked, tmp_path), killed_and_resumed(forked, tmp_path, seed=1)
    assert trained_prompts(killed) == trained_prompts(whole)
    # Bit for bit: losses as they are written, and all that happened to every sample.
    curves = [
        [(line["step"], line["loss"], line["reverse_kl"]) for line in json_lines(run / "metrics.jsonl")]
        for run in (whole, killed)
    ]
    assert curves[0] == curves[1]
    assert (killed / "ledger.jsonl").read_text() == (whole / "ledger.jsonl").read_text()
    proof = verify(killed)
    assert (proof.state, proof.problems, proof.notes) == ("finished", [], [])
    assert len({line["resumed_step"] for line in starts(killed)}) > 4


def test_with_staleness_the_same_prompts_are_trained_once(forked: Any, tmp_path: Path) -> None:
    """Which version draws a sample depends on time there, and so do its tokens; nothing else does."""
    sections = {"rollout": {"max_staleness": 2, "filters": {"finished": False}}}
    whole = undisturbed(forked, tmp_path, **sections)
    killed = killed_and_resumed(forked, tmp_path, seed=2, **sections)
    assert trained_prompts(killed) == trained_prompts(whole)
    assert [line["step"] for line in json_lines(killed / "metrics.jsonl")] == list(range(1, 41))
    assert verify(killed).problems == []
    assert any(line["staleness_max"] for line in json_lines(killed / "metrics.jsonl"))


def test_a_kill_within_a_save_leaves_the_checkpoint_before_it_to_resume_from(forked: Any, tmp_path: Path) -> None:
    whole = undisturbed(forked, tmp_path)
    config = stub_config(tmp_path, "torn")
    path, checkpoints = recipe(tmp_path, config), config.run_folder / "checkpoints"
    driver = forked.Process(target=main, args=(path,))
    driver.start()
    deadline = time.monotonic() + 120
    while not (torn := [f for f in checkpoints.glob("step-0000[1-9]*") if not (f / "COMMITTED.json").exists()]):
        assert driver.is_alive()
        assert time.monotonic() < deadline
    driver.kill()
    driver.join()
    assert driver.exitcode == -signal.SIGKILL
    driver = forked.Process(target=main, args=(path,))
    driver.start()
    driver.join(120)
    weights = [np.load(files_of(run / "checkpoints/step-000040") / "student.npy") for run in (whole, config.run_folder)]
    np.testing.assert_array_equal(*weights)
    assert all((f / "COMMITTED.json").exists() for f in checkpoints.glob("step-*")), torn
