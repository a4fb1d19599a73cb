"""A model or dataset that the hub cannot give is told of at once: one question, asked of a stand-in for the hub."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from huggingface_hub import constants

from kdray.data import hub
from kdray.data.hub import check_dataset_on_hub, check_model_on_hub
from kdray.data.sources import hub_records
from kdray.errors import ConfigError, DataError
from kdray.models.families import read_config
from kdray.models.inspect import load_tokenizer, shape
from kdray.models.resolve import model_config


class Hub(BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        # The client also asks for what it keeps for itself, once a process.
        if self.path.startswith(("/api/models", "/api/datasets")):
            self.asked.append(self.path)
        status, code = (200, "") if "/good" in self.path else (404, "RepoNotFound")
        if "no-such" in self.path:
            status, code = 404, "RevisionNotFound"
        if "mirror" in self.path:
            status, code = 405, ""
        body = json.dumps({"id": "org/good", "sha": "abc", "siblings": []}).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A hub with one model, `org/good`, and an empty cache."""
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield from _used(f"http://127.0.0.1:{server.server_address[1]}", monkeypatch, tmp_path)
    server.shutdown()
    server.server_close()


def _used(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    hub._problem.cache_clear()
    yield endpoint
    hub._problem.cache_clear()


def test_what_is_there_is_asked_for_once(address: str) -> None:
    for _ in range(3):
        check_model_on_hub("org/good", None)
    check_dataset_on_hub("org/good", None, "data.prompts.name")
    assert Hub.asked == ["/api/models/org/good", "/api/datasets/org/good"]


def test_a_wrong_name_and_a_wrong_revision_are_told_apart(address: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^model 'org/bad': there is no such folder here, and {address} has no such model.*log in"
    ):
        check_model_on_hub("org/bad", None)
    with pytest.raises(ConfigError, match=rf"^model 'org/good': {address} has no revision no-such of it; correct the revision"):
        check_model_on_hub("org/good", "no-such")
    with pytest.raises(DataError, match=r"^data\.prompts\.name=org/bad: .* has no such dataset"):
        next(iter(hub_records("org/bad", None, "train", None, "data.prompts.split")))


def test_a_mirror_that_does_not_answer_the_question_is_left_to_who_downloads(address: str) -> None:
    check_model_on_hub("org/mirror", None)


@pytest.mark.parametrize("read", [lambda name: read_config(name, None), lambda name: load_tokenizer(name, None),
                                  lambda name: shape(name, None), lambda name: model_config(name, None)])  # fmt: skip
def test_everything_that_reads_a_model_asks_first(address: str, read: Any) -> None:
    with pytest.raises(ConfigError, match="has no such model"):
        read("org/bad")


def test_without_a_network_the_reason_comes_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for endpoint in _used("http://127.0.0.1:9", monkeypatch, tmp_path):
        began = time.monotonic()
        with pytest.raises(
            ConfigError, match=rf"^model 'qwen': there is no such folder here.* {endpoint} does not answer: .*; name"
        ):
            load_tokenizer("qwen", None)
        assert time.monotonic() - began < 5


def test_offline_mode_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for _ in _used("http://127.0.0.1:9", monkeypatch, tmp_path):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ConfigError, match="HF_HUB_OFFLINE forbids"):
            check_model_on_hub("org/good", None)


def test_what_is_in_the_cache_is_not_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for _ in _used("http://127.0.0.1:9", monkeypatch, tmp_path):
        folder = tmp_path / "cache" / "models--org--kept"
        (folder / "snapshots" / "abc").mkdir(parents=True)
        (folder / "snapshots" / "abc" / "config.json").write_text("{}")
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("abc")
        check_model_on_hub("org/kept", None)
        (tmp_path / "datasets" / "org___my_set").mkdir(parents=True)
        check_dataset_on_hub("org/MySet", None, "data.prompts.name")
        check_model_on_hub(str(tmp_path), None)
