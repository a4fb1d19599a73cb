"""The mailbox of the student ranks: a log of commands, and what is left of it after a checkpoint. No Ray is started."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from actors.student.group import StudentGroup
from actors.student.lost_ranks import LostRanks
from actors.student.mailbox import Command, Mailbox
from actors.student.trainer import Phase
from kdray.config import TrainingSettings
from kdray.errors import NoRoomForRanks, StorageError, TrainingError
from kdray.models.saving import TokenizerSource
from tests.support.local_actors import Handle

WARMUP = Phase("sft", "base", None, None, 1e-3, 10)
DISTILL = Phase("distill", "base", None, None, 1e-4, 20)


async def within_turns(task: asyncio.Task[Any], number: int = 10) -> bool:
    """Whether the task ends by itself within a few turns of the loop."""
    for _ in range(number):
        await asyncio.sleep(0)
    return task.done()


async def answer_all(mailbox: Mailbox, index: int, world_size: int = 2) -> None:
    for rank in range(world_size):
        await mailbox.answer(index, rank, f"command {index} of rank {rank}")


async def saved_mailbox() -> tuple[Mailbox, int]:
    """A mailbox after phase, train, save, all answered by two ranks; and the index of the save."""
    mailbox = Mailbox(world_size=2)
    for command in (Command("phase", phase=WARMUP), Command("train"), Command("save", checkpoint="step-1")):
        index = await mailbox.post(command)
        await answer_all(mailbox, index)
    return mailbox, index


async def test_commands_are_served_in_order_to_every_rank_at_its_own_pace() -> None:
    mailbox = Mailbox(world_size=2)
    commands = [Command("phase", phase=WARMUP), Command("train"), Command("publish", version=1)]
    assert [await mailbox.post(command) for command in commands] == [0, 1, 2]
    assert [await mailbox.command(index) for index in range(3)] == commands
    assert await mailbox.command(0) is commands[0]  # the other rank has only begun


async def test_an_order_is_waited_for() -> None:
    mailbox = Mailbox(world_size=1)
    waiting = asyncio.ensure_future(mailbox.command(1))
    await mailbox.post(Command("phase", phase=WARMUP))
    assert not await within_turns(waiting)
    command = Command("publish", version=1)
    await mailbox.post(command)
    assert await asyncio.wait_for(waiting, 1) is command


async def test_a_result_is_rank_0_s_once_all_ranks_have_answered() -> None:
    mailbox = Mailbox(world_size=3)
    index = await mailbox.post(Command("train"))
    waiting = asyncio.ensure_future(mailbox.result(index))
    await mailbox.answer(index, 0, "report")
    await mailbox.answer(index, 2, None)
    assert not await within_turns(waiting)
    await mailbox.answer(index, 2, None)  # the same rank again is not the third
    assert not await within_turns(waiting)
    await mailbox.answer(index, 1, None)
    assert await asyncio.wait_for(waiting, 1) == "report"


async def test_the_error_of_one_rank_is_the_result_at_once() -> None:
    """The other one may wait for it inside the command, for ever."""
    mailbox = Mailbox(world_size=2)
    index = await mailbox.post(Command("save", checkpoint="step-1"))
    await mailbox.answer(index, 1, StorageError("rank 1: full"))
    result = await asyncio.wait_for(mailbox.result(index), 1)
    assert isinstance(result, StorageError)
    await mailbox.answer(index, 0, None)
    assert await mailbox.start(0) == (0, None, None), "nothing was committed"


async def test_the_first_answer_wins_in_a_replay() -> None:
    mailbox = Mailbox(world_size=2)
    index = await mailbox.post(Command("train"))
    await mailbox.answer(index, 0, "first")
    await mailbox.answer(index, 0, "replayed")
    await mailbox.answer(index, 1, None)
    assert await mailbox.result(index) == "first"
    await mailbox.answer(index, 0, "replayed again")
    assert await mailbox.result(index) == "first"


async def test_before_any_save_the_start_is_the_beginning() -> None:
    mailbox = Mailbox(world_size=2)
    await mailbox.post(Command("phase", phase=WARMUP))
    await mailbox.post(Command("train"))
    await answer_all(mailbox, 0)
    assert await mailbox.start(0) == (0, None, None)


async def test_a_save_that_not_all_ranks_answered_moves_nothing() -> None:
    mailbox = Mailbox(world_size=2)
    await mailbox.post(Command("phase", phase=WARMUP))
    index = await mailbox.post(Command("save", checkpoint="step-0"))
    await mailbox.answer(index, 0, None)
    await mailbox.answer(index, 0, None)
    assert await mailbox.start(0) == (0, None, None)


async def test_after_a_save_the_start_is_behind_it_with_its_phase_and_checkpoint() -> None:
    mailbox, save = await saved_mailbox()
    assert await mailbox.start(1) == (save + 1, WARMUP, "step-1")
    assert await mailbox.result(save) == f"command {save} of rank 0"
    # Orders after it count on, and are there for whoever starts from it.
    after = Command("publish", version=2)
    assert await mailbox.post(after) == save + 1
    assert await mailbox.command(save + 1) is after


async def test_commands_before_a_save_are_dropped_and_late_answers_to_them_ignored() -> None:
    mailbox, save = await saved_mailbox()
    dropped = asyncio.ensure_future(mailbox.command(save - 1))
    assert not await within_turns(dropped)
    dropped.cancel()
    await mailbox.answer(save - 1, 0, "late")
    forgotten = asyncio.ensure_future(mailbox.result(save - 1))
    assert not await within_turns(forgotten)
    forgotten.cancel()


async def test_the_phase_of_a_save_is_the_last_one_before_it() -> None:
    mailbox, _ = await saved_mailbox()
    await answer_all(mailbox, await mailbox.post(Command("phase", phase=DISTILL)))
    # Until a save in the new phase, a restart walks from the old save, through the new phase's command.
    assert (await mailbox.start(0))[1:] == (WARMUP, "step-1")
    save = await mailbox.post(Command("save", checkpoint="step-2"))
    await mailbox.post(Command("phase", phase=WARMUP))  # posted after it: not its phase
    await answer_all(mailbox, save)
    assert await mailbox.start(0) == (save + 1, DISTILL, "step-2")


async def opened_mailbox() -> tuple[Mailbox, list[int]]:
    """A mailbox after phase, open, train, publish, all answered by two ranks; and the indices of these."""
    mailbox = Mailbox(world_size=2)
    commands = (
        Command("phase", phase=DISTILL),
        Command("train"),
        Command("open", checkpoint="step-1"),
        Command("train"),
        Command("publish", version=2),
    )
    indices = []
    for command in commands:
        indices.append(await mailbox.post(command))
        await answer_all(mailbox, indices[-1])
    return mailbox, indices


async def test_an_open_checkpoint_is_where_nobody_starts() -> None:
    mailbox, _ = await opened_mailbox()
    assert await mailbox.start(0) == (0, None, None)


async def test_after_its_commit_ranks_start_where_it_was_opened_and_repeat_what_followed() -> None:
    mailbox, indices = await opened_mailbox()
    commit = await mailbox.post(Command("commit"))
    await mailbox.answer(commit, 0, None)
    assert await mailbox.start(0) == (0, None, None), "one rank has not committed"
    await mailbox.answer(commit, 1, None)
    assert await mailbox.start(0) == (indices[2] + 1, DISTILL, "step-1")
    followed = [(await mailbox.command(index)).kind for index in range(indices[2] + 1, commit + 1)]
    assert followed == ["train", "publish", "commit"]
    dropped = asyncio.ensure_future(mailbox.command(indices[1]))
    assert not await within_turns(dropped)
    dropped.cancel()
    # The next one replaces it as a whole.
    await answer_all(mailbox, await mailbox.post(Command("open", checkpoint="step-2")))
    last = await mailbox.post(Command("commit"))
    await answer_all(mailbox, last)
    assert await mailbox.start(0) == (last, DISTILL, "step-2")


async def test_a_commit_is_due_once_the_files_of_all_ranks_are_stored() -> None:
    mailbox, _ = await opened_mailbox()
    waiting = asyncio.ensure_future(mailbox.stored())
    await mailbox.note_stored(1)
    await mailbox.note_stored(1)
    assert not await within_turns(waiting)
    await mailbox.note_stored(0)
    await asyncio.wait_for(waiting, 1)
    await mailbox.post(Command("open", checkpoint="step-2"))
    again = asyncio.ensure_future(mailbox.stored())
    assert not await within_turns(again)
    again.cancel()


async def test_replaying_after_a_loss_walks_the_same_commands() -> None:
    mailbox, save = await saved_mailbox()
    commands = [Command("train", version=number) for number in range(3)]
    for command in commands:
        await mailbox.post(command)
    await answer_all(mailbox, save + 1)
    await mailbox.answer(save + 2, 0, "from before the loss")  # rank 1 is lost here
    index, phase, checkpoint = await mailbox.start(0)
    assert (phase, checkpoint) == (WARMUP, "step-1")
    for command in commands:
        assert await mailbox.command(index) is command
        await answer_all(mailbox, index)
        index += 1
    assert await mailbox.result(save + 2) == "from before the loss"
    assert await mailbox.result(save + 3) == f"command {save + 3} of rank 0"


async def test_restarts_count_groups_not_ranks() -> None:
    mailbox = Mailbox(world_size=2)
    assert await mailbox.restarts() == 0
    for restarts in range(3):
        await mailbox.start(1)
        await mailbox.start(0)
        assert await mailbox.restarts() == restarts


class Losses:
    """Ray Train's controller and the driver, as the mailbox of a run with one rank sees them."""

    def __init__(self, max_restarts: int) -> None:
        self.mailbox = Mailbox(world_size=1, max_restarts=max_restarts)

    async def do(self, *kinds: str) -> None:
        for kind in kinds:
            command = Command("phase", phase=WARMUP) if kind == "phase" else Command(kind, checkpoint="step-1")
            await answer_all(self.mailbox, await self.mailbox.post(command), world_size=1)

    async def replay(self) -> None:
        """What a rank does that starts again, up to the newest command."""
        index, _, _ = await self.mailbox.start(0)
        while index < self.mailbox._next:
            await answer_all(self.mailbox, index, world_size=1)
            index += 1

    async def lose(self, counts: bool = True) -> str | None:
        refused = await self.mailbox.lost("rank 0: killed", counts)
        if refused is None:
            await self.replay()
        return refused

    async def events(self) -> list[tuple[str, dict[str, Any]]]:
        return await asyncio.wait_for(self.mailbox.news(0), 1)


