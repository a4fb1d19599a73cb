"""Secrets by reference: environment variables whose values lie in files of the machines that need them.

What travels through Ray is a file's name. A value in a job's `runtime_env` would stand in Ray's logs and in the dashboard.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from kdray.config.base import Settings
from kdray.errors import ConfigError

VARIABLE_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"
VariableName = Annotated[str, Field(pattern=VARIABLE_NAME)]
Reader = Literal["driver", "replicas", "ranks"]

_SECRET_WORDS = re.compile(r"(^|_)(TOKEN|(API|ACCESS|SECRET|PRIVATE)?KEY|SECRET|PASSWORD|PASSWD|(PG)?PASS|PAT)(_|$)|_PWD$")
# These name a file that holds the secret.
_OF_A_FILE = ("_FILE", "_PATH")
# Not secret by itself, but of no use without the password that is.
_BESIDE_A_SECRET = ("MLFLOW_TRACKING_USERNAME",)
_OWNERS = {
    "AWS_": ("amazonaws.com",),
    "MLFLOW_": (),
    "RAY_": (),
    "HF_": ("huggingface.co",),
    "HUGGING_FACE_": ("huggingface.co",),
    "HUGGINGFACE_": ("huggingface.co",),
    "WANDB_": ("wandb.ai",),
    "GITHUB_": ("github.ai", "azure.com"),
    "GH_": ("github.ai", "azure.com"),
}
"""Domains that may be sent a key, by what its variable begins with: those of services that kdray or its libraries use."""


def _names_a_secret(name: str) -> str:
    """Check that a variable's name says that its value is a secret. Others may name code: a library, a folder of modules."""
    if not is_secret(name) and name not in _BESIDE_A_SECRET:
        raise ValueError(
            f"{name}: a secret's variable has TOKEN, KEY, SECRET, PASSWORD or PAT in its name, as in MY_API_KEY; set any other "
            "in the environment of the cluster's nodes"
        )
    return name


def check_sent(variable: str, host: str) -> None:
    """Check that a variable may be sent as a key to a host that a config names. Raises: ValueError with the remedy."""
    if not is_secret(variable):
        raise ValueError(
            f"api_key_env={variable}: a key's variable has TOKEN, KEY, SECRET, PASSWORD or PAT in its name, as in MY_API_KEY; "
            "give the key by such a one"
        )
    for beginning, domains in _OWNERS.items():
        if variable.upper().startswith(beginning) and not any(f".{host}".endswith(f".{domain}") for domain in domains):
            raise ValueError(
                f"api_key_env={variable}: would send a credential of another service to {host}; give this endpoint's key by a "
                "variable of its own"
            )


def _absolute(path: Path) -> Path:
    """Check that a path is the same from every folder. A relative one would be sent along with a job."""
    if not path.is_absolute():
        raise ValueError(f"{path}: every node reads it where it is; give an absolute path")
    return path


class SecretFile(Settings):
    file: Annotated[Path, AfterValidator(_absolute)]
    """File with the value, on every machine with a reader; a line break at its end is not part of it. With Kubernetes, a key of
    a mounted Secret."""
    read_by: Annotated[list[Reader], Field(min_length=1)] = Field(default=["driver"])
    """Processes that get the variable: the driver (keys of endpoints and trackers), replicas and ranks (`HF_TOKEN` for models
    of the hub), ranks (those of `run.storage`, with the driver)."""


SecretFiles = dict[Annotated[VariableName, AfterValidator(_names_a_secret)], SecretFile]
"""Secrets by the name of their environment variable."""


def is_secret(variable: str) -> bool:
    """True if a variable's name says that its value is a secret."""
    return bool(_SECRET_WORDS.search(variable.upper())) and not variable.upper().endswith(_OF_A_FILE)


def set_secrets(files: Mapping[str, Path]) -> None:
    """Set environment variables of this process to the contents of their files.

    A variable that is set already is set anew: the config says where its value is.

    Raises: ConfigError with the file, never with its content.
    """
    for name, file in files.items():
        os.environ[name] = _content(f"cluster.secrets.{name}.file={file}", file)


def _content(setting: str, file: Path) -> str:
    try:
        value = file.read_text(encoding="utf-8").strip("\r\n")
    except OSError as error:
        raise ConfigError(
            f"{setting}: {error.strerror or error} on {os.uname().nodename}; every machine with a process of `read_by` needs "
            "the file (a Secret mounted there, or a file that its user alone can read)"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{setting}: holds no UTF-8 text; write the value into it, and nothing else") from None
    if not value or "\n" in value or "\0" in value:
        found = "is empty" if not value else "holds more than one line"
        raise ConfigError(f"{setting}: {found}; write the value into it, and nothing else")
    return value
