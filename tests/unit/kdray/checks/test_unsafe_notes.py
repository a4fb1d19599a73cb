"""Lines about arguments outside the allow lists."""

from __future__ import annotations

from typing import Any

import pytest

from kdray.checks.unsafe_notes import unsafe_notes
from kdray.config import parse_config


def notes(**sections: Any) -> list[str]:
    tree: dict[str, Any] = {"run": {"name": "x"}, "student": {"model": "s"}, "teachers": {"t": {"model": "m"}}}
    return list(unsafe_notes(parse_config(tree | sections)))


def test_a_config_of_the_lists_has_none() -> None:
    assert notes(teachers={"t": {"model": "m", "engine_args": {"enforce_eager": True}}}) == []


@pytest.mark.parametrize(
    ("sections", "start"),
    [
        (
            {"teachers": {"t": {"model": "m", "unsafe_engine_args": {"kernel_config": {}, "log_level": "debug"}}}},
            "teachers.t.unsafe_engine_args: kernel_config, log_level: ",
        ),
        ({"rollout": {"pool": {"unsafe_engine_args": {"log_level": "debug"}}}}, "rollout.pool.unsafe_engine_args: log_level: "),
        ({"training": {"backend": {"unsafe_options": {"aio": {}}}}}, "training.backend.unsafe_options: aio: "),
    ],
)
def test_each_setting_is_named_with_its_arguments(sections: dict[str, Any], start: str) -> None:
    (line,) = notes(**sections)
    assert line == start + "not checked by kdray; may run code, and may make records or training wrong"


def test_a_type_that_was_not_tried_is_named() -> None:
    (line,) = notes(run={"name": "x", "untried_models": ["dbrx"]})
    assert line.startswith("run.untried_models: dbrx: nobody has compared")
