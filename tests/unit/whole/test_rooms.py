"""The shape of the three packages: which room imports which, and how large rooms and files may grow.

A room is a folder directly in a package, or a module that stands there. The table below is the drawing of the house: a row may
name only rooms of rows above it, so imports point one way and there is no circle.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGES = ("kdray", "actors", "cluster")

ALLOWED = {
    # The domain. kdray itself (the package's __init__) has its own rule below.
    "kdray": "",
    "kdray.errors": "",
    "kdray.types": "",
    "kdray.config": "kdray.errors",
    "kdray.interfaces": "kdray.errors kdray.types",
    "kdray.data": "kdray.errors kdray.types kdray.config",
    "kdray.models": "kdray.errors kdray.config kdray.data",
    "kdray.rollouts": "kdray.errors kdray.types kdray.config kdray.interfaces kdray.data",
    "kdray.losses": "kdray.errors kdray.types kdray.config kdray.rollouts",
    "kdray.teachers": (
        "kdray.errors kdray.types kdray.config kdray.interfaces kdray.data kdray.models kdray.rollouts kdray.losses"
    ),
    "kdray.runs": "kdray.errors kdray.types kdray.config kdray.data kdray.models kdray.rollouts kdray.losses kdray.teachers",
    "kdray.evaluation": "kdray.errors kdray.types kdray.interfaces kdray.data kdray.rollouts kdray.runs",
    "kdray.loop": "kdray.errors kdray.types kdray.interfaces kdray.data kdray.rollouts kdray.runs",
    "kdray.capturing": (
        "kdray.errors kdray.types kdray.config kdray.interfaces kdray.models kdray.rollouts kdray.teachers kdray.runs"
    ),
    "kdray.checks": (
        "kdray.errors kdray.types kdray.config kdray.data kdray.models kdray.rollouts kdray.losses kdray.teachers kdray.runs"
    ),
    # Engines and actors.
    "actors.background_call": "",
    "actors.driver_actor": "kdray.errors",
    "actors.freed_memory": "",
    "actors.serve_controller": "kdray.errors actors.background_call",
    "actors.vllm_plugin": "kdray.rollouts actors.freed_memory",
    "actors.weights": "kdray.errors kdray.checks",
    "actors.serving": (
        "kdray.errors kdray.types kdray.config kdray.interfaces kdray.models kdray.rollouts kdray.teachers kdray.checks "
        "actors.background_call actors.freed_memory actors.vllm_plugin actors.weights"
    ),
    "actors.student": (
        "kdray.errors kdray.types kdray.config kdray.models kdray.rollouts kdray.losses kdray.runs kdray.checks "
        "actors.background_call actors.driver_actor actors.freed_memory actors.weights"
    ),
    # Commands and the cluster.
    "cluster.planning": (
        "kdray.errors kdray.config kdray.models kdray.rollouts kdray.teachers kdray.runs kdray.checks actors.background_call"
    ),
    "cluster.connect": "kdray.errors kdray.config kdray.checks actors.serve_controller cluster.planning",
    "cluster.parts": "kdray.interfaces kdray.runs kdray.teachers actors.driver_actor actors.serving",
    "cluster.engine_specs": "kdray.errors kdray.config kdray.data kdray.models kdray.runs kdray.checks actors.serving",
    "cluster.evaluation": (
        "kdray.errors kdray.types kdray.config kdray.interfaces kdray.models kdray.rollouts kdray.runs kdray.evaluation "
        "kdray.checks actors.serving cluster.parts"
    ),
    "cluster.assembly": (
        "kdray.errors kdray.config kdray.interfaces kdray.data kdray.models kdray.rollouts kdray.teachers kdray.runs "
        "actors.background_call actors.serve_controller actors.serving cluster.planning cluster.parts cluster.engine_specs"
    ),
    "cluster.checkpointing": "kdray.types kdray.runs actors.background_call actors.student",
    "cluster.stages": (
        "kdray.errors kdray.types kdray.config kdray.data kdray.rollouts kdray.runs kdray.teachers actors.student "
        "cluster.checkpointing"
    ),
    "cluster.cli_base": "kdray.errors kdray.config kdray.runs",
    "cluster.interrupt": "",
    "cluster.capture_run": (
        "kdray.errors kdray.types kdray.config kdray.data kdray.models kdray.rollouts kdray.teachers kdray.runs "
        "kdray.capturing actors.driver_actor actors.serving cluster.parts cluster.engine_specs cluster.assembly "
        "cluster.interrupt"
    ),
    "cluster.jobs": "kdray kdray.errors kdray.config kdray.teachers kdray.runs kdray.checks cluster.connect cluster.cli_base",
    "cluster.diagnosis": (
        "kdray.types kdray.config kdray.models kdray.rollouts actors.serving actors.student actors.weights "
        "cluster.connect cluster.planning"
    ),
    "cluster.batch_hooks": "kdray.types kdray.models kdray.rollouts kdray.teachers kdray.runs",
    "cluster.runner": (
        "kdray.errors kdray.types kdray.data kdray.models kdray.rollouts kdray.runs kdray.loop "
        "kdray.checks actors.background_call actors.driver_actor actors.serving actors.student cluster.planning "
        "cluster.parts cluster.engine_specs cluster.evaluation cluster.assembly cluster.checkpointing "
        "cluster.stages cluster.batch_hooks"
    ),
    "cluster.peer_runs": (
        "kdray.errors kdray.teachers kdray.runs actors.driver_actor actors.freed_memory actors.weights actors.serving "
        "cluster.parts cluster.interrupt cluster.runner"
    ),
    "cluster.launch": (
        "kdray.errors kdray.config kdray.models kdray.teachers kdray.runs kdray.capturing kdray.checks "
        "actors.driver_actor actors.serving actors.student cluster.planning cluster.connect cluster.evaluation "
        "cluster.assembly cluster.checkpointing cluster.interrupt cluster.capture_run cluster.runner cluster.peer_runs "
        "cluster.stages"
    ),
    "cluster.commands": "kdray.errors kdray.config kdray.models kdray.runs cluster.cli_base cluster.launch",
    "cluster.cli": (
        "kdray kdray.errors kdray.config kdray.models kdray.runs kdray.checks cluster.planning cluster.connect "
        "cluster.cli_base cluster.jobs cluster.diagnosis cluster.launch cluster.commands"
    ),
    "cluster.job_entrypoint": "kdray cluster.jobs cluster.cli",
    "actors.run_metrics": "kdray.config kdray.runs",
}
"""Room -> the rooms that it may import."""

API = "kdray"
"""The public API, `kdray/__init__.py`: nothing is imported when it is loaded, and anything, `cluster` too, when it is used."""

TO_BE_UNDONE: set[tuple[str, str]] = set()
"""Until the autoscaler's board has left the weight store."""

