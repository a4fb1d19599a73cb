"""Snippets of the documentation, executed."""

from __future__ import annotations

import pytest

from tests.support.snippets import run_page, snippets


@pytest.mark.parametrize("page", ["library.md"])
def test_every_snippet_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert snippets(page), "the page has no snippets: nothing was tested"
    run_page(page)
