"""Ranks write a checkpoint together, or not at all; and load nothing but what was written."""

from __future__ import annotations

import json
import os
import re
import resource
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from actors.student.checkpoints.rank_files import RankFiles, Saved
from actors.student.trainer import Phase
from kdray.errors import LeaseLost, StorageError, TrainingError
from kdray.runs.checkpoints import COMMITTED, FILES, differing, read_marker
from kdray.runs.lease import Lease
from kdray.runs.storage import Storage

T = TypeVar("T")


@dataclass
class Meeting:
    """Where the ranks of a group, as threads, show each other values."""

    barrier: threading.Barrier
    values: dict[int, Any] = field(default_factory=dict)


@dataclass
class FileTrainer:
    """What `RankFiles` asks of a trainer: its state is one text."""

    rank: int
    meeting: Meeting
    state: str = ""
    base: str = ""
    other_ranks: bool = False
    """Whether another number of ranks wrote what it loads."""

    @property
    def world_size(self) -> int:
        return self.meeting.barrier.parties

    @property
    def backend(self) -> FileTrainer:
        return self

    def reads_every_rank(self, folder: Path) -> bool:
        assert (folder / "state" / "model.pt").is_file()
        return self.other_ranks

    def gather(self, value: Any) -> list[Any]:
        self.meeting.values[self.rank] = value
        self.meeting.barrier.wait()
        values = [self.meeting.values[rank] for rank in range(self.meeting.barrier.parties)]
        self.meeting.barrier.wait()
        return values

    def save(self, folder: Path) -> None:
        (folder / "state").mkdir()
        (folder / "state" / f"rank-{self.rank}.pt").write_text(self.state)
        if self.rank == 0:
            (folder / "state" / "model.pt").write_text("everybody's")

    def load(self, folder: Path) -> None:
        assert (folder / "state" / "model.pt").read_text() == "everybody's"
        if self.other_ranks:
            self.state = " and ".join(path.read_text() for path in sorted((folder / "state").glob("rank-*.pt")))
            return
        self.state = (folder / "state" / f"rank-{self.rank}.pt").read_text()

    def start_phase(self, phase: Phase) -> None:
        self.base = (Path(phase.model) / "model.safetensors").read_text()

    def export(self, folder: Path, tokenizer: str, ids: Sequence[int] = ()) -> None:
        if self.rank == 0:
            (folder / "model.safetensors").write_text(f"weights {self.state}")


@dataclass
class Group:
    """Two ranks, each with a folder that it works in."""

    trainers: list[FileTrainer]
    files: list[RankFiles]
    storage: Storage

    def all(self, call: Callable[[RankFiles], T]) -> list[T | BaseException]:
        """What the call gave or raised on every rank."""
        results: list[Any] = [None] * len(self.files)

        def work(rank: int) -> None:
            try:
                results[rank] = call(self.files[rank])
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(len(self.files))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive(), "a rank waits for another one"
        return results