LARGEST_FILE = 500
LARGER_FILES: dict[str, int] = {}
"""Until they are split: none may grow on the way."""

LARGEST_ROOM = 16
LARGER_ROOMS = ("kdray/losses", "kdray/config")
"""One kind a file: they grow with what kdray can do."""

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
"""Module -> its file."""


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def imports(tree: ast.AST, lazy: bool = False) -> Iterator[tuple[str, int, bool]]:
    """(module of the packages, line, whether it is loaded later than the file) of every import, inside functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: import by the full name"
            # A name that is no module is a definition in it.
            found = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in FILES else str(node.module) for name in found]
        else:
            names = []
        for name in names:
            if name.split(".")[0] in PACKAGES:
                yield name, node.lineno, lazy
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        later |= isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        yield from imports(node, lazy or later)


def drawn() -> dict[tuple[str, str], list[str]]:
    """(room, room that it imports) -> the places where it does; what the API does when it is used left out."""
    edges = defaultdict(list)
    for module, path in FILES.items():
        for target, line, lazy in imports(ast.parse(path.read_text())):
            if room(target) != room(module) and not (module == API and lazy):
                edges[room(module), room(target)].append(f"{path.relative_to(ROOT)}:{line}")
    return edges


EDGES = drawn()


def test_the_table_names_every_room() -> None:
    rooms = {room(module) for module in FILES} - set(PACKAGES) | {API}
    assert set(ALLOWED) == rooms, "a room came or went: give it a row in ALLOWED, below all that it imports, or remove its row"


@pytest.mark.parametrize("name", ALLOWED)
def test_a_row_names_only_rooms_above_it(name: str) -> None:
    """So the table has neither an upward import nor a circle, and the next test holds the code to the table."""
    rows = list(ALLOWED)
    above = rows[: rows.index(name)]
    assert not set(ALLOWED[name].split()) - set(above), "imports point one way: move what is needed down, or hand it in"


@pytest.mark.parametrize("name", sorted({room(module) for module in FILES}))
def test_a_room_imports_what_its_row_names(name: str) -> None:
    row = set(ALLOWED.get(name, "").split())
    new = {
        target: places
        for (source, target), places in EDGES.items()
        if source == name and target not in row and (source, target) not in TO_BE_UNDONE
    }
    assert not new, (
        f"{name} does not import {', '.join(new)} ({new}). Hand it in from the caller, or move the definition to a room that "
        f"both may import; if the drawing itself should change, name it in {name}'s row of ALLOWED, which a reviewer will see."
    )


def test_no_row_allows_more_than_is_used() -> None:
    unused = {(name, target) for name, row in ALLOWED.items() for target in row.split()} - set(EDGES)
    assert not unused, f"no longer imported, remove from ALLOWED: {sorted(unused)}"
    assert set(EDGES) >= TO_BE_UNDONE, f"undone, remove from TO_BE_UNDONE: {TO_BE_UNDONE - set(EDGES)}"


def test_imports_are_found_wherever_they_stand() -> None:
    code = """
