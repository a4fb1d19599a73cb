"""One Hypothesis profile for every property test: no time limit, and a blob that repeats a failure."""

from __future__ import annotations

import ast
from pathlib import Path

from hypothesis import settings

TESTS = Path(__file__).parents[2]


def test_the_loaded_profile_has_no_deadline():
    assert settings.get_current_profile_name() == "kdray"
    assert settings().deadline is None
    assert settings().print_blob


def test_no_test_sets_a_deadline_of_its_own():
    own = [
        f"{path.relative_to(TESTS)}:{node.lineno}"
        for path in sorted(TESTS.rglob("*.py"))
        if path != TESTS / "conftest.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("settings")
        if any(keyword.arg == "deadline" for keyword in node.keywords)
    ]
    assert not own, f"{own}: the profile in tests/conftest.py sets the deadline; remove it here"
