"""What can be captured: the answers of one teacher, to prompts by which they are found again."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.capture_run import check_capturable
from kdray.config import Config, parse_config
from kdray.errors import ConfigError


def config(turns: str, **rollout: Any) -> Config:
    tiny = {"model": {"type": "tiny"}}
    sections = {"rollout": {"alpha": 1.0} | rollout, "loss": {"type": "forward_kl"}, "data": {"turns": turns}}
    return parse_config({"run": {"name": "x"}, "student": tiny, "teachers": {"main": tiny}} | sections)


def test_rows_of_several_turns_are_not_captured_as_reference_answers() -> None:
    with pytest.raises(
        ConfigError, match=r"data\.turns=all: a capture finds reference answers by the prompt.* data\.turns=each"
    ):
        check_capturable(config("all", data_share=0.5))
    check_capturable(config("all"))
    check_capturable(config("each", data_share=0.5))
