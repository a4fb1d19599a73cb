"""Kinds by name: built in or installed, the nearest name, collisions, and distributions that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdray.config import parse_config
from kdray.config.graders import GRADERS
from kdray.config.plugins import implemented, plugins_of, versions_of
from kdray.config.registry import REGISTRIES
from kdray.config.tasks import TASKS
from kdray.errors import ConfigError
from tests.support.plugins import write_distribution

TINY = {"type": "tiny"}

GRADER = """
from typing import Literal
from kdray.config.graders import GraderSettings
class Kind(GraderSettings):
    implementation = "one_module:made"
    type: Literal["one"] = "one"
    least: int = 0
class Untold(GraderSettings):
    implementation = "one_module:made"
def made(settings):
    raise RuntimeError("no such luck")
"""


def config(**sections: Any) -> Any:
    return parse_config({"run": {"name": "x"}, "student": {"model": TINY}, "teachers": {"t": {"model": TINY}}} | sections)


def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str, kinds: dict[str, str], **modules: str) -> None:
    write_distribution(tmp_path / "one", "one-plugin", {group: kinds}, modules)
    monkeypatch.syspath_prepend(str(tmp_path / "one"))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"data": {"grader": "last_numbr"}},
            "data.grader.type='last_numbr': no installed grader has this name; did you mean `last_number`? there are exact, "
            "last_number, math, multiple_choice, regex",
        ),
        ({"data": {"grader": {"least": 3}}}, "data.grader.type: not given; it says which grader it is: one of exact,"),
        ({"data": {"grader": {"type": "regex"}}}, "data.grader.pattern: required"),
        (
            {"data": {"grader": {"type": "regex", "pattern": "(a)", "patern": 1}}},
            "data.grader.patern: unknown key; did you mean `pattern`?",
        ),
        ({"data": {"grader": {"type": "regex", "pattern": "####"}}}, "'####': 0 groups; put the answer"),
        (
            {"rollout": {"filters": {"rules": ["distinctt"]}}},
            "rollout.filters.rules.0.type='distinctt': no installed filter has this name; did you mean `distinct`?",
        ),
        (
            {"run": {"name": "x", "trackers": [{"type": "comet"}]}},
            "run.trackers.0.type='comet': no installed tracker",
        ),
        (
            {"data": {"prompts": {"type": "task", "transfer_tasks": ["last_leters"]}}},
            "data.prompts.transfer_tasks.0='last_leters': no installed task has this name; did you mean `last_letters`?",
        ),
        (
            {"student": {"model": TINY | {"train": {"tasks": ["letters_rephrse"]}}}},
            "student.model.train.tasks.0='letters_rephrse': no installed task has this name; did you mean `letters_rephrase`?",
        ),
    ],
)
def test_a_name_that_nobody_registered_is_refused_with_the_nearest(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        config(**sections)
    assert message in str(refusal.value)


def test_a_name_stands_for_a_kind_without_other_settings() -> None:
    assert config(data={"grader": "exact"}) == config(data={"grader": {"type": "exact"}})
    again = config(run={"name": "x", "trackers": ["tensorboard"]})
    assert again == config()
    assert again == parse_config(again.model_dump(mode="json"))


def test_a_kind_of_two_distributions_is_refused_with_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first", "second"):
        write_distribution(
            tmp_path / name, f"{name}-plugin", {"kdray.graders": {"one": "m:K"}, "kdray.tasks": {"arithmetic": "m:K"}}, {}
        )
        monkeypatch.syspath_prepend(str(tmp_path / name))
    with pytest.raises(
        ConfigError, match=r"grader 'one' is registered by (first|second)-plugin 1.0, (first|second)-plugin 1.0"
    ):
        config(data={"grader": "one"})
    with pytest.raises(ConfigError, match="task 'arithmetic' is registered by kdray, .*; uninstall all but one"):
        config(data={"prompts": {"type": "task", "tasks": ["arithmetic"]}})


@pytest.mark.parametrize(
    ("kinds", "modules", "message"),
    [
        (
            {"one": "one_module:Kind"},
            {"one_module": "import a_package_that_is_not_there"},
            "grader 'one' of one-plugin 1.0 cannot be loaded from one_module:Kind: ModuleNotFoundError: No module named "
            "'a_package_that_is_not_there'; mend or uninstall it",
        ),
        ({"one": "one_module:Other"}, {"one_module": GRADER}, "AttributeError: module 'one_module' has no attribute 'Other'"),
        (
            {"one": "one_module:made"},
            {"one_module": GRADER},
            "one_module:made is no subclass of kdray.config.graders.GraderSettings",
        ),
        ({"one": "one_module:Untold"}, {"one_module": GRADER}, "declare its name in the class, type: Literal['one']"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_told_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: dict[str, str], modules: dict[str, str], message: str
) -> None:
    installed(tmp_path, monkeypatch, "kdray.graders", kinds, **modules)
    monkeypatch.delitem(__import__("sys").modules, "one_module", raising=False)
    with pytest.raises(ConfigError) as refusal:
        config(data={"grader": "one"})
    assert message in str(refusal.value)
    # What is installed and unused costs nothing.
    config()


def test_a_task_without_its_methods_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(
        tmp_path, monkeypatch, "kdray.tasks", {"half": "half_module:Half"}, half_module="class Half:\n    generate = print\n"
    )
    with pytest.raises(ConfigError, match=r"task 'half' of one-plugin 1.0: half_module:Half has no method num_prompts, grade"):
        config(data={"prompts": {"type": "task", "tasks": ["half"]}})


def test_a_kind_that_refuses_its_settings_is_told_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, monkeypatch, "kdray.graders", {"one": "one_module:Kind"}, one_module=GRADER)
    monkeypatch.delitem(__import__("sys").modules, "one_module", raising=False)
    monkeypatch.setattr(GRADERS, "_loaded", {})
    settings = config(data={"grader": {"type": "one", "least": 3}}).data.grader
    assert settings.least == 3
    with pytest.raises(
        ConfigError, match="grader 'one': one_module:made cannot be made of its settings: RuntimeError: no such luck"
    ):
        implemented(settings)


def test_built_in_kinds_are_those_of_their_names() -> None:
    for group in ("kdray.graders", "kdray.filters", "kdray.trackers"):
        # Kinds of other distributions may be loaded, too: by other tests.
        own = [kind for kind in REGISTRIES[group].known() if kind.__module__.partition(".")[0] == "kdray"]
        assert own
        assert all(kind.__module__.startswith("kdray.config") for kind in own)
    assert {TASKS.get(name).__module__.rpartition(".")[0] for name in TASKS.names()} == {"kdray.data.tasks"}


def test_plugins_that_a_config_uses(example_plugin: Path) -> None:
    assert plugins_of(config()) == []
    used = config(
        run={"name": "x", "trackers": ["tensorboard", "csv"]},
        data={"grader": "contains", "prompts": {"type": "task", "transfer_tasks": ["reversal"]}},
        rollout={"filters": {"rules": [{"type": "repetition"}]}},
    )
    assert [(plugin.group, plugin.name) for plugin in plugins_of(used)] == [
        ("kdray.filters", "repetition"),
        ("kdray.graders", "contains"),
        ("kdray.tasks", "reversal"),
        ("kdray.trackers", "csv"),
    ]
    assert versions_of(used) == {"kdray-example": "0.1.0"}
    taught = config(student={"model": TINY | {"train": {"tasks": ["letters_join", "reversal"]}}})
    assert [plugin.name for plugin in plugins_of(taught)] == ["reversal"]
