"""Supervised phases that are interrupted: the true runner over stub engines goes on from their last checkpoint."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cluster.jobs.supervision import newest_step
from cluster.parts import ConcurrentRuns
from kdray.config import Config
from kdray.config.teachers import SelfTeacherSettings
from kdray.errors import Interrupted
from kdray.rollouts.schedules import Schedules
from kdray.runs.checkpoints import newest_checkpoint
from kdray.runs.folder import RunFolder, read_lines
from kdray.runs.storage import Storage
from kdray.runs.verify import verify
from kdray.teachers.peers import peer_configs
from tests.support.stub_run import files_of, stub_config
from tests.support.stub_runner import StubGroup, StubRun

SFT, DISTILL = 8, 6


LONGEST_S = 20.0


def config_of(tmp_path: Path, name: str = "stub", teachers: dict[str, Any] | None = None, **training: Any) -> Config:
    settings = {"steps": DISTILL, "sft": {"steps": SFT, "batch_size": 8}, "keep_checkpoints": 2} | training
    sections: dict[str, Any] = {} if teachers is None else {"teachers": teachers}
    return stub_config(tmp_path, name, training=settings, data={"heldout_size": 6}, evaluation={"control": True}, **sections)


def checkpoints(config: Config) -> set[str]:
    return {path.name for path in RunFolder(config.run_folder).checkpoints.iterdir() if "-" in path.name}


def weights(config: Config) -> bytes:
    return (files_of(config.run_folder / "checkpoints" / f"step-{DISTILL:06d}") / "student.npy").read_bytes()


def curve(config: Config) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_lines(config.run_folder / "metrics.jsonl")]


@pytest.fixture
async def whole(tmp_path: Path) -> StubRun:
    """The run that nobody interrupts."""
    return await StubRun(config_of(tmp_path, "whole"))()


def assert_same(run: StubRun, whole: StubRun) -> None:
    """The same weights and numbers to the last bit, and nothing left of the supervised phases' checkpoints."""
    assert weights(run.config) == weights(whole.config)
    assert curve(run.config) == curve(whole.config)
    for name in ("before", "after", "control", "trained_tokens", "lost_samples", "duplicated_samples"):
        assert run.summary[name] == whole.summary[name], name
    ledgers = [(each.config.run_folder / "ledger.jsonl").read_bytes() for each in (run, whole)]
    assert ledgers[0] == ledgers[1]
    assert checkpoints(run.config) == {"step-000003", "step-000006"}
    assert verify(run.config.run_folder).problems == []


@pytest.mark.parametrize(("stop_at", "done"), [(5, 5), (8, 8)])
async def test_an_interrupted_warm_up_goes_on_where_it_was(tmp_path: Path, whole: StubRun, stop_at: int, done: int) -> None:
    config = config_of(tmp_path)
    with pytest.raises(Interrupted, match="stopped at step 5 of the supervised phase after" if done < SFT else "anything new"):
        await StubRun(config)(stop_at, "sft")
    assert checkpoints(config) == {"sft-000003", "sft-000005"} if done == 5 else {"sft-000006", "sft-000008"}
    resumed = await StubRun(config, resume=True)()
    assert [step for phase, step in resumed.group.trained if phase == "sft"] == list(range(done + 1, SFT + 1))
    assert_same(resumed, whole)


async def test_a_killed_warm_up_goes_on_from_its_last_checkpoint(
    tmp_path: Path, whole: StubRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path)
    train_step = StubGroup.train_step

    async def dies(self: StubGroup, batch: Any, *others: Any, **named: Any) -> Any:
        if (self.phase, batch.step) == ("sft", 8):
            raise RuntimeError("killed")
        return await train_step(self, batch, *others, **named)

    monkeypatch.setattr(StubGroup, "train_step", dies)
    with pytest.raises(RuntimeError, match="killed"):
        await StubRun(config)()
    monkeypatch.undo()
    folder = config.run_folder
    assert (newest_step(folder), newest_step(folder, "phase_step")) == (0, 6), "supervision sees no progress"
    resumed = await StubRun(config, resume=True)()
    assert [step for phase, step in resumed.group.trained if phase == "sft"] == [7, 8]
    assert_same(resumed, whole)


@pytest.mark.parametrize("steps", [5, 8])
async def test_a_resumed_run_of_another_length_keeps_its_schedules(tmp_path: Path, steps: int) -> None:
    schedules = {"rollout.alpha": {"type": "linear", "to": 0.05}}
    config = config_of(tmp_path, schedules=schedules)
    with pytest.raises(Interrupted):
        await StubRun(config)(3, "distill")
    await StubRun(config_of(tmp_path, schedules=schedules, steps=steps), resume=True)()
    found = [line["schedule/rollout.alpha"] for line in read_lines(config.run_folder / "metrics.jsonl")]
    course = Schedules.of(config)
    assert found == [course.at(step)["rollout.alpha"] for step in range(steps)]