async def test_ranks_lost_now_and_then_do_not_use_up_the_restarts() -> None:
    ranks = Losses(max_restarts=2)
    await ranks.do("phase")
    for _ in range(20):
        assert await ranks.lose() is None
        assert await ranks.lose() is None
        await ranks.do("train", "save")
    found = await ranks.events()
    assert [kind for kind, _ in found[:3]] == ["ranks_lost", "ranks_lost", "restarts_refilled"]
    assert found[1][1] == {"reason": "rank 0: killed", "counted": True, "losses": 2, "max_restarts": 2}
    assert found[2][1] == {"losses": 2, "by": "checkpoint"}
    assert len(found) == 60
    assert await ranks.mailbox.news(59) == found[59:]


async def test_a_failure_that_every_replay_repeats_uses_them_up() -> None:
    """Steps trained again are no progress, however many, and neither is a save that was there already."""
    ranks = Losses(max_restarts=2)
    await ranks.do("phase", "save", *["train"] * 150)
    assert await ranks.lose() is None
    assert await ranks.lose() is None
    assert await ranks.lose() == (
        "rank 0: killed. The ranks were lost 3 times without a checkpoint or 100 steps in between (training.max_restarts=2)"
    )
    await ranks.mailbox.answer(1, 0, "the save again")
    assert [kind for kind, _ in await ranks.events()] == ["ranks_lost"] * 3


