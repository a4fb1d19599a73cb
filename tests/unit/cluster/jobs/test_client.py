"""Runs as Ray jobs: what travels, what is refused before anything does, and how a job's end is read. No Ray is started."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

from cluster.cli import app
from cluster.job_entrypoint import requirements
from cluster.jobs import client as jobs_client
from cluster.jobs import package as jobs_package
from cluster.jobs import plugin_list
from cluster.jobs.client import (
    JobServer,
    JobState,
    free_id,
    job_exit_code,
    outcome,
    progress,
    reason,
    server_address,
    table_rows,
)
from cluster.jobs.package import forwarded, pack, unchecked, unpack_distribution, write_folder
from kdray import __version__
from kdray.config import Config, load_config, parse_config
from kdray.errors import ConfigError, DataError, KdrayError
from kdray.runs.folder import RunFolder

TINY = {"type": "tiny"}
MIB = 2**20


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A user's folder, with prompts and held-out prompts in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 3)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.jsonl").write_text('{"question": "c", "answer": "d"}\n')
    return tmp_path


def config(**sections: object) -> Config:
    tree = {
        "run": {"name": "trial", "output": "/shared/runs"},
        "data": {"prompts": {"type": "jsonl", "path": "train.jsonl"}},
        "student": {"model": TINY},
        "teachers": {"t": {"model": TINY}},
    }
    return parse_config(tree | sections)


def job(state: str = "RUNNING", exit_code: int | None = None, **changes: object) -> JobState:
    values = {
        "id": "trial",
        "name": "trial",
        "started_s": 1e9,
        "ended_s": None,
        "message": "",
        "run_folder": "/shared/runs/trial",
    }
    return JobState(**{**values, "state": state, "exit_code": exit_code, "stop_wait_s": 120} | changes)


# ------------------------------------------------------------------------------------------------- what travels


def test_relative_paths_travel_and_absolute_ones_stay(here):
    prompts = {"type": "jsonl", "path": "train.jsonl", "heldout_path": "other/train.jsonl"}
    text = {"source": {"type": "parquet", "path": "/shared/text"}}
    found = pack(config(data={"prompts": prompts}, training={"pretraining": text}, cluster={"address": "ray://here:10001"}))
    # One name, two files: neither takes the other's place.
    assert found.files == {
        "inputs/data.prompts.path/train.jsonl": Path("train.jsonl"),
        "inputs/data.prompts.heldout_path/train.jsonl": Path("other/train.jsonl"),
    }
    assert {str(path) for path in (found.config.data.prompts.path, found.config.data.prompts.heldout_path)} == set(found.files)
    assert found.remote_paths == {"training.pretraining.source.path": Path("/shared/text")}
    assert str(found.config.training.pretraining.source.path) == "/shared/text"
    assert found.config.cluster.address == "auto"
    assert found.size == 3 * 33 + 33


def test_nothing_else_of_the_config_changes(here):
    before = config(rollout={"alpha": 0.3}, teachers={"t": {"model": "org/large"}})
    after = pack(before).config
    changed = {"data": before.data, "cluster": before.cluster}
    assert after.model_copy(update=changed) == before
    assert after.run_folder == Path("/shared/runs/trial")


def test_paths_below_teachers_and_models_travel_too(here):
    (here / "answers").mkdir()
    (here / "answers" / "part.parquet").write_bytes(b"x" * 10)
    calibration = {"source": {"type": "jsonl", "path": "train.jsonl"}}
    pruned = {"type": "pruned", "source": TINY, "calibration": calibration}
    found = pack(config(student={"model": pruned}, teachers={"kept": {"type": "capture", "path": "answers"}}))
    assert found.config.teachers["kept"].path == Path("inputs/teachers.kept.path/answers")
    assert str(found.config.student.model.calibration.source.path) in found.files
    write_inputs = {place: path for place, path in found.files.items() if path == Path("answers")}
    assert list(write_inputs) == ["inputs/teachers.kept.path/answers"]


def test_a_home_folder_is_the_one_of_this_machine(here, monkeypatch):
    """As it is for data and models: a job that runs as another user, or in a container, has another."""
    monkeypatch.setenv("HOME", "/home/someone")
    found = pack(config(run={"name": "trial", "output": "~/runs"}))
    assert str(found.config.run.output) == "/home/someone/runs"


def test_a_resumed_run_finds_the_same_paths(here, monkeypatch):
    first = pack(config()).config
    (here / "sub").mkdir()
    monkeypatch.chdir(here / "sub")
    (here / "sub" / "train.jsonl").write_text("{}")
    assert pack(config()).config == first


@pytest.mark.parametrize(
    ("sections", "error", "told"),
    [
        ({"run": {"name": "trial"}}, ConfigError, ["run.output=runs", "/shared/runs"]),
        (
            {"data": {"prompts": {"type": "jsonl", "path": "none.jsonl"}}},
            DataError,
            ["data.prompts.path=none.jsonl", "absolute"],
        ),
        ({"data": {"prompts": {"type": "iterable"}}}, ConfigError, ["data.prompts.type=iterable", "file"]),
        ({"student": {"model": "other"}}, ConfigError, ["student.model=other", "hub id"]),
        ({"teachers": {"big": {"model": "./other"}}}, ConfigError, ["teachers.big.model=./other", "absolute path"]),
        ({"student": {"model": {"type": "pruned", "source": "other"}}}, ConfigError, ["student.model.source=other"]),
    ],
)
def test_what_a_job_would_lose_is_refused(here, sections, error, told):
    with pytest.raises(error) as refusal:
        pack(config(**sections))
    assert all(part in str(refusal.value) for part in told)


@pytest.mark.parametrize("output", ["/shared/runs", "s3://bucket/runs"])
def test_outputs_that_outlive_the_job(here, output):
    pack(config(run={"name": "trial", "output": output}))


def test_a_large_file_is_refused_with_its_name_and_the_limit(here):
    with (here / "train.jsonl").open("wb") as file:
        file.truncate(2 * MIB)
    limits = {"cluster": {"job": {"max_upload_mib": 2}}}
    pack(config(**limits))
    both = {"data": {"prompts": {"type": "jsonl", "path": "train.jsonl", "heldout_path": "other/train.jsonl"}}}
    with pytest.raises(ConfigError) as refusal:
        pack(config(**limits, **both))
    for part in ("data.prompts.path=train.jsonl", "2.0 MiB", "cluster.job.max_upload_mib=2", "storage that every node reads"):
        assert part in str(refusal.value)


def test_an_endpoints_model_is_no_folder(here):
    teacher = {"type": "openai", "base_url": "http://host/v1", "model": "other"}
    found = pack(config(teachers={"far": teacher}, loss={"type": "sequence"}, rollout={"alpha": 1}))
    assert found.remote_paths == {}


def test_what_cannot_be_checked_here_is_said(here, monkeypatch):
    monkeypatch.delenv("SOME_KEY", raising=False)
    teacher = {"type": "openai", "base_url": "http://host/v1", "model": "m", "api_key_env": "SOME_KEY"}
    settings = config(
        student={"model": "/shared/small"}, teachers={"far": teacher}, loss={"type": "sequence"}, rollout={"alpha": 1}
    )
    found = unchecked(settings, pack(settings))
    assert found == [
        "student.model=/shared/small is not on this machine",
        "teachers.far.api_key_env=SOME_KEY is not set on this machine",
    ]
    monkeypatch.setenv("SOME_KEY", "k")
    settings = config(
        student={"model": str(here / "other")}, teachers={"far": teacher}, loss={"type": "sequence"}, rollout={"alpha": 1}
    )
    assert unchecked(settings, pack(settings)) == []


def test_the_environment_of_a_job(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror")
    job_settings = {"stop_wait_s": 45, "forward_env": ["HF_ENDPOINT"]}
    variables = {"HF_ENDPOINT": "http://mirror", "RAY_JOB_STOP_WAIT_TIME_S": "45"}
    assert forwarded(config(cluster={"job": job_settings})) == variables
    # The value goes with the job, never into a file.
    assert "mirror" not in config(cluster={"job": job_settings}).dump()
    monkeypatch.delenv("HF_ENDPOINT")
    with pytest.raises(ConfigError, match="cluster.job.forward_env=HF_ENDPOINT.*not set here"):
        forwarded(config(cluster={"job": job_settings}))
    with pytest.raises(ConfigError, match="cluster.job.forward_env=RAY_AUTH_TOKEN"):
        config(cluster={"job": {"forward_env": ["RAY_AUTH_TOKEN"]}})


def test_a_secret_goes_by_its_file_and_never_by_its_value(here, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_value")
    with pytest.raises(ConfigError, match=r"forward_env=HF_TOKEN: .*cluster\.secrets=\{HF_TOKEN: \{file: PATH\}\}") as refusal:
        forwarded(config(cluster={"job": {"forward_env": ["HF_TOKEN"]}}))
    assert "hf_value" not in str(refusal.value)
    file = tmp_path / "key"
    teacher = {"type": "openai", "base_url": "https://far/v1", "model": "m", "api_key_env": "FAR_KEY"}
    monkeypatch.delenv("FAR_KEY", raising=False)
    settings = config(
        student={"model": str(here / "other")},
        teachers={"far": teacher},
        loss={"type": "sequence"},
        rollout={"alpha": 1},
        cluster={"secrets": {"FAR_KEY": {"file": str(file)}}},
    )
    # The file is on the cluster: what needs it is checked by the job.
    assert unchecked(settings, pack(settings)) == [f"cluster.secrets.FAR_KEY.file={file} is not on this machine"]
    file.write_text("the-value")
    assert unchecked(settings, pack(settings)) == []
    assert forwarded(settings) == {"RAY_JOB_STOP_WAIT_TIME_S": "120"}
    assert "the-value" not in settings.dump()


PROBE = """
import json
from importlib.metadata import entry_points, version
import kdray, actors, cluster
points = {point.name: point.value for point in entry_points(group="vllm.general_plugins")}
print(json.dumps([kdray.__file__, points["kdray"], version("kdray")]))
"""


@pytest.mark.parametrize(("given", "in_the_job"), [(None, 40.0), (15.0, 15.0)])
def test_a_job_knows_how_long_it_has_after_a_stop(here, given, in_the_job):
    assert pack(config(cluster={"grace_s": given, "job": {"stop_wait_s": 40}})).config.cluster.grace_s == in_the_job


def test_the_folder_is_an_installed_distribution_with_its_entry_points(here, tmp_path):
    """A Python that sees this folder and nothing else of kdray finds the plugin, as vLLM's processes on a node do."""
    folder = tmp_path / "job"
    folder.mkdir()
    found = pack(config())
    write_folder(found, folder)
    assert not [path for path in folder.rglob("*") if path.name in ("tests", "__pycache__", "build")]
    with contextlib.chdir(folder):
        assert load_config("config.yaml") == found.config
    assert (folder / "inputs/data.prompts.path/train.jsonl").read_text() == (here / "train.jsonl").read_text()
    # -S: without site-packages, so that the installation of the tests is out of sight.
    done = subprocess.run([sys.executable, "-S", "-c", PROBE], cwd=folder, capture_output=True, text=True, timeout=60, env={})
    assert done.returncode == 0, done.stderr
    file, plugin, version = json.loads(done.stdout)
    assert Path(file).parents[1].resolve() == folder.resolve()
    assert plugin == "actors.vllm_plugin.mixture_model:register"
    assert version == __version__


