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
