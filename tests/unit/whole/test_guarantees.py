"""docs/guarantees.md: the tests that a row names are there, and run as often as the row says."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml

from tests.soak.faults import KINDS

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/guarantees.md").read_text()
EVERY_COMMIT, NIGHTLY = "every commit", "nightly"
BY_HAND = re.compile(r"by hand, (\d{4}-\d\d-\d\d)")
REFERENCE = re.compile(r"`((?:unit|integration)/[\w/]+\.py)`(?:: `\.{0,3}_?([\w]+)(?:_?\.\.\.)?`)?")


@dataclass(frozen=True)
class Row:
    """A guarantee of the page."""

    what: str
    tested: str
    runs: str


def rows() -> list[Row]:
    found = []
    header: list[str] = []
    for line in PAGE.splitlines():
        if not line.startswith("|"):
            header = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not header:
            header = cells
        elif "tested by" in header and not set(line) <= set("|-: "):
            found.append(Row(cells[0], cells[header.index("tested by")], cells[-1]))
            assert header[-1] == "runs", header
    return found


@cache
def cases_of(path: str) -> dict[str, bool]:
    """Tests of a file by name; True for those that are left out of every commit."""
    tree = ast.parse((ROOT / "tests" / path).read_text())
    whole = any("mark.full" in ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign))
    return {
        node.name: whole or any("mark.full" in ast.unparse(each) for each in node.decorator_list)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


def wanted(row: Row) -> set[str]:
    """How often what a row names runs."""
    found = set()
    for path, name in REFERENCE.findall(row.tested):
        named = {test: full for test, full in cases_of(path).items() if name in test}
        assert named, f"{path} has no test {name}"
        found |= {NIGHTLY if full else EVERY_COMMIT for full in named.values()}
    if "chaos:" in row.tested or "`make soak`" in row.tested:
        found.add(NIGHTLY)
    return found


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.what[:50])
def test_a_row_says_how_often_its_tests_run(row: Row) -> None:
    if BY_HAND.search(row.runs):
        return
    assert {each for each in (EVERY_COMMIT, NIGHTLY) if each in row.runs} == wanted(row)


def test_every_fault_of_the_chaos_run_is_in_the_table() -> None:
    parts = [part for row in rows() for part in re.findall(r"chaos: ([^;]*)", row.tested)]
    assert {kind for part in parts for kind in re.findall(r"`(\w+)`", part)} == KINDS.keys()


def test_what_is_nightly_has_a_workflow() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/nightly.yml").read_text())
    made = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    assert {"make test-full", "make chaos", "make soak"} <= set(made)
    assert "schedule" in workflow[True]  # YAML's `on`
