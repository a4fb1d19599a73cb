"""How docstrings begin: with a noun or a verb in the field's terms."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[3]

HEADLESS = re.compile(r"(What|Whether|Which|Where|When|Who|How|Those|One)\b")
"""A clause in place of a noun: `What a run leaves behind` is `Files of a run`."""

LIMIT = 0.02
"""The share that may begin so."""


def docstrings() -> list[tuple[str, str]]:
    """(place, first line) of every docstring of a module, class or function."""
    found = []
    for package in ("kdray", "actors", "cluster"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    text = ast.get_docstring(node)
                    if text:
                        line = 1 if isinstance(node, ast.Module) else node.lineno
                        found.append((f"{path.relative_to(ROOT)}:{line}", text.splitlines()[0]))
    return found


def test_docstrings_begin_with_a_noun_or_a_verb():
    found = docstrings()
    assert len(found) > 1000
    headless = [f"{place}: {line}" for place, line in found if HEADLESS.match(line)]
    share = len(headless) / len(found)
    listed = "\n".join(headless)
    assert share <= LIMIT, f"{share:.1%} of {len(found)} begin with a question word, {LIMIT:.0%} may; reword some of\n{listed}"
