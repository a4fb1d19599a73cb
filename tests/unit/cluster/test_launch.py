"""Checks of a run that come before everything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.launch import run
from kdray.config import parse_config
from kdray.errors import ConfigError
from kdray.runs.folder import RunFolder


def test_a_name_that_is_taken_is_refused_before_models_are_read(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "no-model")
    config = parse_config(
        {
            "run": {"name": "taken", "output": str(tmp_path)},
            "student": {"model": nowhere},
            "teachers": {"t": {"model": nowhere}},
        }
    )
    RunFolder.create(config)
    with pytest.raises(ConfigError, match="already holds a run; continue it with --resume"):
        run(config)
