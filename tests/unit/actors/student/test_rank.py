"""The loop of a rank, without Ray: what ranks that start again do before the next command."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.student import rank as module
from actors.student.file_tensors import Fixed
from actors.student.group import StudentGroup
from actors.student.mailbox import Command
from actors.student.trainer import Phase
from actors.weights.deltas import Sent
from kdray.config import MiniLLMLoss, TrainingSettings
from kdray.errors import TrainingError
from kdray.types import StepReport

PHASE = Phase("distill", "student", None, MiniLLMLoss(), 1e-3, 10)


class Mailbox:
    """An actor whose calls have their results at once."""

    def __init__(self, phase: Phase) -> None:
        self._phase = phase

    def __getattr__(self, name: str) -> Any:
        results = {"start": (4, self._phase, "step-000007"), "command": Command("stop")}
        return SimpleNamespace(remote=lambda *given: results.get(name))


class Outlet:
    def __init__(self) -> None:
        self.sent: list[Any] = []

    def publish(self, version: int) -> int:
        self.sent.append(("student", version))
        return 48

    def renew(self, version: int, decay: float) -> None:
        self.sent.append(("average", version, decay))

    def flush(self) -> None:
        self.sent.append("flushed")


def started_again(phase: Phase, average: Any, monkeypatch: pytest.MonkeyPatch, averaged: bool = False) -> list[Any]:
    """What ranks send that start again in a phase. Args: averaged: their checkpoint has an average."""
    context = SimpleNamespace(current_actor=None, get_node_id=lambda: "a")
    monkeypatch.setattr(module, "ray", SimpleNamespace(get=lambda result: result, get_runtime_context=lambda: context))
    began: list[Any] = []
    config: Any = SimpleNamespace(mailbox=Mailbox(phase), average=average)
    trainer: Any = SimpleNamespace(rank=0, steps_done=7, has_average=lambda: averaged)
    files: Any = SimpleNamespace(start_phase=lambda *given: began.append(given))
    outlet: Any = Outlet()
    module.run_log(config, trainer, files, outlet)
    assert began == [(phase, Path("step-000007"))]
    return outlet.sent


@pytest.mark.parametrize("average", [None, object()])
def test_ranks_that_start_again_publish_their_checkpoint_the_average_first(
    average: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that has a version of the student must find the average that belongs to it."""
    first = [] if average is None else [("average", 7, 1.0)]
    assert started_again(PHASE, average, monkeypatch) == [*first, ("student", 7), "flushed"]


