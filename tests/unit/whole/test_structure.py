"""Structure of the three packages: no function has more parameters than a reader holds in mind."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import kdray.config.run_config  # noqa: F401  (registers every kind)
from kdray.config.programs import ProgramBase
from kdray.config.registry import REGISTRIES, SettingsRegistry

ROOT = Path(__file__).parents[3]
FILES = sorted(path for package in ("kdray", "actors", "cluster") for path in (ROOT / package).rglob("*.py"))
MOST_PARAMETERS = 8

MORE_PARAMETERS = {
    ("cluster/jobs/commands.py", "submit"): "options of a command, which typer reads from its parameters",
    ("kdray/losses/chunked.py", "chunked_divergence"): "two heads with their biases, one value of an autograd function",
}
"""Functions that may have more, and why."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> Iterator[tuple[str, Function]]:
    """Every function of a file but the methods of autograd functions, whose arguments torch passes on one by one."""
    tree = ast.parse(path.read_text())
    autograd = {
        id(method)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("autograd.Function") for base in node.bases)
        for method in node.body
    }
    for node in ast.walk(tree):
        if isinstance(node, Function) and id(node) not in autograd:
            yield node.name, node


def num_parameters(function: Function) -> int:
    """Without `self` and `cls`; `*args` and `**kwargs` count one each."""
    given = function.args
    starred = [each for each in (given.vararg, given.kwarg) if each is not None]
    named = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs, *starred)]
    return len([name for name in named if name not in ("self", "cls")])


def too_long(path: Path) -> list[tuple[str, str]]:
    where = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    return [(where, name) for name, function in functions(path) if num_parameters(function) > MOST_PARAMETERS]


def test_no_function_has_more_parameters_than_fit_a_glance() -> None:
    found = [each for path in FILES for each in too_long(path)]
    assert sorted(found) == sorted(MORE_PARAMETERS)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(a, b, c, d, e, f, g, h): ...", []),
        ("def f(a, b, c, d, e, f, g, h, i): ...", ["f"]),
        ("async def f(a, b, /, c, d, e, *, f, g, h, i): ...", ["f"]),
        ("def f(a, b, c, d, e, f, g, *args, **kwargs): ...", ["f"]),
        ("class A:\n    def f(self, a, b, c, d, e, f, g, h): ...", []),
        ("class A:\n    def f(self, a, b, c, d, e, f, g, h, i): ...", ["f"]),
        ("class A(torch.autograd.Function):\n    def forward(ctx, a, b, c, d, e, f, g, h, i): ...", []),
        ("def outer():\n    def inner(a, b, c, d, e, f, g, h, i): ...", ["inner"]),
    ],
)
def test_parameters_are_counted(tmp_path: Path, source: str, found: list[str]) -> None:
    path = tmp_path / "some.py"
    path.write_text(source)
    assert [name for _, name in too_long(path)] == found


# ------------------------------------------------------------------------------------------------ kinds of settings

KINDS = {
    kind.__name__
    for registry in REGISTRIES.values()
    if isinstance(registry, SettingsRegistry)
    for kind in (registry.base, *registry.known())
} | {"TaskPrompts", "JsonlPrompts", "ParquetPrompts", "HubPrompts", "IterablePrompts", "TaskText", "JsonlText", "ParquetText"}
KINDS |= {
    "FilePrompts",
    "HubText",
    "RouteSettings",
    "EnsembleSettings",
    "StepSchedule",
    "SignalSchedule",
    "HiddenTerm",
    "AttentionTerm",
}
KINDS |= {"RelationTerm", "TinyModel", "PrunedModel", "HFTeacher", "RemoteTeacher", "CapturedTeacher"}
KINDS |= {kind.__name__ for kind in ProgramBase.__subclasses__()}

OWN_ROOMS = {"TinyModel": "kdray/models", "PrunedModel": "kdray/models"}
"""Model sources are told apart in the room that resolves them."""

AS_GIVEN = {
    ("kdray/losses/functional.py", "LossSettings"): "a loss that is given as settings, a mapping or a name",
    ("actors/student/backends/deepspeed.py", "DeepSpeedSettings"): "the backend's own settings",
}


TABLES = {
    ("kdray/config/schedules.py", "[type]"): "shapes of a schedule",
    ("kdray/data/dataset.py", "[type]"): "readers of prompts",
    ("kdray/data/pretraining.py", "[type]"): "readers of text",
    ("kdray/teachers/programs/__init__.py", "[type]"): "programs",
}
"""The one place each where kinds that only kdray has are looked up."""

NO_KIND = {("actors/vllm_plugin/worker_extension.py", "hasattr"), ("cluster/diagnosis/doctor.py", "hasattr")}
"""Modules of torch and of the operating system."""


def branches(path: Path) -> Iterator[tuple[str, int]]:
    """(kind, line) of every type test on a kind, comparison of a `type` with a text, look-up by a `type`, and `hasattr`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            names = {each.id for each in ast.walk(node.args[1]) if isinstance(each, ast.Name)}
            yield from ((name, node.lineno) for name in names & KINDS)
        if isinstance(node, ast.Match):
            yield "match", node.lineno
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "hasattr":
            yield "hasattr", node.lineno
        if isinstance(node, ast.Subscript) and ast.unparse(node.slice).endswith(".type"):
            yield "[type]", node.lineno
        if isinstance(node, ast.Compare) and ast.unparse(node.left).endswith(".type"):
            texts = [each for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            yield from ((text.value, node.lineno) for text in texts)


def test_nothing_branches_on_a_kind_outside_its_own_file() -> None:
    found = {}
    for path in FILES:
        where = path.relative_to(ROOT).as_posix()
        for kind, line in branches(path):
            known = (where, kind) in AS_GIVEN or (where, kind) in TABLES or (where, kind) in NO_KIND
            if not known and not where.startswith(OWN_ROOMS.get(kind, "-")) and kind != "cuda":
                found[f"{where}:{line}"] = kind
    assert not found, "ask a fact of the kind instead (kdray.config.losses.LossSettings, TeacherSettings, ...)"