def test_an_installed_version_is_shipped_without_a_working_tree(tmp_path, monkeypatch):
    source = tmp_path / "site-packages"
    unpack_distribution(source)
    other = source / "rich"
    other.mkdir()
    (other / "__init__.py").write_text("")
    from importlib.metadata import Distribution

    (info,) = source.glob("kdray-*.dist-info")
    monkeypatch.setattr("kdray.__file__", str(source / "kdray" / "__init__.py"))
    monkeypatch.setattr(jobs_package, "distribution", lambda name: Distribution.at(info))
    target = tmp_path / "job"
    unpack_distribution(target)
    assert (target / "cluster" / "job_entrypoint.py").is_file()
    assert (target / "kdray" / "py.typed").is_file(), "type checkers would not read the annotations"
    assert (target / info.name / "entry_points.txt").is_file()
    assert not (target / "rich").exists()


def test_a_tree_that_cannot_be_built_is_told_in_a_line(tmp_path):
    root = tmp_path / "tree"
    for name in jobs_package.PACKAGES:
        (root / name).mkdir(parents=True)
    for name in ("README.md", "LICENSE"):
        (root / name).write_text("")
    (root / "pyproject.toml").write_text('[project]\nname = 3\nversion = "1"\n')
    (tmp_path / "out").mkdir()
    with pytest.raises(KdrayError, match=r"no wheel could be built of it: .*name.*setuptools") as refusal:
        jobs_package.build_wheel(root, tmp_path / "out")
    assert "\n" not in str(refusal.value)


