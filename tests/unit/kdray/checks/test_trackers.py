"""Trackers that cannot work are refused before anything starts, with the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.launch import run
from kdray.checks.trackers import check_trackers
from kdray.config import Config, parse_config, trackers
from kdray.errors import ConfigError


def config(tmp_path: Path, *chosen: Any) -> Config:
    nowhere = str(tmp_path / "no-model")
    told = {"name": "told", "output": str(tmp_path), "trackers": list(chosen)}
    return parse_config({"run": told, "student": {"model": nowhere}, "teachers": {"t": {"model": nowhere}}})


@pytest.fixture(autouse=True)
def without_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_ends_the_command_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    told = config(tmp_path, "tensorboard", name)
    message = f"run.trackers.1.type={name}: the package {name} is not installed; pip install 'kdray[{name}]'"
    with pytest.raises(ConfigError) as refused:
        run(told)
    assert message in str(refused.value)
    assert not told.run_folder.exists()
    (tmp_path / "recipe.yaml").write_text(told.dump())
    result = CliRunner().invoke(app, ["validate", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 2
    assert message in result.stderr


def test_weights_and_biases_without_a_key_is_refused_unless_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"run.trackers.0.type=wandb: there is no API key; set WANDB_API_KEY"):
        check_trackers(config(tmp_path, "wandb"))
    check_trackers(config(tmp_path, {"type": "wandb", "mode": "offline"}))
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 123\n")
    check_trackers(config(tmp_path, "wandb"))
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.here")
    with pytest.raises(ConfigError, match="no API key"):
        check_trackers(config(tmp_path, "wandb"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(config(tmp_path, "wandb"))


def test_trackers_of_kdray_itself_need_nothing(tmp_path: Path) -> None:
    check_trackers(config(tmp_path, "tensorboard", "prometheus"))


@pytest.mark.parametrize(
    ("uri", "variable", "given", "refused"),
    [
        ("http://mlflow.example:5000", "MLFLOW_TRACKING_TOKEN", {}, True),
        ("http://mlflow.example:5000", "MLFLOW_TRACKING_PASSWORD", {}, True),
        ("http://mlflow.example:5000", "MLFLOW_TRACKING_TOKEN", {"unsafe_http": True}, False),
        ("http://mlflow.example:5000", None, {}, False),
        ("http://127.0.0.1:5000", "MLFLOW_TRACKING_TOKEN", {}, False),
        ("https://mlflow.example", "MLFLOW_TRACKING_TOKEN", {}, False),
    ],
)
def test_mlflow_s_token_goes_over_plain_http_only_to_this_machine(
    uri: str, variable: str | None, given: dict[str, Any], refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "hush")
    by_config = config(tmp_path, {"type": "mlflow", "tracking_uri": uri} | given)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for told in (by_config, config(tmp_path, {"type": "mlflow"} | given)):
        if refused:
            with pytest.raises(ConfigError, match=rf"by plain http to mlflow.example {variable} can be read.*unsafe_http=true"):
                check_trackers(told)
        else:
            check_trackers(told)


def test_a_password_in_mlflow_s_address_is_told_and_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hush@mlflow.example")
    with pytest.raises(ConfigError, match="the password in MLFLOW_TRACKING_URI can be read") as caught:
        check_trackers(config(tmp_path, "mlflow"))
    assert "hush" not in str(caught.value)