import os, kdray.errors
from kdray import losses
from kdray.config import Config
if TYPE_CHECKING:
    from cluster import launch
def run():
    import actors.serving.pool
    class A:
        from kdray.types import Prompt
"""
    assert list(imports(ast.parse(code))) == [
        ("kdray.errors", 2, False),
        ("kdray.losses", 3, False),
        ("kdray.config", 4, False),
        ("cluster.launch", 6, True),
        ("actors.serving.pool", 8, True),
        ("kdray.types", 10, True),
    ]
    assert len(EDGES) > 100


# ------------------------------------------------------------------------------------------------------------ sizes


def folders(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and any(path.rglob("*.py"))]


def test_kdray_is_nine_folders_and_six_files() -> None:
    assert len(folders(ROOT / "kdray")) <= 9, "put it into the room that it belongs to"
    assert len(list((ROOT / "kdray").glob("*.py"))) <= 6, "put it into the room that it belongs to"


def test_no_room_is_too_large() -> None:
    modules: dict[str, int] = defaultdict(int)
    for path in FILES.values():
        modules[str(path.parent.relative_to(ROOT))] += 1
    large = {name: count for name, count in modules.items() if count > LARGEST_ROOM and name not in LARGER_ROOMS}
    assert not large, f"{large}: at most {LARGEST_ROOM} modules a folder; group some in a folder below"


def test_no_file_is_too_long() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES.values()}
    long = {name: count for name, count in lines.items() if count > LARGER_FILES.get(name, LARGEST_FILE)}
    assert not long, f"{long}: split along the names in it; the limit is {LARGEST_FILE} lines"
    split = [name for name in LARGER_FILES if lines.get(name, 0) <= LARGEST_FILE]
    assert not split, f"short enough now, remove from LARGER_FILES: {split}"


def test_tests_mirror_the_packages() -> None:
    unit = ROOT / "tests/unit"
    assert {path.name for path in folders(unit)} == {*PACKAGES, "whole"}
    rooms = {path.parent.relative_to(unit) for package in PACKAGES for path in (unit / package).rglob("*.py")}
    strange = sorted(str(path) for path in rooms if not (ROOT / path / "__init__.py").exists())
    assert not strange, f"tests/unit has {strange}, the packages have no such folder"
