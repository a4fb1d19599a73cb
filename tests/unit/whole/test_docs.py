"""Snippets of the documentation, executed."""

from __future__ import annotations

import re

import pytest

from tests.support.plugins import EXAMPLE
from tests.support.snippets import DOCS, run_page, snippets


@pytest.mark.parametrize("page", ["library.md"])
def test_every_snippet_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert snippets(page), "the page has no snippets: nothing was tested"
    run_page(page)


def test_the_page_of_plugins_shows_the_files_that_are_tested():
    """Every file of the example distribution stands in the page, as it is."""
    text = (DOCS / "extending.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^```\w+ \{file=([\w./]+)\}\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    files = {path.relative_to(EXAMPLE).as_posix(): path for path in EXAMPLE.rglob("*") if path.suffix in (".py", ".toml")}
    assert shown.keys() == files.keys() - {"kdray_example/__init__.py"}
    for name, source in shown.items():
        assert source.rstrip() == files[name].read_text(encoding="utf-8").rstrip(), f"{name} differs from the page"