async def test_an_interrupted_control_goes_on_where_it_was(tmp_path: Path, whole: StubRun) -> None:
    """And nothing before it is trained or measured again."""
    config = config_of(tmp_path)
    with pytest.raises(Interrupted, match="stopped at step 2 of the control after"):
        await StubRun(config)(2, "control")
    assert not RunFolder(config.run_folder).summary.exists()
    assert checkpoints(config) == {"step-000003", "step-000006", "control-000002"}
    resumed = await StubRun(config, resume=True)()
    assert {phase for phase, _ in resumed.group.trained} == {"control"}
    of_control = [step for phase, step in whole.group.trained if phase == "control"]
    assert [step for _, step in resumed.group.trained] == of_control[2:]
    assert_same(resumed, whole)


async def test_without_checkpoints_in_between_an_interruption_still_writes_one(tmp_path: Path, whole: StubRun) -> None:
    config = config_of(tmp_path, checkpoint_every=0)
    with pytest.raises(Interrupted):
        await StubRun(config)(4, "sft")
    assert checkpoints(config) == {"sft-000004"}
    found = newest_checkpoint([Storage.local(config.run_folder)])[0]
    assert found is not None
    assert (found.step, found.progress["stage"], found.progress["phase_step"]) == (0, "sft", 4)
    resumed = await StubRun(config, resume=True)()
    assert weights(resumed.config) == weights(whole.config)


SELF = {"toy": SelfTeacherSettings(type="self", every=2, decay=0.5)}
PEER = {"toy": {"type": "peer", "model": {"type": "tiny", "seed": 1}}}


def with_average(tmp_path: Path, name: str) -> Config:
    """Such a teacher needs prompts or answers of its own to teach anything, which stub engines do not read."""
    return config_of(tmp_path, name).model_copy(update={"teachers": SELF})


async def test_an_interrupted_control_goes_on_with_the_average_that_is_its_teacher(tmp_path: Path) -> None:
    whole = await StubRun(with_average(tmp_path, "whole"))()
    config = with_average(tmp_path, "stub")
    with pytest.raises(Interrupted, match="stopped at step 2 of the control after"):
        await StubRun(config)(2, "control")
    resumed = await asyncio.wait_for(StubRun(config, resume=True)(), LONGEST_S)
    assert {phase for phase, _ in resumed.group.trained} == {"control"}
    assert_same(resumed, whole)


async def beside_a_peer(main: Config, resume: bool = False, stop_at: int | None = None) -> tuple[StubRun, StubRun]:
    """The run and its peer's, whose students teach each other. Args: stop_at: step of the control that both are stopped in."""
    beside = ConcurrentRuns(["", "toy"])
    (peer,) = peer_configs(main, {"toy": "some/peer"}, "some/student").values()
    one, other = StubRun(main, resume, beside=beside), StubRun(peer, resume, name="toy", beside=beside)
    one.peer, other.peer = other, one
    await asyncio.wait_for(asyncio.gather(one(stop_at, "control"), other()), LONGEST_S)
    return one, other


async def test_an_interrupted_control_beside_peers_goes_on_and_they_have_their_teacher_again(tmp_path: Path) -> None:
    """The peer, which had ended, too, is measured again: beside the student that it learned from, not beside its control."""
    whole, other = await beside_a_peer(config_of(tmp_path, "whole", teachers=PEER))
    config = config_of(tmp_path, teachers=PEER)
    with pytest.raises(Interrupted, match="stopped at step 2 of the control after"):
        await beside_a_peer(config, stop_at=2)
    resumed, peer = await beside_a_peer(config, resume=True)
    assert {phase for phase, _ in resumed.group.trained} == {"control"}
    assert peer.group.trained == []
    assert_same(resumed, whole)
    assert peer.summary["after"] == other.summary["after"]
    assert weights(peer.config) == weights(other.config)


async def test_a_run_that_is_stopped_before_its_control_has_no_results_yet(tmp_path: Path, whole: StubRun) -> None:
    """A resume measures the student again, and trains the control."""
    config = config_of(tmp_path)
    run = StubRun(config)
    with pytest.raises(Interrupted, match="anything new"):
        await run(DISTILL, "distill")
    assert not RunFolder(config.run_folder).summary.exists()
    assert_same(await StubRun(config, resume=True)(), whole)
