"""Files by URL: a folder and an S3 server hold what was sent, in order, whole, and again after a pause; and nothing secret."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from kdray.config import Config, parse_config
from kdray.config.storage import below
from kdray.errors import ConfigError, DataError, LeaseLost, StorageError
from kdray.runs.checkpoints import commit, newest_checkpoint, prune_checkpoints
from kdray.runs.folder import RunFolder
from kdray.runs.lines.segments import segments_of
from kdray.runs.remote_copy import StoredRun, fetch_results
from kdray.runs.storage import FileDigest, Retry, Storage
from tests.support.s3_server import BUCKET, S3Server, s3_server

CONTENT = {"a.txt": b"first", "deep/er/b.bin": bytes(range(256)) * 40_000, "empty": b"", "name with ü #%20+.txt": b"odd"}


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty run's folder in either kind of storage."""
    if request.param == "folder":
        base = tmp_path / "shared folder"
        base.mkdir()
        url = base.as_uri()
    else:
        url = request.getfixturevalue("server").url(f"{BUCKET}/{tmp_path.name}")
    found = Storage(url, "run", patience_s=5.0)
    found.check()
    return found


def tree(folder: Path, content: dict[str, bytes]) -> Path:
    for name, each in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(each)
    return folder


def held(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def config_at(storage: str | None, output: Path, **sections: object) -> Config:
    run = {"name": "run", "output": str(output), "storage": storage}
    model = {"model": {"type": "tiny"}}
    return parse_config({"run": run, "student": model, "teachers": {"t": model}, **sections})


# -------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("move", [False, True])
def test_a_tree_comes_back_as_it_went(storage: Storage, tmp_path: Path, move: bool) -> None:
    source = tree(tmp_path / "source", CONTENT)
    digests = storage.put_tree(source, "checkpoints/step-000001", move)
    assert digests == {name: FileDigest(len(each), hashlib.sha256(each).hexdigest()) for name, each in CONTENT.items()}
    keys = {f"checkpoints/step-000001/{name}": len(each) for name, each in CONTENT.items()}
    assert storage.list() == storage.list("checkpoints") == keys
    assert storage.digests(keys) == {f"checkpoints/step-000001/{name}": digest for name, digest in digests.items()}
    storage.get_tree("checkpoints/step-000001", tmp_path / "back")
    assert held(tmp_path / "back") == CONTENT
    assert storage.read("checkpoints/step-000001/a.txt") == b"first"


def test_a_marker_comes_after_what_it_stands_for(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that breaks off leaves no marker, neither the new one nor that of a copy before."""
    storage.put_tree(tree(tmp_path / "source", CONTENT | {"MARK": b"new"}), "student")
    target = tree(tmp_path / "target", {"MARK": b"old"})
    get = Storage.get

    def breaks_off(self: Storage, key: str, path: Path) -> FileDigest:
        if key == "student/a.txt":
            raise KeyboardInterrupt
        return get(self, key, path)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "get", breaks_off)
        with pytest.raises(KeyboardInterrupt):
            storage.get_tree("student", target, "MARK")
    assert not (target / "MARK").exists()
    storage.get_tree("student", target, "MARK")
    assert held(target) == CONTENT | {"MARK": b"new"}


def test_what_is_there_is_replaced_and_removed(storage: Storage, tmp_path: Path) -> None:
    storage.write("x/one", b"old and long")
    storage.write("x/one", b"new")
    storage.write("x/two", b"2")
    storage.write("xy", b"another name that begins alike")
    assert storage.list("x") == {"x/one": 3, "x/two": 1}
    storage.delete("x/two")
    assert storage.list() == {"x/one": 3, "xy": 30}
    storage.delete("x")
    storage.delete("x")
    assert storage.list() == {"xy": 30}
    assert storage.list("nowhere") == {}
    assert storage.read("x/one") is None
    with pytest.raises(StorageError, match=r"/run.*: could not read x/one: "):
        storage.get("x/one", tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_objects_lie_where_another_library_looks(server: S3Server, tmp_path: Path) -> None:
    storage = Storage(server.url(f"{BUCKET}/team/kd"), "run")
    storage.put_files({"metrics.jsonl": tree(tmp_path, {"m": b"{}\n"}) / "m", "checkpoints/step-000002/x.pt": tmp_path / "m"})
    assert server.held("team/") == ["team/kd/run/checkpoints/step-000002/x.pt", "team/kd/run/metrics.jsonl"]
    assert server.read("team/kd/run/metrics.jsonl") == b"{}\n"
    assert storage.url == below(server.url(f"{BUCKET}/team/kd"), "run") == server.url(f"{BUCKET}/team/kd/run")


def test_an_object_whose_name_leads_out_of_the_folder_is_not_fetched(server: S3Server, tmp_path: Path) -> None:
    prefix = tmp_path.name
    server.client.put_object(Bucket=BUCKET, Key=f"{prefix}/run/student/../../../escaped", Body=b"x")
    storage = Storage(server.url(f"{BUCKET}/{prefix}"), "run")
    with pytest.raises(StorageError, match=r"student/\.\./\.\./\.\./escaped', which leads out of a folder"):
        storage.get_tree("student", tmp_path / "a" / "b" / "c")
    assert not list(tmp_path.rglob("escaped"))


# ------------------------------------------------------------------------------------------------------ retries


@pytest.fixture
def own_server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


def test_a_storage_that_comes_back_is_waited_for(own_server: S3Server, tmp_path: Path) -> None:
    retries: list[Retry] = []
    storage = Storage(own_server.url(f"{BUCKET}/{tmp_path.name}"), "run", patience_s=60.0, on_retry=retries.append)
    source = tree(tmp_path / "source", {name: name.encode() for name in "abcdef"})
    own_server.stop()
    # Longer than the library's own patience of six seconds.
    back = threading.Timer(9.0, own_server.start)
    back.start()
    storage.put_tree(source, "tree")
    back.join()
    assert own_server.held(tmp_path.name) == [f"{tmp_path.name}/run/tree/{name}" for name in "abcdef"]
    assert retries
    assert {retry.what for retry in retries} <= {f"write tree/{name}" for name in "abcdef"}
    assert all(retry.attempt >= 1 and "Could not connect" in retry.reason for retry in retries)


def test_a_storage_that_stays_away_ends_it_with_the_reason(own_server: S3Server) -> None:
    storage = Storage(own_server.url(), "run", patience_s=2.0)
    own_server.stop()
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"could not write key.*Could not connect") as failure:
        storage.write("key", b"x")
    assert time.monotonic() - started < 30
    assert "testing" not in str(failure.value)
    assert isinstance(failure.value, OSError)


def test_a_shared_folder_that_is_away_is_not_written_into_its_mount_point(tmp_path: Path) -> None:
    retries: list[Retry] = []
    share = tmp_path / "share"
    share.mkdir()
    storage = Storage(share.as_uri(), "run", patience_s=20.0, on_retry=retries.append)
    storage.check()
    (share / "run").rename(tmp_path / "unplugged")
    back = threading.Timer(1.0, lambda: (tmp_path / "unplugged").rename(share / "run"))
    back.start()
    storage.write("key", b"x")
    back.join()
    assert retries
    assert held(share) == {"run/key": b"x"}


def test_what_asking_again_cannot_change_fails_at_once(server: S3Server) -> None:
    retries: list[Retry] = []
    storage = Storage(server.url("no-such-bucket"), "run", on_retry=retries.append)
    with pytest.raises(StorageError, match="NO_SUCH_BUCKET"):
        storage.write("key", b"x")
    assert not retries


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("/shared/runs", r"without a scheme; write s3://bucket/folder.*file:///folder, or set run\.output"),
        ("ftp://host/runs", r"of scheme 'ftp'; write s3://"),
        ("s3:///runs", r"names no bucket; write s3://bucket/folder"),
        ("file://shared/runs", r"by its whole path, as in file:///shared/runs"),
        ("file:///", r"by its whole path"),
        ("s3://bucket/runs?endpoint=x", r"unknown option endpoint; s3 takes endpoint_override, region, scheme"),
        ("s3://bucket/runs?endpoint_override", r"not a URL"),
        ("file:///runs?region=x", r"unknown option region; file takes none"),
        ("s3://bucket/runs#1", r"with `#`; write %23"),
        ("gs://bucket/runs?endpoint_override=far.example:80&scheme=http", r"plain http the token can be read.*tunnel"),
        ("gs://bucket/runs?scheme=http", r"plain http the token can be read"),
    ],
)
def test_a_url_that_is_none_is_refused_by_the_config(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(ConfigError, match="run.storage.*" + message):
        config_at(url, tmp_path)


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA:HUSH@bucket/runs",
        "s3://AKIA:HU/SH@bucket/runs",
        "s3://AKIA:HUSH/runs",
        "gs://HUSH@bucket/runs",
        "s3://bucket/runs?access_key=AKIA&secret_key=HUSH",
        "s3://bucket/runs?endpoint_override=https://AKIA:HUSH@host",
        "abfs://container:HUSH@account/runs",
    ],
)
def test_a_url_with_a_secret_is_refused_and_the_secret_not_repeated(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.storage.*credentials come from the environment: AWS_ACCESS_KEY_ID") as refused:
        config_at(url, tmp_path)
    shown = "".join(traceback.format_exception(refused.value))
    assert not re.search("HU/?SH|AKIA", shown)


def test_credentials_of_the_environment_are_written_nowhere(server: S3Server, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "HUSH")
    config = config_at(server.url(f"{BUCKET}/{tmp_path.name}"), tmp_path)
    stored = StoredRun.of(config)
    assert stored is not None
    RunFolder.create(config)
    stored.send()
    assert "s3://" in (tmp_path / "run" / "config.yaml").read_text()
    for content in [*held(tmp_path).values(), *(server.read(key) for key in server.held(tmp_path.name))]:
        assert b"HUSH" not in content


def test_a_storage_is_tried_before_anything_starts(server: S3Server, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.storage=s3://absent/runs\?.*: there is no bucket 'absent'; make it"):
        StoredRun.of(config_at(server.url("absent/runs"), tmp_path))
    nowhere = (tmp_path / "nowhere").as_uri()
    with pytest.raises(ConfigError, match=rf"run\.storage={nowhere}: there is no folder .*nowhere; mount the share"):
        StoredRun.of(config_at(nowhere, tmp_path))
    with pytest.raises(ConfigError, match=r"that is run\.output itself; leave run\.storage out"):
        StoredRun.of(config_at(tmp_path.as_uri(), tmp_path))
    assert not (tmp_path / "run").exists()
    url = server.url(f"{BUCKET}/{tmp_path.name}")
    assert StoredRun.of(config_at(None, tmp_path)) is None
    assert StoredRun.of(config_at(url, tmp_path)) is not None
    assert not server.held(tmp_path.name), "the trial leaves nothing"


def test_credentials_that_are_refused_are_named(own_server: S3Server, tmp_path: Path) -> None:
    own_server.ask("reset-auth", "0")
    try:
        with pytest.raises(
            ConfigError, match=r"run\.storage=.*may not be written.*AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ):
            StoredRun.of(config_at(own_server.url(f"{BUCKET}/runs"), tmp_path))
    finally:
        own_server.ask("reset-auth", "inf")


def test_a_server_that_does_not_answer_is_named(own_server: S3Server, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("kdray.runs.storage._PATIENCE_AT_START_S", 1.0)
    config = config_at(own_server.url(f"{BUCKET}/runs"), tmp_path)
    own_server.stop()
    with pytest.raises(ConfigError, match=r"run\.storage=.*cannot be written: .*Could not connect.*start its server"):
        StoredRun.of(config)


# -------------------------------------------------------------------------------------------------- checkpoints


def checkpoint(storage: Storage, step: int, committed: bool = True) -> str:
    key = f"checkpoints/step-{step:06d}"
    part = {"state/x.pt": storage.write(f"{key}/state/x.pt", b"weights %d" % step)}
    if committed:
        commit(storage, key, {"step": step}, [part])
    return key


def test_the_marker_is_the_commit(storage: Storage) -> None:
    assert newest_checkpoint([storage]) == (None, [])
    checkpoint(storage, 4)
    checkpoint(storage, 8, committed=False)
    found, bad = newest_checkpoint([storage])
    assert found is not None
    assert (found.step, bad) == (4, [])
    checkpoint(storage, 8)
    found, _ = newest_checkpoint([storage])
    assert found is not None
    assert (found.step, found.key, found.progress) == (8, "checkpoints/step-000008", {"step": 8})


def test_a_changed_object_is_found_and_the_older_checkpoint_taken(storage: Storage) -> None:
    for step in (4, 8):
        checkpoint(storage, step)
    storage.write("checkpoints/step-000008/state/x.pt", b"Weights 8")
    found, (bad,) = newest_checkpoint([storage])
    assert found is not None
    assert found.step == 4
    assert bad.key == "checkpoints/step-000008"
    assert bad.reason.startswith("state/x.pt does not hold what was written (sha256 ")


def test_a_driver_that_is_followed_meanwhile_neither_commits_nor_deletes(storage: Storage) -> None:
    """It looks once the marker's content is written, and again before each of the deletions."""
    keys = [checkpoint(storage, step) for step in range(4)]
    before = storage.list()
    looks: list[dict[str, int]] = []

    def another_has_it(at: int) -> Callable[[], None]:
        looks.clear()

        def look() -> None:
            looks.append(storage.list())
            if len(looks) == at:
                raise LeaseLost("another driver")

        return look

    with pytest.raises(LeaseLost):
        commit(storage, keys[3], {"step": 30}, [{}], guard=another_has_it(1))
    (at_the_look,) = looks
    beside = [key for key in at_the_look if key not in before]
    assert len(beside) == storage.is_local, "what takes the marker's place was not there yet: the look came too early"
    assert storage.list() == before
    with pytest.raises(LeaseLost):
        prune_checkpoints(storage, 2, guard=another_has_it(1))
    assert storage.list() == before
    with pytest.raises(LeaseLost):
        prune_checkpoints(storage, 2, guard=another_has_it(2))
    assert [key for key in keys if storage.read(f"{key}/COMMITTED.json") is not None] == keys[1:]


def test_pruning_by_policy(storage: Storage) -> None:
    for step in (1, 2, 3, 10):
        checkpoint(storage, step)
    checkpoint(storage, 4, committed=False)
    storage.write("checkpoints/sft/model.safetensors", b"base")
    prune_checkpoints(storage, keep=2)
    assert {key.split("/")[1] for key in storage.list("checkpoints")} == {"step-000003", "step-000010", "sft"}


# ------------------------------------------------------------------------------------------------- the run's copy


def history(folder: RunFolder, steps: int, loss: float = 0.5) -> None:
    """Files as a run of so many steps leaves them."""
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.config.write_text("run: {name: run}\n")
    folder.metrics.write_text("".join(json.dumps({"step": step, "loss": loss}) + "\n" for step in range(1, steps + 1)))
    ledger = "".join(json.dumps({"step": step, "sample_ids": [step]}) + "\n" for step in range(1, steps + 1))
    (folder.path / "ledger.jsonl").write_text(ledger)
    tree(
        folder.path,
        {"events.jsonl": b"{}\n", "samples/step-1.parquet": b"rows", "tb/events": b"curve", "logs/driver.log": b"."},
    )


def test_what_changed_is_sent_and_nothing_else(storage: Storage, tmp_path: Path) -> None:
    stored = StoredRun(RunFolder(tmp_path / "here"), storage)
    history(stored.folder, 3)
    tree(
        stored.folder.path,
        {"samples/.step-2.parquet.1": b"half", "samples/step-2.partial": b"half", "peers/a/config.yaml": b""},
    )
    sent = stored.send()
    growing = ["events.jsonl", "ledger.jsonl", "metrics.jsonl", "tb/events"]
    whole = {"config.yaml", "samples/step-1.parquet"}
    assert sorted(segments_of(storage.list())) == growing
    assert {key for key in storage.list() if not key.startswith("segments/")} == whole
    assert sent == sum(storage.list().values())
    assert stored.send() == 0
    with stored.folder.metrics.open("a") as file:
        file.write('{"step": 4}\n')
    assert stored.send() == len('{"step": 4}\n')
    assert [segment.end for segment in sorted(segments_of(storage.list())["metrics.jsonl"])][-1:] == [
        stored.folder.metrics.stat().st_size
    ]
    tree(stored.folder.path, {"summary.json": b"{}", "report.html": b"<p>"})
    stored.send_results()
    assert {key for key in storage.list() if not key.startswith("segments/")} == whole | {"summary.json", "report.html"}


def test_a_resume_sends_no_samples_that_are_stored(storage: Storage, tmp_path: Path) -> None:
    """Ten thousand files of a long run would go with every restart, and its first checkpoint wait for them."""
    folder = RunFolder(tmp_path / "run")
    history(folder, 3)
    tree(folder.samples, {f"step-{step:06d}.parquet": b"rows of %d" % step for step in range(5)})
    tree(folder.evaluations, {"before.parquet": b"draws"})
    StoredRun(folder, storage).send()
    resumed = StoredRun(folder, storage)
    (folder.samples / "step-000004.parquet").write_bytes(b"rows of 9")
    (folder.samples / "step-000005.parquet").write_bytes(b"rows of 5")
    storage.delete("samples/step-000001.parquet")
    sent = resumed.send()
    assert storage.read("samples/step-000004.parquet") == b"rows of 9", "written again, of as many bytes"
    assert sent == len(b"rows of 1") * 3 + folder.config.stat().st_size
    assert {key: storage.read(key) for key in storage.list("samples")} == {
        f"samples/{path.name}": path.read_bytes() for path in folder.samples.iterdir()
    }
    assert resumed.send() == 0
    elsewhere = StoredRun(RunFolder(tmp_path / "elsewhere"), storage)
    assert elsewhere.fetch(3)
    assert elsewhere.send() == folder.config.stat().st_size, "what was fetched is stored"


@pytest.mark.parametrize(
    ("local", "sent", "step", "fetched"),
    [
        (None, (6, 0.5), 4, True),  # nothing here
        ((6, 0.5), (6, 0.5), 6, False),  # the same
        ((9, 0.5), (6, 0.5), 6, False),  # newer here: killed after the checkpoint
        ((5, 0.5), (6, 0.5), 4, False),  # older, but whole up to the step that is resumed
        ((3, 0.5), (6, 0.5), 4, True),  # another machine went further
        ((9, 0.7), (6, 0.5), 6, True),  # another machine went on, and these are what was trained here beside it
        ((9, 0.7), (6, 0.5), 0, False),  # begun anew: no step counts
        ((3, 0.5), None, 0, False),  # nothing there
    ],
)
def test_local_files_win_where_they_tell_the_stored_history(
    storage: Storage, tmp_path: Path, local, sent, step, fetched
) -> None:
    elsewhere = StoredRun(RunFolder(tmp_path / "elsewhere"), storage)
    if sent is not None:
        history(elsewhere.folder, *sent)
        elsewhere.send()
    here = StoredRun(RunFolder(tmp_path / "here"), storage)
    if local is not None:
        history(here.folder, *local)
    before = held(here.folder.path)
    assert here.fetch(step) is fetched
    if fetched:
        for name, content in held(elsewhere.folder.path).items():
            if not name.startswith("logs/"):
                assert (here.folder.path / name).read_bytes() == content, name
    else:
        assert held(here.folder.path) == before


def test_local_files_that_cannot_be_read_are_replaced(storage: Storage, tmp_path: Path) -> None:
    stored = StoredRun(RunFolder(tmp_path / "here"), storage)
    history(stored.folder, 3)
    stored.send()
    stored.folder.metrics.write_text("{broken\n")
    assert stored.fetch(3)
    assert len(stored.folder.metrics.read_text().splitlines()) == 3


def test_a_new_run_does_not_go_over_one_that_is_stored(storage: Storage, tmp_path: Path) -> None:
    stored = StoredRun(RunFolder(tmp_path / "here"), storage)
    stored.refuse_another()
    checkpoint(storage, 3)
    with pytest.raises(ConfigError, match=r"already holds a run; continue it with --resume, or choose another run\.name"):
        stored.refuse_another()
    storage.delete("checkpoints")
    history(stored.folder, 1)
    stored.send()
    with pytest.raises(ConfigError, match="already holds a run"):
        stored.refuse_another()


def test_a_start_that_saved_nothing_is_begun_anew_in_the_storage_too(storage: Storage, tmp_path: Path) -> None:
    """Settings and events alone are no run; of the events, the storage then has what the new start's folder has."""
    stored = StoredRun(RunFolder(tmp_path / "here"), storage)
    history(stored.folder, 0)
    stored.folder.append_event("start")
    stored.send()
    assert "config.yaml" in storage.list()
    stored.refuse_another()
    begun = StoredRun(RunFolder(tmp_path / "elsewhere"), storage)
    history(begun.folder, 0)
    begun.folder.append_event("start", again=True)
    begun.refuse_another()
    begun.send()
    fetched = StoredRun(RunFolder(tmp_path / "third"), storage)
    assert fetched.fetch(0)
    assert fetched.folder.events.read_bytes() == begun.folder.events.read_bytes()
    history(begun.folder, 1)
    begun.send()
    with pytest.raises(ConfigError, match="already holds a run"):
        begun.refuse_another()


def test_where_a_resume_goes_on(storage: Storage, tmp_path: Path) -> None:
    """From the storage or the run folder, whichever has more steps; never from the start where something was trained."""
    from cluster.launch import _checkpoint_to_resume

    here = RunFolder(tmp_path / "run")
    stored = StoredRun(here, storage)
    config = config_at(None, tmp_path, training={"steps": 50, "schedule": "constant"})
    assert _checkpoint_to_resume(config, stored) == (None, [])
    history(here, 9)
    with pytest.raises(
        ConfigError, match=r"trained for 9 steps, but there is no checkpoint in .*run/checkpoints.*set run\.storage"
    ):
        _checkpoint_to_resume(config, stored)
    for place, step in ((Storage.local(here.path), 4), (storage, 8), (Storage.local(here.path), 9)):
        key = f"checkpoints/step-{step:06d}"
        commit(place, key, {"step": step, "horizon": 50}, [{"x": place.write(f"{key}/x", b"x")}])
        found, _ = _checkpoint_to_resume(config, stored)
        assert found is not None
        assert (found.step, found.folder) == (step, here.path / key)


def test_a_run_is_read_from_its_url(storage: Storage, tmp_path: Path) -> None:
    stored = StoredRun(RunFolder(tmp_path / "here"), storage)
    with pytest.raises(DataError, match=r"holds no run.*config\.yaml"):
        fetch_results(storage.url, tmp_path / "none")
    history(stored.folder, 2)
    stored.send()
    storage.write("student/config.json", b"{}")
    checkpoint(storage, 2)
    copy = fetch_results(storage.url, tmp_path / "copy")
    assert held(copy).keys() == (held(stored.folder.path).keys() - {"logs/driver.log"}) | {"student/config.json"}
    assert RunFolder.open(copy).config.read_text() == "run: {name: run}\n"


def test_commands_take_the_url_of_a_run(storage: Storage, tmp_path: Path) -> None:
    recipe = "{run: {name: run}, student: {model: small}, teachers: {main: {model: big}}, data: {prompts: {type: task}}}"
    storage.write("config.yaml", recipe.encode())
    files = {"config.json": b"{}", "model.safetensors": b"weights"}
    commit(storage, "student", {}, [{name: storage.write(f"student/{name}", content) for name, content in files.items()}])
    result = CliRunner().invoke(app, ["export", storage.url, "--to", str(tmp_path / "model")])
    assert result.exit_code == 0, result.output
    exported = held(tmp_path / "model")
    assert b"`small`, distilled from `main` by kdray." in exported.pop("README.md")
    assert exported == files
    storage.delete("config.yaml")
    for command in (["export", storage.url, "--to", str(tmp_path / "other")], ["report", storage.url], ["eval", storage.url]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2
        assert "holds no run" in result.output
    result = CliRunner().invoke(app, ["report", "s3://AKIA:HUSH@bucket/runs"])
    assert result.exit_code == 2
    assert "RUN: the s3 URL holds a user name or a key" in result.output
    assert "HUSH" not in result.output


def test_peers_have_folders_of_their_own_in_the_storage(tmp_path: Path) -> None:
    from kdray.teachers.peers import peer_configs

    model = {"model": {"type": "tiny"}}
    teachers = {"other": {"type": "peer", "model": {"type": "tiny", "seed": 1}}}
    config = parse_config(
        {
            "run": {"name": "run", "output": str(tmp_path), "storage": "s3://bucket/x?region=y"},
            "student": model,
            "teachers": teachers,
        }
    )
    peer = peer_configs(config, {"other": "folder"}, "folder")["other"]
    assert peer.run.storage == "s3://bucket/x/run/peers?region=y"
    assert peer.run_folder == tmp_path / "run" / "peers" / "other"
    (tmp_path / "shared").mkdir()
    run = config.run.model_copy(update={"storage": (tmp_path / "shared").as_uri()})
    shared = config.model_copy(update={"run": run})
    for each in (shared, *peer_configs(shared, {"other": "folder"}, "folder").values()):
        stored = StoredRun.of(each)
        assert stored is not None
        stored.storage.write("config.yaml", b"")
    assert held(tmp_path / "shared").keys() == {"run/config.yaml", "run/peers/other/config.yaml"}