async def test_what_a_rank_tells_is_an_event_at_once_and_shows_that_it_is_not_stuck() -> None:
    ranks = Losses(max_restarts=0)
    waiting = asyncio.create_task(ranks.mailbox.news(0))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    silent = await ranks.mailbox.silent_s()
    await ranks.mailbox.tell("storage_retry", {"rank": 1, "attempt": 2})
    assert await asyncio.wait_for(waiting, 1) == [("storage_retry", {"rank": 1, "attempt": 2})]
    assert await ranks.mailbox.silent_s() < silent


async def test_steps_refill_them_too_where_no_checkpoint_is_written() -> None:
    ranks = Losses(max_restarts=1)
    await ranks.do("phase")
    for _ in range(3):
        assert await ranks.lose() is None
        await ranks.do(*["train"] * 100)
    assert await ranks.lose() is None
    await ranks.do(*["train"] * 99)
    assert await ranks.lose() is not None
    refilled = [fields for kind, fields in await ranks.events() if kind == "restarts_refilled"]
    assert refilled == [{"losses": 1, "by": "100 steps"}] * 3


async def test_nodes_taken_away_with_notice_cost_no_restart() -> None:
    ranks = Losses(max_restarts=0)
    await ranks.do("phase")
    for _ in range(5):
        assert await ranks.lose(counts=False) is None
    assert await ranks.lose() == "rank 0: killed. The ranks were lost once (training.max_restarts=0)"
    assert [fields["counted"] for _, fields in await ranks.events()] == [False] * 5 + [True]