# -------------------------------------------------------------------------------------------------- the driver


def distribution_of(folder: Path, *requires: str) -> None:
    info = folder / "kdray-9.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: kdray", "Version: 9", *(f"Requires-Dist: {one}" for one in requires)]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


def test_missing_packages_and_other_versions_are_told_apart(tmp_path, monkeypatch):
    distribution_of(
        tmp_path, "no-such-package>=1", "numpy<1", "typer>=0", "vllm==9; extra == 'gpu'", "absent; python_version < '3'"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    lacking, other = requirements()
    assert lacking == ["no-such-package"]
    (line,) = other
    assert line.startswith("numpy ")
    assert line.endswith("kdray asks for <1")


def test_a_node_without_requirements_gives_one_message_and_2(tmp_path):
    """The real entry in a Python that has `packaging` alone of all that kdray needs."""
    unpack_distribution(tmp_path)
    import packaging

    (tmp_path / "packaging").symlink_to(Path(packaging.__file__).parent)
    command = [sys.executable, "-S", "-m", "cluster.job_entrypoint", "run", "config.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, env={})
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (message,) = done.stderr.splitlines()
    assert re.match(r"kdray: on the node of the job's driver, \S+python\S*, the `python` that .*, lacks ray, torch,", message)
    assert "start Ray with the environment activated" in message
    assert "pip install 'kdray[gpu]'" in message
    assert done.stdout == "kdray ended with exit code 2\n"


def test_a_node_without_the_plugins_of_the_config_gives_one_message_and_2(here, tmp_path, monkeypatch, example_plugin):
    """What is installed where a job was submitted need not be on the cluster."""
    data = {"prompts": {"type": "jsonl", "path": "train.jsonl"}, "grader": "contains"}
    tracked = {"name": "trial", "output": "/shared/runs", "trackers": ["csv"]}
    folder = tmp_path / "job"
    write_folder(pack(config(run=tracked, data=data)), folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    command = [sys.executable, "-m", "cluster.job_entrypoint", "validate", "config.yaml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == (
        "kdray: the node of the job's driver lacks kdray-example 0.1.0 (kdray.graders: contains, kdray.trackers: csv); the "
        "config uses it: install it on every node, or start the cluster from an image that has it\n"
    )
    assert done.stdout == "kdray ended with exit code 2\n"
    # Where they are installed, they are no matter.
    assert plugin_list.compare(folder) == ([], [])
    listed = json.loads((folder / plugin_list.FILE).read_text())
    (folder / plugin_list.FILE).write_text(json.dumps([listed[0] | {"version": "0.2"}]))
    assert plugin_list.compare(folder) == (
        [],
        ["kdray-example 0.1.0 is installed here; the job was submitted with 0.2"],
    )
    write_folder(pack(config()), tmp_path / "plain")
    assert plugin_list.compare(tmp_path / "plain") == plugin_list.compare(tmp_path) == ([], [])


def test_the_entry_hands_on_the_commands_exit_code(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "cluster.job_entrypoint", "validate", str(tmp_path / "none.yaml")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1] == "kdray ended with exit code 2"
    assert "no such config file" in done.stderr


# -------------------------------------------------------------------------------------------------- job server


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://head:8265", "http://head:8265"),
        ("http://head:8265/", "http://head:8265"),
        ("http://head", "http://head:8265"),
        ("head:9000", "http://head:9000"),
        ("head", "http://head:8265"),
        ("https://head", "https://head"),
    ],
)
def test_addresses(given, url):
    assert server_address(given, insecure=True) == url


@pytest.mark.parametrize(
    "given", ["localhost", "http://127.0.0.1:8265", "http://127.8.9.1:1", "http://[::1]:8265", "https://head"]
)
def test_what_nobody_can_read_on_the_way_needs_no_word(given):
    assert server_address(given)


@pytest.mark.parametrize(
    "given", ["http://head:9000", "head:9000", "http://10.0.0.1:9000", "http://localhost.example.com:9000"]
)
def test_plain_http_to_another_machine_is_refused_unless_it_is_accepted(given):
    with pytest.raises(ConfigError, match=rf"^--address={given}: plain http.*ssh -L 8265:localhost:9000 .*--insecure"):
        server_address(given)
    assert server_address(given, insecure=True)


@pytest.mark.parametrize("command", [["status"], ["stop", "trial"], ["logs", "trial"]])
def test_every_command_takes_the_acceptance(command, monkeypatch):
    asked = []
    monkeypatch.setattr(jobs_client, "JobServer", lambda address, insecure: asked.append((address, insecure)) or server([]))
    CliRunner().invoke(app, [*command, "--address", "http://head:1", "--insecure"])
    assert asked == [("http://head:1", True)]


def test_the_address_comes_from_rays_variables_too(monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "https://one:1")
    assert server_address(None) == "https://one:1"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://two:2")
    assert server_address(None) == "https://two:2"
    assert server_address("https://three:3") == "https://three:3"
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(ConfigError, match="--address: which cluster"):
        server_address(None)


@pytest.mark.parametrize("wrong", ["ray://head:10001", "http://", "http://head:port", "http://head:8265/jobs", "auto://x"])
def test_wrong_addresses(wrong):
    with pytest.raises(ConfigError, match="http://head:8265"):
        server_address(wrong)


def test_a_secret_in_an_address_is_not_repeated():
    with pytest.raises(ConfigError) as refusal:
        server_address("http://user:hidden@head:8265")
    assert "hidden" not in str(refusal.value)


@pytest.mark.parametrize(
    ("used", "expected"),
    [(set(), "a"), ({"a"}, "a-2"), ({"a", "a-2"}, "a-3"), ({"a", "a-3"}, "a-2"), ({"b", None}, "a")],
)
def test_ids_are_the_name_with_a_number_where_it_is_taken(used, expected):
    assert free_id("a", used) == expected


def server(jobs: list[SimpleNamespace], logs: dict[str, str] | None = None) -> JobServer:
    """A client whose job server is these lists."""
    client = JobServer.__new__(JobServer)
    client.address, client.insecure = "http://head:8265", True
    client._client = SimpleNamespace(
        list_jobs=lambda: jobs,
        get_job_info=lambda name: next(job for job in jobs if job.submission_id == name),
        get_job_logs=lambda name: (logs or {})[name],
    )
    return client


def listed(
    submission_id: str, name: str | None, started: int, status: str = "SUCCEEDED", folder: str = "/shared/runs/x"
) -> SimpleNamespace:
    metadata = {} if name is None else {"kdray_job": name, "kdray_run_folder": folder, "kdray_stop_wait_s": "9"}
    return SimpleNamespace(
        submission_id=submission_id,
        status=SimpleNamespace(value=status),
        driver_exit_code=None,
        start_time=started,
        end_time=None,
        message=None,
        metadata=metadata,
    )


def test_a_name_means_the_newest_job_of_the_run():
    jobs = [listed("a", "a", 1), listed("a-2", "a", 5), listed("stranger", None, 9), listed("a-3", "a-2", 3)]
    found = server(jobs)
    assert [job.id for job in found.jobs()] == ["a-2", "a-3", "a"]
    assert found.job("a").id == "a-2"
    # A run's name goes before an id.
    assert found.job("a-2").id == "a-3"
    assert found.job("a-3").id == "a-3"
    with pytest.raises(ConfigError, match="stranger: no such job at http://head:8265; jobs of kdray there: a, a-2"):
        found.job("stranger")


@pytest.mark.parametrize(
    ("name", "folder", "asked", "told"),
    [
        ("trial", "/elsewhere", "trial", "^run.name=trial: .* with this name; .* choose another run.name$"),
        ("mine", "/elsewhere", "mine", "^--name=mine: .* with this name; .* choose another --name$"),
        # Another name does not help: the folder is the run's.
        (
            "other",
            "/shared/runs/trial",
            "mine",
            "^run.name=trial: .* folder, /shared/runs/trial; .* another run.name or run.output$",
        ),
        (
            "mine",
            "/shared/runs/trial",
            "mine",
            "^run.name=trial: .* folder, /shared/runs/trial; .* another run.name or run.output$",
        ),
    ],
)
def test_two_jobs_never_share_a_name_or_a_folder(here, name, folder, asked, told):
    settings = config()
    running = server([listed("one", name, 1, "RUNNING", folder)])
    with pytest.raises(ConfigError, match="job one is RUNNING.*kdray stop one") as refusal:
        running.submit(settings, pack(settings), {}, asked)
    assert re.search(told, str(refusal.value)), refusal.value


def test_a_followed_log_is_printed_once_whatever_the_connection_does(monkeypatch):
    monkeypatch.setattr(jobs_client, "_RECONNECT_S", 0.0)
    monkeypatch.setattr(jobs_client, "_POLL_S", 0.0)
    entry = listed("trial", "trial", 1, "RUNNING")
    client = server([entry])
    tries = iter([["one\ntw", None], [None], ["one\n", "two\nth", None], ["one\ntwo\nthree\n"]])

    async def tail(name):
        for text in next(tries):
            if text is None:
                raise RuntimeError("WebSocket connection closed unexpectedly")
            yield text
        entry.status = SimpleNamespace(value="SUCCEEDED")

    client._client.tail_job_logs = tail
    written: list[str] = []
    assert client.follow(client.job("trial"), written.append).state == "SUCCEEDED"
    assert "".join(written) == "one\ntwo\nthree\n"


# ------------------------------------------------------------------------------------------------ how it ended

STOPPED = """distill 4/12  loss 0.5
interrupt_requested
interrupted step=5
interrupted: stopped at step 5 after writing a checkpoint; continue with --resume
kdray ended with exit code 130
"""
FAILED = "sft 2/4\nkdray: /shared/runs/trial: already holds a run; continue it with --resume\nkdray ended with exit code 2\n"


@pytest.mark.parametrize(
    ("state", "ray_code", "log", "code", "told"),
    [
        (
            "SUCCEEDED",
            0,
            "run folder: x\nkdray ended with exit code 0\n",
            0,
            "SUCCEEDED, complete; run folder /shared/runs/trial",
        ),
        ("STOPPED", None, STOPPED, 130, "STOPPED with exit code 130: interrupted: stopped at step 5"),
        # Asked to stop while it was measuring for the last time: nothing is missing.
        ("STOPPED", None, "interrupted phase=control\nkdray ended with exit code 0\n", 0, "STOPPED, complete"),
        (
            "STOPPED",
            None,
            "distill 4/12\ninterrupt_requested\n",
            None,
            "killed before it could write a checkpoint within cluster",
        ),
        ("FAILED", 2, FAILED, 2, "FAILED with exit code 2: kdray: /shared/runs/trial: already holds a run"),
        ("FAILED", -9, "distill 4/12\n", 1, "FAILED with exit code 1: driver died"),
        ("FAILED", None, "", None, "FAILED: driver died"),
    ],
)
def test_how_a_job_ended(state, ray_code, log, code, told):
    ended = job(state, ray_code, message="driver died, last available logs (truncated to 20,000 chars):\nx")
    assert job_exit_code(ended, log) == code
    assert told in outcome(ended, log)


def test_progress_is_the_newest_line_of_it():
    log = "sft: 4 to do\nsft 4/4  loss 1\nevaluation name=before 1/2\ndistill 3/12  loss 0.5\ncheckpoint step=3\n"
    assert progress(log) == "distill 3/12"
    assert progress(log + "distill 4/12, 1 day, 4:09:30 left  loss 0.5\n") == "distill 4/12, 1 day, 4:09:30 left"
    assert progress("start resumed_step=None\n") is None
    assert progress("start resumed_step=None\nstill starting engines: 20 s\n") == "starting engines: 20 s"
    assert progress("prepare letters 40/200\n") == "prepare letters 40/200"
    assert progress(log + "still distill 4/12: 30 s\n") == "distill 4/12: 30 s"
    assert progress(log + "still finishing distill: 10 s\n") == "finishing distill: 10 s"
    assert reason(log) is None


def test_a_row_of_the_table():
    ended = job("STOPPED", ended_s=1e9 + 3725.4)
    ((name, state, code, done, started, duration),) = table_rows({ended: STOPPED})
    assert (name, state, code, done, duration) == ("trial", "STOPPED", "130", "distill 4/12", "1:02:05")
    assert started.startswith("2001-09-")


def test_a_log_that_cannot_be_had_costs_its_own_row_alone(monkeypatch):
    jobs = [listed("lost", "a", 3, "STOPPED"), listed("there", "b", 2, "STOPPED"), listed("gone", "c", 1, "RUNNING")]
    client = server(jobs)

    def logs(name):
        if name != "there":
            raise RuntimeError("Traceback\nthe job's node is dead")
        return STOPPED

    client._client.get_job_logs = logs
    monkeypatch.setattr(jobs_client, "JobServer", lambda address, insecure: client)
    result = CliRunner().invoke(app, ["status"])
    assert result.exit_code == 0, result.output
    rows = {
        cells[1]: cells[2:5] for line in result.stdout.splitlines() if len(cells := [c.strip() for c in line.split("│")]) > 5
    }
    assert rows["there"] == ["STOPPED", "130", "distill 4/12"]
    assert rows["lost"] == ["STOPPED", "", "no log"]
    assert rows["gone"] == ["RUNNING", "", "no log"]
    told = " ".join(result.stdout.split())
    for job_id, state in (("lost", "STOPPED"), ("gone", "RUNNING")):
        assert (
            f"{job_id}: {state}; its log cannot be had: the job server at http://head:8265 says: the job's node is dead" in told
        )
    assert "killed" not in told, "only the log could say so"


# -------------------------------------------------------------------------------------------------- the command


def test_a_wrong_config_needs_no_cluster(here, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump({"run": {"name": "trial"}, "student": {"model": TINY}, "teachers": {"t": {"model": TINY}}})
    )
    result = CliRunner().invoke(app, ["submit", str(recipe), "--address", "http://127.0.0.1:1"])
    assert result.exit_code == 2
    assert result.stderr.startswith("kdray: run.output=runs: ")


def test_a_name_that_is_taken_is_refused_before_the_cluster_is_asked(here, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    run = {"name": "trial", "output": str(tmp_path / "runs")}
    recipe.write_text(yaml.safe_dump({"run": run, "student": {"model": TINY}, "teachers": {"t": {"model": TINY}}}))
    RunFolder.create(load_config(recipe)).append_metrics({"step": 1})
    nowhere = ["--address", "http://127.0.0.1:1"]
    result = CliRunner().invoke(app, ["submit", str(recipe), *nowhere])
    assert result.exit_code == 2
    assert result.stderr.endswith("runs/trial: already holds a run; continue it with --resume, or choose another run.name\n")
    resumed = CliRunner().invoke(app, ["submit", str(recipe), "--resume", *nowhere])
    assert "does not answer" in resumed.stderr


@pytest.mark.parametrize("command", [["status"], ["stop", "trial"], ["logs", "trial"]])
def test_nobody_at_the_address_is_one_message(command):
    result = CliRunner().invoke(app, [*command, "--address", "http://127.0.0.1:1"])
    assert result.exit_code == 2
    (message,) = result.stderr.splitlines()
    assert message.startswith("kdray: --address=http://127.0.0.1:1 does not answer: ")


def test_ray_is_imported_after_its_variables_are_set():
    """Ray reads RAY_AUTH_MODE once, when it is imported: a token given before by the environment would not be sent."""
    code = "import sys, cluster.cli, cluster.jobs.commands, cluster.jobs.client; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