@pytest.fixture(params=["run folder", "storage"])
def group(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Group:
    run = tmp_path / "run"
    url = None
    if request.param == "storage":
        (tmp_path / "shared" / "run").mkdir(parents=True)
        url = (tmp_path / "shared" / "run").as_uri()
    monkeypatch.chdir(tmp_path)
    meeting = Meeting(threading.Barrier(2, timeout=10))
    trainers = [FileTrainer(rank, meeting, state=f"of {rank}") for rank in range(2)]
    files = [RankFiles(trainer, run, url) for trainer in trainers]  # type: ignore[arg-type]
    return Group(trainers, files, Storage.local(run) if url is None else Storage(url))


def step(group: Group, tmp_path: Path, number: int) -> Path:
    return tmp_path / "run" / "checkpoints" / f"step-{number:06d}"


def test_ranks_of_a_driver_that_lost_its_lease_commit_and_delete_nothing(group: Group, tmp_path: Path) -> None:
    root = Path(group.storage.root)
    root.mkdir(exist_ok=True)
    first = Lease([group.storage]).take()
    for files in group.files:
        files._lease = first.ticket
    group.all(lambda files: files.save(step(group, tmp_path, 4), {"step": 4}))
    first.release()
    with Lease([group.storage]).take():
        there = set(group.storage.list())
        for work in (
            lambda files: files.save(step(group, tmp_path, 5), {"step": 5}),
            lambda files: files.export(tmp_path / "run" / "checkpoints" / "sft", "unused"),
        ):
            for error in group.all(work):
                assert isinstance(error, TrainingError)
                assert re.search(f"rank 0: .*process {os.getpid()} on .* has taken over the run", str(error))
        assert {name for name in group.storage.list() if ".rank-" not in name} == there


def test_ranks_that_wake_in_the_middle_of_a_save_write_into_no_checkpoint_of_the_next_driver(
    group: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Theirs stood still before they stored their parts, and remove nothing of the others either."""
    Path(group.storage.root).mkdir(exist_ok=True)
    url = group.storage.url if (tmp_path / "shared").exists() else None
    folder, key = step(group, tmp_path, 4), "checkpoints/step-000004"
    put_tree, stands, goes_on = Storage.put_tree, threading.Event(), threading.Event()

    def slow(storage: Storage, own: Path, into: str, move: bool = False) -> Any:
        if storage in first:
            stands.set()
            assert goes_on.wait(20)
        return put_tree(storage, own, into, move)

    monkeypatch.setattr(Storage, "put_tree", slow)

    def ranks(lease: Lease, state: str) -> Group:
        meeting = Meeting(threading.Barrier(2, timeout=20))
        trainers = [FileTrainer(rank, meeting, state=f"{state} {rank}") for rank in range(2)]
        files = [RankFiles(each, tmp_path / "run", url, lease.ticket) for each in trainers]  # type: ignore[arg-type]
        return Group(trainers, files, group.storage)

    lease = Lease([group.storage]).take()
    old = ranks(lease, "old")
    first = [files._storage for files in old.files]
    failed: list[Any] = []
    saving = threading.Thread(target=lambda: failed.extend(old.all(lambda files: files.save(folder, {"step": 4}))))
    saving.start()
    assert stands.wait(20)
    lease.release()
    with Lease([group.storage]).take() as later:
        new = ranks(later, "new")
        assert all(isinstance(each, Saved) for each in new.all(lambda files: files.save(folder, {"step": 4})))
        goes_on.set()
        saving.join(20)
        assert all(isinstance(each, TrainingError) and "has taken over the run" in str(each) for each in failed)
        for files in old.files:
            files.close()
        assert all(files._scratch.is_dir() for files in new.files)
        marker = read_marker(group.storage, key)
        assert marker is not None
        assert {file["rank"] for file in marker[FILES].values()} == {0, 1}
        found = {name: group.storage.digest(f"{key}/{name}") for name in marker[FILES]}
        assert differing(marker[FILES], found) is None
        phase = Phase("distill", str(tmp_path), None, None, 1e-3, 1)
        (tmp_path / "model.safetensors").write_text("from elsewhere")
        assert new.all(lambda files: files.start_phase(phase, folder)) == [None, None]
        assert [trainer.state for trainer in new.trainers] == ["new 0", "new 1"]
        # Of the driver before, whose student it is not known to be.
        group.storage.write(f"{key}/{COMMITTED}", json.dumps({"step": 4, FILES: {}}).encode())
        again = ranks(later, "again")
        assert all(isinstance(each, Saved) and each.bytes for each in again.all(lambda files: files.save(folder, {"step": 4})))
        assert {name.split("/")[2] for name in group.storage.list(key)} == {COMMITTED, f"by-{later.owner[:12]}"}


def test_remains_of_killed_ranks_are_removed_by_the_driver_that_has_the_lease(tmp_path: Path) -> None:
    run = tmp_path / "run"
    kept = {".rank-1.by-another", ".rank-notes"}
    for name in (".rank-0", ".rank-0.by-another", ".rank-2.by-another", ".rank-10", *kept):
        (run / "checkpoints" / name / "tmp").mkdir(parents=True)
    # Of two now, and of more before.
    trainer = FileTrainer(0, Meeting(threading.Barrier(2)))
    with Lease([Storage.local(run)]).take() as lease:
        with pytest.raises(LeaseLost):
            RankFiles(trainer, run, None, replace(lease.ticket, owner="gone"))  # type: ignore[arg-type]
        files = RankFiles(trainer, run, None, lease.ticket)  # type: ignore[arg-type]
        assert {path.name for path in (run / "checkpoints").iterdir()} == {files._scratch.name, *kept}


def test_what_is_saved_is_loaded(group: Group, tmp_path: Path) -> None:
    folder = step(group, tmp_path, 4)
    for saved in group.all(lambda files: files.save(folder, {"step": 4})):
        assert isinstance(saved, Saved)
        assert saved.bytes == len("of 0") + len("of 1") + len("everybody's")
    group.all(lambda files: files.export(tmp_path / "run" / "checkpoints" / "sft", "unused"))
    for trainer in group.trainers:
        trainer.state = "lost"
    phase = Phase("distill", str(tmp_path / "run" / "checkpoints" / "sft"), None, None, 1e-3, 1)
    assert group.all(lambda files: files.start_phase(phase, folder)) == [None, None]
    assert [trainer.state for trainer in group.trainers] == ["of 0", "of 1"]
    assert [trainer.base for trainer in group.trainers] == ["weights of 0"] * 2
    names = {f"checkpoints/step-000004/state/{name}.pt" for name in ("rank-0", "rank-1", "model")}
    assert set(group.storage.list("checkpoints")) == {
        *names,
        f"checkpoints/step-000004/{COMMITTED}",
        "checkpoints/sft/model.safetensors",
        f"checkpoints/sft/{COMMITTED}",
    }
    for files in group.files:
        files.close()
    assert not list(tmp_path.rglob(".rank-*"))


def test_an_open_checkpoint_holds_the_state_that_it_was_opened_with(
    group: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files take their time; the ranks train meanwhile, and nothing is a checkpoint before its commit."""
    put_tree, goes_on, stored = Storage.put_tree, threading.Event(), threading.Event()

    def slow(storage: Storage, own: Path, into: str, move: bool = False) -> Any:
        assert goes_on.wait(20)
        return put_tree(storage, own, into, move)

    monkeypatch.setattr(Storage, "put_tree", slow)
    folder, told = step(group, tmp_path, 4), []

    def on_stored() -> None:
        told.append(threading.current_thread().name)
        if len(told) == 2:
            stored.set()

    assert group.all(lambda files: files.open(folder, {"step": 4}, on_stored)) == [None, None]
    for trainer in group.trainers:
        trainer.state = "trained on"
    assert not told
    assert group.storage.list("checkpoints/step-000004") == {}
    goes_on.set()
    assert stored.wait(20)
    assert read_marker(group.storage, "checkpoints/step-000004") is None
    for saved in group.all(lambda files: files.commit()):
        assert isinstance(saved, Saved)
        assert saved.bytes == len("of 0") + len("of 1") + len("everybody's")
    assert group.storage.read("checkpoints/step-000004/state/rank-1.pt") == b"of 1"
    assert read_marker(group.storage, "checkpoints/step-000004") is not None
    # Ranks that repeat both commands find it there.
    told.clear()
    assert group.all(lambda files: files.open(folder, {"step": 4}, on_stored)) == [None, None]
    assert len(told) == 2
    assert group.all(lambda files: files.commit()) == [Saved(), Saved()]
    assert group.storage.read("checkpoints/step-000004/state/rank-1.pt") == b"of 1"
    assert not list(tmp_path.rglob(".rank-*/*"))


def test_ranks_lost_with_an_open_checkpoint_write_it_again(group: Group, tmp_path: Path) -> None:
    folder = step(group, tmp_path, 4)
    group.all(lambda files: files.open(folder, {"step": 4}))
    for files in group.files:
        files._opened.stored.result(20)  # type: ignore[union-attr]
        files.close()
    for number, trainer in enumerate(group.trainers):
        trainer.state = f"replayed {number}"
    url = group.storage.url if (tmp_path / "shared").exists() else None
    group.files[:] = [RankFiles(each, tmp_path / "run", url) for each in group.trainers]  # type: ignore[arg-type]
    assert group.all(lambda files: files.commit()) == [Saved(), Saved()]
    assert read_marker(group.storage, "checkpoints/step-000004") is None
    group.all(lambda files: files.open(folder, {"step": 4}))
    assert all(isinstance(each, Saved) for each in group.all(lambda files: files.commit()))
    assert group.storage.read("checkpoints/step-000004/state/rank-1.pt") == b"replayed 1"
    assert read_marker(group.storage, "checkpoints/step-000004") is not None


def test_a_replayed_save_leaves_the_first_one_alone(group: Group, tmp_path: Path) -> None:
    folder = step(group, tmp_path, 4)
    group.all(lambda files: files.save(folder, {"step": 4}))
    for trainer in group.trainers:
        trainer.state = "of the replay"
    assert group.all(lambda files: files.save(folder, {"step": 4})) == [Saved(), Saved()]
    assert group.storage.read("checkpoints/step-000004/state/rank-1.pt") == b"of 1"


def test_what_an_interrupted_save_left_is_not_mixed_in(group: Group, tmp_path: Path) -> None:
    group.storage.write("checkpoints/step-000004/state/rank-9.pt", b"of an older save")
    group.all(lambda files: files.save(step(group, tmp_path, 4), {"step": 4}))
    assert "checkpoints/step-000004/state/rank-9.pt" not in group.storage.list("checkpoints")


def test_a_rank_that_cannot_store_its_part_fails_all(group: Group, tmp_path: Path, monkeypatch) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise StorageError("the storage is away")

    monkeypatch.setattr(group.files[1]._storage, "put_tree", away)
    results = group.all(lambda files: files.save(step(group, tmp_path, 4), {"step": 4}))
    assert all(isinstance(each, StorageError) and str(each) == "rank 1: the storage is away" for each in results)
    assert group.storage.read(f"checkpoints/step-000004/{COMMITTED}") is None


@pytest.mark.parametrize("owner", [0, 1])
def test_a_file_that_is_not_what_was_written_is_not_loaded_by_anyone(group: Group, tmp_path: Path, owner: int) -> None:
    folder = step(group, tmp_path, 4)
    group.all(lambda files: files.save(folder, {"step": 4}))
    group.all(lambda files: files.export(tmp_path / "run" / "checkpoints" / "sft", "unused"))
    group.storage.write(f"checkpoints/step-000004/state/rank-{owner}.pt", b"oF %d" % owner)
    phase = Phase("distill", str(tmp_path / "run" / "checkpoints" / "sft"), None, None, 1e-3, 1)
    for error in group.all(lambda files: files.start_phase(phase, folder)):
        assert isinstance(error, TrainingError)
        assert f"state/rank-{owner}.pt does not hold what was written" in str(error)


def test_a_folder_without_a_marker_is_no_checkpoint(group: Group, tmp_path: Path) -> None:
    folder = step(group, tmp_path, 4)
    group.storage.write("checkpoints/step-000004/state/model.pt", b"everybody's")
    (tmp_path / "model.safetensors").write_text("from elsewhere")
    phase = Phase("distill", str(tmp_path), None, None, 1e-3, 1)
    for error in group.all(lambda files: files.start_phase(phase, folder)):
        assert isinstance(error, TrainingError)
        assert "was not committed" in str(error)


def test_a_checkpoint_of_another_number_of_ranks_is_read_with_the_files_of_all(
    group: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = step(group, tmp_path, 4)
    group.all(lambda files: files.save(folder, {"step": 4}))
    (tmp_path / "model.safetensors").write_text("from elsewhere")
    alone = FileTrainer(0, Meeting(threading.Barrier(1)), other_ranks=True)
    url = group.storage.url if (tmp_path / "shared").exists() else None
    # As from a bucket: files are there once they were fetched.
    monkeypatch.setattr(Storage, "is_local", property(lambda storage: False))
    later = RankFiles(alone, tmp_path / "run", url)  # type: ignore[arg-type]
    later.start_phase(Phase("distill", str(tmp_path), None, None, 1e-3, 1), folder)
    assert alone.state == "of 0 and of 1"


def test_a_checkpoint_of_the_run_folder_serves_a_run_that_has_a_storage_since(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shared" / "run").mkdir(parents=True)
    folder = tmp_path / "run" / "checkpoints" / "step-000004"
    alone = [FileTrainer(0, Meeting(threading.Barrier(1)), state="before") for _ in range(2)]
    RankFiles(alone[0], tmp_path / "run", None).save(folder, {"step": 4})  # type: ignore[arg-type]
    later = RankFiles(alone[1], tmp_path / "run", (tmp_path / "shared" / "run").as_uri())  # type: ignore[arg-type]
    with later._fetched(folder) as here:
        assert json.loads((here / COMMITTED).read_text())["step"] == 4
        alone[1].load(here)
    assert alone[1].state == "before"


def test_an_operation_that_is_tried_again_is_told_before_it_has_succeeded(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shared" / "run").mkdir(parents=True)
    told: list[dict[str, Any]] = []
    attempts: list[int] = []
    move = Storage._move

    def fails(storage: Storage, path: Path, key: str) -> Any:
        attempts.append(len(told))
        if len(attempts) == 1:
            raise OSError("the share does not answer")
        return move(storage, path, key)

    monkeypatch.setattr(Storage, "_move", fails)

    trainer = FileTrainer(0, Meeting(threading.Barrier(1)), state="trained")
    url = (tmp_path / "shared" / "run").as_uri()
    files = RankFiles(trainer, tmp_path / "run", url, on_retry=told.append)  # type: ignore[arg-type]
    files.save(tmp_path / "run" / "checkpoints" / "step-000004", {"step": 4})
    assert [(retry["rank"], retry["attempt"], retry["reason"]) for retry in told] == [(0, 1, "the share does not answer")]
    assert attempts[1] == 1, "told before it was tried again"
    assert "checkpoints/step-000004/COMMITTED.json" in Storage(url).list()


def test_a_lease_that_is_read_again_is_told_too(tmp_path: Path, monkeypatch) -> None:
    """The lease is where a rank notices an outage first."""
    monkeypatch.chdir(tmp_path)
    shared = tmp_path / "shared" / "run"
    shared.mkdir(parents=True)
    told: list[dict[str, Any]] = []
    with Lease([Storage.local(shared)]).take() as lease:
        trainer = FileTrainer(0, Meeting(threading.Barrier(1)), state="trained")
        url = shared.as_uri()
        files = RankFiles(trainer, tmp_path / "run", url, lease.ticket, told.append)  # type: ignore[arg-type]
        opened = Storage._open

        def fails_once(storage: Storage, key: str) -> Any:
            monkeypatch.setattr(Storage, "_open", opened)
            raise OSError(f"{key}: the share does not answer")

        monkeypatch.setattr(Storage, "_open", fails_once)
        files.save(tmp_path / "run" / "checkpoints" / "step-000004", {"step": 4})
    assert [(retry["rank"], retry["what"]) for retry in told] == [(0, "read lease.json")]
    assert told[0]["reason"].endswith("the share does not answer")


class FailingTrainer(FileTrainer):
    """Whose writer raises what torch's does where a disk is full, which is no OSError."""

    def save(self, folder: Path) -> None:
        super().save(folder)
        raise RuntimeError("unexpected pos 64 vs 0")

    def export(self, folder: Path, tokenizer: str, ids: Sequence[int] = ()) -> None:
        raise RuntimeError("unexpected pos 64 vs 0")


@pytest.fixture
def room(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether files can grow; a quota on this process ends the disk's room where not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not request.param:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    yield request.param
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [True, False], indirect=True)
@pytest.mark.parametrize("work", ["save", "export"])
def test_only_a_full_disk_is_called_one(tmp_path: Path, room: bool, work: str) -> None:
    run = tmp_path / "run"
    files = RankFiles(FailingTrainer(0, Meeting(threading.Barrier(1))), run, None)  # type: ignore[arg-type]
    calls = {
        "save": lambda: files.save(run / "checkpoints" / "step-000004", {"step": 4}),
        "export": lambda: files.export(run / "student", "unused"),
    }
    with pytest.raises(RuntimeError if room else StorageError) as raised:
        calls[work]()
    if not room:
        assert "rank 0: " in str(raised.value)
        assert "cannot be written: File too large" in str(raised.value)
    assert Storage.local(run).list("checkpoints") == {}