@pytest.mark.parametrize("preempted", [False, True])
async def test_ray_train_s_notice_asks_the_mailbox(preempted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mailbox = Mailbox(world_size=2, max_restarts=0)
    monkeypatch.setattr("ray.get", lambda coroutine, timeout: asyncio.run(coroutine))
    notice = LostRanks(SimpleNamespace(lost=SimpleNamespace(remote=mailbox.lost)))
    gone = RayActorError()
    gone._preempted = preempted
    lost = {1: RuntimeError("connection reset"), 0: SimpleNamespace(health_check_failure=gone)}
    calls = asyncio.to_thread(notice.after_exception, None, lost)
    if preempted:
        await calls
    else:
        with pytest.raises(TrainingError, match=r"rank 0: .*; rank 1: connection reset. .*training.max_restarts=0"):
            await calls


async def test_the_driver_tells_the_mailbox_s_events_as_they_come() -> None:
    mailbox = Mailbox(world_size=1, max_restarts=1)
    ranks, events = _ranks_of(mailbox, 60.0)
    telling = asyncio.create_task(ranks._tell())
    for number in range(1, 4):
        await mailbox.lost("gone", counts=False)
        assert not await within_turns(telling)
        assert [kind for kind, _ in events] == ["ranks_lost"] * number
    telling.cancel()


class _Local:
    """The mailbox as an actor's handle would give it, in this process."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._mailbox, name)
        return SimpleNamespace(remote=lambda *given: asyncio.ensure_future(method(*given)))


class _Rank:
    """An actor handle that can be told from others."""


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    ended: list[Any] = []
    monkeypatch.setattr("ray.kill", ended.append)
    return ended


def _ranks_of(
    mailbox: Mailbox, stuck_after_s: float, loading_s: float = 60.0
) -> tuple[StudentGroup, list[tuple[str, dict[str, Any]]]]:
    events: list[tuple[str, dict[str, Any]]] = []
    training = TrainingSettings(stuck_after_s=stuck_after_s, stuck_loading_after_s=loading_s)
    ranks = StudentGroup(
        training,
        8,
        0,
        TokenizerSource("tokenizer"),
        None,
        Path("run"),
        Path("ray"),
        on_event=lambda kind, **fields: events.append((kind, fields)),
    )
    ranks._mailbox = _Local(mailbox)
    ranks._fit = asyncio.get_running_loop().create_future()
    return ranks, events


async def test_ranks_that_hang_are_killed_and_the_order_is_answered_after_their_restart(killed: list[Any]) -> None:
    mailbox = Mailbox(world_size=1)
    ranks, events = _ranks_of(mailbox, 0.2)
    rank = _Rank()
    await mailbox.enter(0, rank)
    command = asyncio.ensure_future(ranks._call(Command("train")))
    for _ in range(100):
        if not killed:
            await asyncio.sleep(0.02)
    assert killed == [rank]
    await mailbox.enter(0, _Rank())
    await mailbox.answer(0, 0, "report")
    assert await asyncio.wait_for(command, 1) == "report"
    assert [kind for kind, _ in events] == ["ranks_stuck"]
    assert events[0][1]["order"] == "train"


async def test_ranks_that_are_heard_of_are_not_stuck(killed: list[Any]) -> None:
    mailbox = Mailbox(world_size=2)
    ranks, events = _ranks_of(mailbox, 0.3)
    command = asyncio.ensure_future(ranks._call(Command("train")))
    for _ in range(5):
        await asyncio.sleep(0.15)
        await mailbox.enter(0, _Rank())
    await answer_all(mailbox, 0)
    await command
    assert not killed
    assert not events


async def test_ranks_that_do_not_come_back_end_the_run_with_the_reason(killed: list[Any]) -> None:
    mailbox = Mailbox(world_size=1)
    await mailbox.enter(0, _Rank())
    ranks, _ = _ranks_of(mailbox, 0.1)
    with pytest.raises(NoRoomForRanks, match="did not start again within training.stuck_after_s=0.1"):
        await asyncio.wait_for(ranks._call(Command("save", checkpoint="step-1")), 2)
    assert len(killed) == 1


@pytest.mark.parametrize("command", [Command("phase", phase=WARMUP), Command("export", folder="student")])
async def test_loading_and_export_have_a_deadline_of_their_own(killed: list[Any], command: Command) -> None:
    mailbox = Mailbox(world_size=1)
    await mailbox.enter(0, _Rank())
    ranks, _ = _ranks_of(mailbox, 0.05, loading_s=60.0)
    call = asyncio.ensure_future(ranks._call(command))
    await asyncio.sleep(0.3)
    await mailbox.answer(0, 0, None)
    await call
    assert not killed
    ranks, _ = _ranks_of(mailbox, 60.0, loading_s=0.1)
    with pytest.raises(TrainingError, match="did not start again within training.stuck_loading_after_s=0.1"):
        await asyncio.wait_for(ranks._call(command), 2)
    assert len(killed) == 1


async def test_ranks_on_a_node_that_will_be_taken_away_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    mailbox = Mailbox(3, 0)
    for rank, node in enumerate(("a", "b", "b")):
        await mailbox.enter(rank, None, node)
    drained: set[str] = {"c"}
    monkeypatch.setattr("actors.student.group.draining_nodes", lambda: drained)
    monkeypatch.setattr("actors.student.group._NOTICES_EVERY_S", 0.0)
    group: Any = object.__new__(StudentGroup)
    group._mailbox, group._looked_at, group._leaving = Handle(mailbox), 0.0, set()
    assert await group.leaving() == [], "a node without ranks"
    drained.add("b")
    assert await group.leaving() == [1, 2]
    assert await group.leaving() == []
    drained.add("a")
    assert await group.leaving() == [0]
