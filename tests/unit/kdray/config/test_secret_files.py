"""Secrets by reference: what a process reads, and what of it is told when it cannot."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from kdray.config import parse_config
from kdray.config.secret_files import is_secret, set_secrets
from kdray.errors import ConfigError

MODEL = {"model": {"type": "tiny"}}


RUN_CODE = (
    "LD_PRELOAD",
    "PYTHONPATH",
    "PATH",
    "VLLM_LOGGING_CONFIG_PATH",
    "GIT_CONFIG_GLOBAL",
    "RAY_RUNTIME_ENV_HOOK",
    "BASH_ENV",
)
"""Variables with which a file becomes code of a process, or of one that it starts."""


def config(secrets: dict[str, Any]) -> Any:
    return parse_config({"run": {"name": "x"}, "student": MODEL, "teachers": {"t": MODEL}, "cluster": {"secrets": secrets}})


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("HF_TOKEN", True),
        ("OPENAI_API_KEY", True),
        ("AWS_SECRET_ACCESS_KEY", True),
        ("AWS_ACCESS_KEY_ID", True),
        ("mlflow_tracking_password", True),
        ("OPENAI_APIKEY", True),
        ("GITHUB_PAT", True),
        ("DB_PASS", True),
        ("PGPASS", True),
        ("DB_PWD", True),
        ("PWD", False),
        ("NCCL_PATH", False),
        ("COMPASS", False),
        ("GOOGLE_APPLICATION_CREDENTIALS", False),
        ("TOKENIZERS_PARALLELISM", False),
        ("HF_ENDPOINT", False),
        ("MONKEY", False),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", False),
        ("RAY_AUTH_TOKEN_PATH", False),
    ],
)
def test_names_that_say_secret(name: str, secret: bool) -> None:
    assert is_secret(name) is secret


def test_each_process_gets_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: tmp_path / name for name in ("HF_TOKEN", "MY_KEY")}
    files["HF_TOKEN"].write_text("hub\n")
    files["MY_KEY"].write_bytes(b"endpoint\r\n")
    cluster = config(
        {
            "HF_TOKEN": {"file": str(files["HF_TOKEN"]), "read_by": ["driver", "replicas"]},
            "MY_KEY": {"file": str(files["MY_KEY"])},
        }
    ).cluster
    assert cluster.secret_files("driver") == files
    assert cluster.secret_files("replicas") == {"HF_TOKEN": files["HF_TOKEN"]}
    assert cluster.secret_files("ranks") == {}
    monkeypatch.setenv("HF_TOKEN", "an older one")
    monkeypatch.delenv("MY_KEY", raising=False)
    set_secrets(cluster.secret_files("replicas"))
    assert (os.environ["HF_TOKEN"], "MY_KEY" in os.environ) == ("hub", False)
    monkeypatch.setenv("MY_KEY", "")  # so that it is undone
    set_secrets(cluster.secret_files("driver"))
    assert os.environ["MY_KEY"] == "endpoint"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory on .*; every machine with a process of `read_by` needs the file"),
        (b"", "is empty; write the value"),
        (b"\n", "is empty"),
        (b"VERY-SECRET\nand more", "holds more than one line"),
        (b"VERY-SECRET\xff", "holds no UTF-8 text"),
    ],
)
def test_a_file_without_a_value_is_named_and_not_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, message: str
) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^cluster\.secrets\.MY_KEY\.file={re.escape(str(file))}: {message}") as refusal:
        set_secrets({"MY_KEY": file})
    assert "SECRET" not in str(refusal.value)
    assert "MY_KEY" not in os.environ


@pytest.mark.parametrize(
    ("secrets", "message"),
    [
        ({"A-B": {"file": "/k"}}, "cluster.secrets"),
        ({"KEY": {"file": "k"}}, "k: every node reads it where it is; give an absolute path"),
        ({"KEY": {"file": "~/k"}}, "give an absolute path"),
        ({"KEY": {"file": "/k", "read_by": []}}, "read_by"),
        ({"KEY": {"file": "/k", "read_by": ["teacher"]}}, "read_by"),
        ({"KEY": {"value": "hunter2"}}, "cluster.secrets.KEY"),
        *(({name: {"file": "/k"}}, f"{name}: a secret's variable has TOKEN, KEY") for name in RUN_CODE),
    ],
)
def test_wrong_references(secrets: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        config(secrets)
