"""Growing files in a storage: every byte is sent once, and a kill at any point loses and doubles no line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from kdray.errors import DataError
from kdray.runs.folder import RunFolder
from kdray.runs.ledger import Ledger
from kdray.runs.lines.segments import SEGMENTS, Segment, chain, segments_of
from kdray.runs.remote_copy import StoredRun, fetch_results, num_stored_lines
from kdray.runs.storage import FileDigest, Storage

NAMES = ("metrics.jsonl", "ledger.jsonl")


class Killed(BaseException):
    """The driver's end; no code of its own runs after that."""


class MortalStorage(Storage):
    """A storage whose driver dies before or after one of its operations."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder.as_uri(), "run")
        self.dies_in: int | None = None
        self.check()

    def _last(self, work: Callable[[], FileDigest | None]) -> FileDigest | None:
        if self.dies_in is not None:
            self.dies_in -= 1
            if self.dies_in == -1:
                raise Killed
        done = work()
        if self.dies_in == 0:
            self.dies_in = None
            raise Killed
        return done

    def put_part(self, path: Path, begin: int, end: int, key: str) -> FileDigest:
        done = self._last(lambda: super(MortalStorage, self).put_part(path, begin, end, key))
        assert done is not None
        return done

    def delete(self, key: str) -> None:
        self._last(lambda: super(MortalStorage, self).delete(key))


class Driver:
    """A driver of a run: its folder, and lines that say who trained a step."""

    def __init__(self, name: str, folder: Path, storage: Storage) -> None:
        self.name = name
        self.stored = StoredRun(RunFolder(folder), storage)
        self.ledger = Ledger(folder / "ledger.jsonl")
        self.step = 0

    @property
    def has_sent(self) -> bool:
        """True if every file was sent, so that the next call looks at nothing that is there."""
        return len(self.stored._growing) == len(NAMES) and all(each._sent for each in self.stored._growing.values())

    def begin(self) -> Driver:
        self.stored.folder.path.mkdir(parents=True)
        self.stored.folder.config.write_text("run: {name: run}\n")
        return self

    def resume(self, step: int) -> Driver:
        """As `cluster.launch` does."""
        self.stored.folder.path.mkdir(exist_ok=True)
        self.stored.fetch(step)
        self.stored.folder.config.touch()
        self.stored.folder.truncate_metrics(step)
        self.ledger.truncate(step)
        self.step = step
        return self

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            self.ledger.append(self.step, [self.step], facts={"by": self.name})
            self.stored.folder.append_metrics({"step": self.step, "by": self.name})


def history(folder: Path, name: str) -> list[tuple[int, str]]:
    """Steps and who trained them; checks that each is there once, in order."""
    path = folder / name
    # A driver that trained nothing has not made it.
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), name
    return [(line["step"], line["by"]) for line in lines]


@pytest.mark.parametrize("seed", range(15))
def test_a_kill_at_any_point_loses_and_doubles_nothing(tmp_path: Path, seed: int) -> None:
    """Drivers on two machines that die between any two operations, and go on from the last checkpoint. One that has lost the
    run may only have stood still, and sends what it had begun to send.
    """
    draw = random.Random(seed)
    (tmp_path / "storage").mkdir()
    storage = MortalStorage(tmp_path / "storage")
    folders = [tmp_path / "one", tmp_path / "two"]
    driver = Driver("0", folders[0], storage).begin()
    committed: list[tuple[int, str]] = []
    late: dict[Path, Driver] = {}
    for number in range(1, 12):
        driver.train(draw.randint(0, 4))
        storage.dies_in = draw.choice((None, *range(7)))
        try:
            driver.stored.send()
            # The commit, which says that a resume may begin here.
            committed = history(driver.stored.folder.path, "ledger.jsonl")
            driver.train(draw.randint(0, 3))
        except Killed:
            pass
        storage.dies_in = None
        for other in late.values():
            if draw.random() < 0.4:
                other.train(draw.randint(0, 3))
                other.stored.send()
        copy = fetch_whole(storage, tmp_path / f"copy-{number}")
        for name in NAMES:
            assert history(copy, name)[: len(committed)] == committed, "a checkpoint's lines are in the storage"
        if draw.random() < 0.6:
            if driver.has_sent:
                late[driver.stored.folder.path] = driver
            driver = Driver(str(number), draw.choice(folders), storage).resume(len(committed))
            late.pop(driver.stored.folder.path, None)
            for name in NAMES:
                assert history(driver.stored.folder.path, name) == committed


def fetch_whole(storage: Storage, to: Path) -> Path:
    storage.write("config.yaml", b"run: {name: run}\n")
    return fetch_results(storage.url, to)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    (tmp_path / "storage").mkdir()
    found = Storage((tmp_path / "storage").as_uri(), "run")
    found.check()
    return found


def test_every_byte_is_sent_once(storage: Storage, tmp_path: Path) -> None:
    driver = Driver("a", tmp_path / "one", storage).begin()
    curves = driver.stored.folder.tensorboard / "sft" / "events.1"
    curves.parent.mkdir(parents=True)
    sent = 0
    for _ in range(30):
        driver.train(5)
        driver.stored.folder.append_event("checkpoint", step=driver.step)
        with curves.open("ab") as file:
            file.write(bytes(range(256)))
        sent += driver.stored.send()
    driver = Driver("b", tmp_path / "one", storage).resume(driver.step)
    sent += driver.stored.send()
    size = sum(path.stat().st_size for path in driver.stored.folder.path.rglob("*") if path.is_file())
    # The config once more, by the second driver.
    assert size <= sent <= size + driver.stored.folder.config.stat().st_size
    copy = fetch_whole(storage, tmp_path / "copy")
    for path in (curves, driver.stored.folder.events, driver.stored.folder.metrics):
        assert (copy / path.relative_to(tmp_path / "one")).read_bytes() == path.read_bytes()
    assert num_stored_lines(storage, "metrics.jsonl") == 150


def test_what_a_driver_writes_that_has_lost_the_run_is_in_no_file(storage: Storage, tmp_path: Path) -> None:
    """It stood still in the middle of a save: what it sends on waking lies beside what its successor has sent by then."""
    late = Driver("late", tmp_path / "one", storage).begin()
    late.train(4)
    late.stored.send()
    late.train(3)
    successor = Driver("successor", tmp_path / "two", storage).resume(4)
    successor.train(2)
    successor.stored.send()
    late.stored.send()
    copy = fetch_whole(storage, tmp_path / "copy")
    told = [(step, "late") for step in range(1, 5)] + [(5, "successor"), (6, "successor")]
    assert [history(copy, name) for name in NAMES] == [told, told]
    # It may also send first: a successor that has sent nothing goes on from its own lines.
    late.train(1)
    late.stored.send()
    successor.train(1)
    successor.stored.send()
    copy = fetch_whole(storage, tmp_path / "again")
    assert [history(copy, name) for name in NAMES] == [[*told, (7, "successor")]] * 2


def test_a_cut_without_new_lines_holds(storage: Storage, tmp_path: Path) -> None:
    """A resume from an earlier step that sends before it has trained."""
    driver = Driver("a", tmp_path / "one", storage).begin()
    for _ in range(3):
        driver.train(2)
        driver.stored.send()
    driver = Driver("b", tmp_path / "one", storage).resume(2)
    driver.stored.send()
    assert len(history(fetch_whole(storage, tmp_path / "copy"), "ledger.jsonl")) == 2
    driver.train(1)
    driver.stored.send()
    assert history(fetch_whole(storage, tmp_path / "more"), "ledger.jsonl")[-1] == (3, "b")
    # Deleted, not hidden.
    held = sum(segment.end - segment.begin for segment in segments_of(storage.list())["ledger.jsonl"])
    assert held == (tmp_path / "one" / "ledger.jsonl").stat().st_size


def test_a_storage_of_an_earlier_version_is_read_and_replaced(storage: Storage, tmp_path: Path) -> None:
    driver = Driver("a", tmp_path / "one", storage).begin()
    driver.train(5)
    storage.put_files({name: driver.stored.folder.path / name for name in (*NAMES, "config.yaml")})
    assert len(history(fetch_results(storage.url, tmp_path / "copy"), "ledger.jsonl")) == 5
    assert num_stored_lines(storage, "metrics.jsonl") == 5
    assert not driver.stored.fetch(3), "the same history"
    elsewhere = Driver("b", tmp_path / "two", storage).resume(3)
    elsewhere.train(1)
    elsewhere.stored.send()
    assert {name for name in storage.list() if not name.startswith(f"{SEGMENTS}/")} == {"config.yaml"}
    assert history(fetch_results(storage.url, tmp_path / "more"), "metrics.jsonl")[-1] == (4, "b")


def test_a_damaged_segment_is_named(storage: Storage, tmp_path: Path) -> None:
    driver = Driver("a", tmp_path / "one", storage).begin()
    driver.train(5)
    driver.stored.send()
    (key,) = (key for key in storage.list() if key.startswith(f"{SEGMENTS}/ledger.jsonl/"))
    storage.write(key, b"x")
    with pytest.raises(DataError, match=f"{key}: does not hold what was written"):
        fetch_results(storage.url, tmp_path / "copy")


def test_a_chain_never_goes_back_to_an_older_generation() -> None:
    def parts(*found: tuple[int, int, int]) -> list[tuple[int, int, int]]:
        made = chain(Segment(*each, digest="0" * 16) for each in found)
        return [(each.begin, each.end, each.generation) for each in made]

    assert parts() == []
    assert parts((5, 9, 1)) == [], "the beginning is missing"
    assert parts((0, 5, 1), (5, 9, 1)) == [(0, 5, 1), (5, 9, 1)]
    assert parts((0, 5, 1), (5, 9, 1), (5, 7, 2), (7, 9, 1)) == [(0, 5, 1), (5, 7, 2)]
    assert parts((0, 5, 1), (5, 9, 1), (5, 5, 2)) == [(0, 5, 1)]
    assert parts((0, 5, 1), (5, 5, 2), (5, 8, 2)) == [(0, 5, 1), (5, 8, 2)]
    assert parts((0, 5, 2), (5, 9, 1)) == [(0, 5, 2)]
