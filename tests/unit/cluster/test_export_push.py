"""`kdray export --push`: what arrives at a hub, who may see it, and what is said where it is refused. The client is the own of
hubs; the hub is a stand-in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import save_file
from typer.testing import CliRunner

from cluster.cli import app
from kdray.config import load_config
from kdray.runs.checkpoints import commit
from kdray.runs.folder import RunFolder
from kdray.runs.storage import Storage
from tests.support.hub_server import LOCKED, TOKEN, HubServer, hub_server

ROOT = Path(__file__).parents[3]
NAME = "ann/small"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A hub, and an environment in which the client finds it and a token; its constants are read when it is imported."""
    with hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # Without it, the client sends large files to another kind of storage, by a protocol of its own.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """The folder of a run that has ended, with weights large enough that a mix-up would show."""
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run: {name: trial}\nstudent: {model: {type: tiny}}\nteachers: {t: {model: {type: tiny, layers: 4}}}\n")
    run = RunFolder.create(load_config(recipe))
    save_file({"weight": torch.arange(5000.0)}, tmp_path / "weights")
    files = {
        "config.json": b"{}",
        "model.safetensors": (tmp_path / "weights").read_bytes(),
        "adapter/adapter_model.safetensors": (tmp_path / "weights").read_bytes()[:-4],
        "tokenizer.json": "{'é': 1}".encode(),
    }
    commit(
        Storage.local(run.path),
        "student",
        {},
        [{name: Storage.local(run.path).write(f"student/{name}", content)} for name, content in files.items()],
    )
    return run


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_arrives_is_what_lies_in_the_folder(hub: HubServer, finished: RunFolder) -> None:
    result = call(finished.path, "--to", "model", "--push", NAME)
    assert result.exit_code == 0, result.output
    here = files_of(Path("model"))
    assert set(here) == {
        "README.md", "config.json", "tokenizer.json", "model.safetensors", "adapter/adapter_model.safetensors",
    }  # fmt: skip
    assert hub.files(NAME) == here
    assert yaml.safe_load(here["README.md"].split(b"---\n")[1])["library_name"] == "transformers"
    assert hub.repositories[NAME].private
    assert hub.repositories[NAME].messages == ["Student of trial, distilled by kdray"]
    assert result.stdout.splitlines() == ["model", f"{hub.url}/{NAME}/commit/{'1' * 40}"]


def test_a_command_of_its_own_takes_hub_and_token_from_the_environment(finished: RunFolder, tmp_path: Path) -> None:
    """As a user gives it; and without a folder of its own. The token is in no output, and in no file."""
    with hub_server() as hub:
        told = {
            "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"), "HF_HUB_VERBOSITY": "debug",
            "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        command = [sys.executable, "-m", "cluster.cli", "export", str(finished.path), "--push", NAME, "--public"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | told)
        assert done.returncode == 0, done.stderr
        assert not hub.repositories[NAME].private
        expected = files_of(finished.student)
        del expected["COMMITTED.json"]
        arrived = hub.files(NAME)
        assert arrived.pop("README.md").startswith(b"---\n")
        assert arrived == expected
    assert TOKEN not in done.stdout + done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_a_revision_is_a_branch_that_is_made_once(hub: HubServer, finished: RunFolder) -> None:
    hub.add(NAME, **{"notes.md": b"mine"})
    for _ in range(2):
        result = call(finished.path, "--push", NAME, "--revision", "trial/1")
        assert result.exit_code == 0, result.output
    assert hub.files(NAME) == {"notes.md": b"mine"}
    assert set(hub.files(NAME, "trial/1")) > {"notes.md", "model.safetensors"}


def test_weights_of_an_earlier_model_do_not_stay_beside_the_new_ones(hub: HubServer, finished: RunFolder) -> None:
    old = {
        "model-00001-of-00002.safetensors": b"1",
        "model.safetensors.index.json": b"{}",
        "config.json": b"old",
        "notes.md": b"n",
    }
    hub.add(NAME, **old)
    assert call(finished.path, "--to", "model", "--push", NAME).exit_code == 0
    assert hub.files(NAME) == files_of(Path("model")) | {"notes.md": b"n"}


@pytest.mark.parametrize(
    ("private", "options", "message"),
    [(False, [], "this repository is public"), (True, ["--public"], "--public: ann/small is private, and stays so")],
)
def test_nothing_is_shown_to_others_than_was_said(
    hub: HubServer, finished: RunFolder, private: bool, options: list[str], message: str
) -> None:
    hub.add(NAME, private)
    result = call(finished.path, "--to", "model", "--push", NAME, *options)
    assert (result.exit_code, hub.files(NAME), Path("model").exists()) == (2, {}, False)
    assert message in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--push", "small"], "--push small: names no owner; give OWNER/NAME"),
        (["--push", "ann/sm all"], "--push ann/sm all: Repo id must use"),
        (["--push", "a/b/c"], "--push a/b/c: Repo id must be in the form"),
        ([], "nothing says where the model goes"),
        (["--to", "model", "--public"], "--public: nothing is pushed; add --push"),
        (["--to", "model", "--revision", "dev"], "--revision dev: nothing is pushed; add --push"),
        (["--push", NAME, "--quantize", "int3"], "--quantize int3: unknown"),
        (
            ["--push", f"{LOCKED}/small"],
            f"answered 403: You don't have the rights to create a model under the namespace '{LOCKED}'",
        ),
        (["--push", f"{LOCKED}/small"], f"use a token that may write to repositories of {LOCKED}"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_anything_is_written(
    hub: HubServer, finished: RunFolder, options: list[str], message: str
) -> None:
    result = call(finished.path, *options)
    assert (result.exit_code, hub.repositories, Path("model").exists()) == (2, {}, False)
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_without_a_token_nothing_is_asked(hub: HubServer, finished: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    hub.fails["/"] = 500
    result = call(finished.path, "--push", NAME)
    assert result.exit_code == 2
    assert "no token for the hub was found; log in with `hf auth login`, or set HF_TOKEN" in result.stderr


def test_a_token_that_the_hub_does_not_know_is_refused(
    hub: HubServer, finished: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    result = call(finished.path, "--push", NAME)
    assert result.exit_code == 2
    assert f"{hub.url} answered 401: Invalid credentials in Authorization header; log in anew" in result.stderr
    assert "hf_another" not in result.output


def test_offline_is_said(hub: HubServer, finished: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result = call(finished.path, "--push", NAME)
    assert result.exit_code == 2
    assert "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set" in result.stderr


def test_a_hub_that_is_not_there_ends_with_1(hub: HubServer, finished: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    result = call(finished.path, "--push", NAME)
    assert result.exit_code == 1
    assert "http://127.0.0.1:9 could not be reached, or broke off: Connect" in result.stderr
    assert "check the network, proxies and HF_ENDPOINT" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(("status", "code"), [(403, 2), (507, 1)])
@pytest.mark.parametrize("where", ["/objects/batch", "/storage/", "/commit/"])
def test_a_push_that_breaks_off_says_where_the_model_is(
    hub: HubServer, finished: RunFolder, where: str, status: int, code: int
) -> None:
    """A file's upload fails within the client with an error of its own, whose cause says why."""
    hub.fails[where] = status
    result = call(finished.path, "--to", "model", "--push", NAME, "--revision", "dev")
    assert result.exit_code == code, result.output
    assert f"answered {status}: " in result.stderr
    assert "The model lies in model, from where `hf upload ann/small model . --revision dev` pushes it" in result.stderr
    assert Path("model/model.safetensors").is_file()
    assert "model.safetensors" not in hub.files(NAME, "dev")