@pytest.mark.parametrize("averaged", [True, False])
def test_ranks_that_start_again_in_a_supervised_phase_publish_the_average_that_they_keep(
    averaged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas that start later wait for their teacher, and the ranks before are gone with it."""
    control = Phase("control", "student", None, None, 1e-3, 10)
    sent = [("average", 7, 1.0)] if averaged else []
    assert started_again(control, object(), monkeypatch, averaged) == [*sent, "flushed"]


class Publisher:
    def __init__(self) -> None:
        self.loses = False

    def lost(self) -> bool:
        return self.loses

    def publish(self, version: int, buckets: Any, trained: Any, fixed: Any) -> None:
        held = None if fixed is None else list(fixed)
        self.given = (version, list(buckets), trained, held)


class Trainer:
    """A trainer whose weights are frozen or not; `asked` are the values that ranks exchanged."""

    def __init__(self, fixed: Fixed) -> None:
        self.fixed = fixed
        self.phases_started = 1
        self.asked: list[Any] = []
        self.first: Any = None

    def gather(self, value: Any) -> list[Any]:
        self.asked.append(value)
        return [value if self.first is None else self.first]


def test_a_publication_counts_its_bytes() -> None:
    buckets = [{"a": torch.zeros(3, 4), "b": torch.zeros(2, dtype=torch.bfloat16)}, {"c": torch.zeros(5)}]
    publisher: Any = Publisher()
    trainer: Any = Trainer(Fixed())
    channel = module.Channel(trainer, publisher)
    for _ in range(2):
        assert channel.send(3, lambda fixed: iter([] if fixed else buckets), "trained") == 48 + 4 + 20  # type: ignore[arg-type]
        assert publisher.given[:3] == (3, buckets, "trained")
        assert not publisher.given[3]
    assert module.Channel(trainer, None).send(3, lambda fixed: iter([] if fixed else [{}, {}]), None) == 0
    assert not trainer.asked, "ranks of an ordinary student exchange nothing"
    nothing: Any = None
    assert module.execute(Command("publish", version=3), nothing, nothing, nothing, Outlet()) == 48  # type: ignore[arg-type]


def test_fixed_weights_are_sent_once_a_phase_and_again_after_a_loss() -> None:
    """Every rank gathers what rank 0 sends, though it alone hears of a loss."""
    publisher: Any = Publisher()
    trainer: Any = Trainer(Fixed(("a", "b"), 1000))
    other: Any = Trainer(trainer.fixed)
    channel, follower = module.Channel(trainer, publisher), module.Channel(other, None)
    gathered: list[tuple[str, bool]] = []

    def buckets(rank: str, fixed: bool) -> Any:
        gathered.append((rank, fixed))
        yield {"frozen" if fixed else "moved": torch.zeros(3)}

    def send() -> bool:
        """Publish on both ranks: True if fixed weights were sent, which have to be those that both gathered."""
        gathered.clear()
        trainer.asked.clear()
        assert channel.send(1, lambda fixed: buckets("0", fixed), None) == 1000 + 12
        other.first = trainer.asked[0] if trainer.asked else None
        other.asked.clear()
        follower.send(1, lambda fixed: buckets("1", fixed), None)
        assert len(other.asked) == len(trainer.asked)
        sent = publisher.given[3] is not None
        assert gathered == [(rank, fixed) for rank in "01" for fixed in ([True, False] if sent else [False])]
        return sent

    assert [send(), send(), send()] == [True, False, False]
    publisher.loses = True
    assert send()
    publisher.loses = False
    assert not send()
    for each in (trainer, other):
        each.phases_started = 2
    assert [send(), send()] == [True, False]
    for each in (trainer, other):
        each.fixed = Fixed(("a",), 1000)
    assert [send(), send()] == [True, False], "`b` is trained from now on"


async def test_a_step_reports_the_bytes_of_the_last_publication(tmp_path: Path) -> None:
    group: Any = StudentGroup(TrainingSettings(), 8, 0, None, None, tmp_path, tmp_path)  # type: ignore[arg-type]
    group.weights = SimpleNamespace(largest_gap=SimpleNamespace(remote=answered(None)))
    group._shards = lambda batch: []
    report = StepReport(1, 0.5, 4, 1.0, 0.1, 0.1, metrics={"padding": 0.25})
    group._call = lambda command: answered(report if command.kind == "train" else 72)()
    assert (await group.train_step(None)).metrics == {"padding": 0.25}, "nothing was published yet"
    await group.publish(0)
    assert (await group.train_step(None)).metrics == {"padding": 0.25, "published_bytes": 72}


@pytest.mark.parametrize("settings", [{"sync_full_every": 10}, {"lora": {}}], ids=str)
async def test_a_step_reports_what_was_new_in_the_last_publication(settings: dict[str, Any], tmp_path: Path) -> None:
    training = TrainingSettings.model_validate(settings)
    group: Any = StudentGroup(training, 8, 0, None, None, tmp_path, tmp_path)  # type: ignore[arg-type]
    group._shards = lambda batch: []
    report = StepReport(1, 0.5, 4, 1.0, 0.1, 0.1)
    group._call = lambda command: answered(report)()
    for sent, numbers in (
        (None, {}),
        (Sent(72), {"update_bytes": 72.0}),
        (Sent(9, 100, 2), {"update_bytes": 9.0, "update_changed": 0.02}),
    ):
        group.weights = SimpleNamespace(
            **{name: SimpleNamespace(remote=answered(value)) for name, value in (("largest_gap", None), ("sent", sent))}
        )
        assert (await group.train_step(None)).metrics == numbers


def answered(value: Any) -> Any:
    async def answer() -> Any:
        return value

    return answer


def test_a_rank_has_its_secrets_before_it_does_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Secretive:
        def __init__(self, *given: object) -> None:
            raise TrainingError(f"begins with {os.environ['A_KEY']}")

    (tmp_path / "key").write_text("value\n")
    monkeypatch.setenv("A_KEY", "older")
    monkeypatch.setattr(module, "StudentTrainer", Secretive)
    config = module.RankConfig(TrainingSettings(), 8, 0, None, None, None, tmp_path, secrets={"A_KEY": tmp_path / "key"})  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="begins with value"):
        module.run_rank({"config": config})


@pytest.mark.parametrize(("decay", "sent"), [(0.0, "log q"), (0.9, None), (1.0, None)])
def test_a_teacher_that_is_the_student_as_it_is_comes_with_its_log_q(decay: float, sent: str | None) -> None:
    """Replicas compare what they loaded with it; of an average over versions, no rank holds the model."""
    published: list[Any] = []
    trainer: Any = SimpleNamespace(
        rank=1,
        has_trained=True,
        log_probabilities=lambda ids: "log q",
        averaged_buckets=lambda decay, fixed: iter([]),
        fixed=Fixed(),
        phases_started=1,
    )
    config: Any = SimpleNamespace(parity_ids=(1, 2, 3), average=None, training=None)
    outlet = module.Outlet(config, trainer)
    publisher: Any = SimpleNamespace(publish=lambda version, buckets, trained, fixed: published.append((version, trained)))
    outlet._average = module.Channel(trainer, publisher)
    outlet.renew(5, decay)
    outlet.close()
    assert published == [(5, sent)]
