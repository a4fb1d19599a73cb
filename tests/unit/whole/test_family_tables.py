"""Tables of families in the documentation, and the files of results that they are made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import families, family_runs, kept_rows
from tests.support.families import FAMILIES

TABLES = [
    pytest.param(families, [each.name for each in FAMILIES], id="families"),
    pytest.param(family_runs, list(family_runs.PAIRS), id="whole runs"),
]


@pytest.mark.parametrize(("benchmark", "names"), TABLES)
def test_the_page_shows_every_pair_as_it_was_measured(benchmark, names, tmp_path):
    rows = kept_rows.read(benchmark.RESULTS)
    assert rows.keys() == set(names), "a pair was not run, or has another name"
    assert all(row["ok"] for row in rows.values())
    page = tmp_path / "page.md"
    page.write_text(benchmark.DOCS.read_text())
    kept_rows.write_between(page, benchmark.MARK, benchmark.table(rows))
    assert page.read_text() == benchmark.DOCS.read_text(), f"run {benchmark.__name__} with --table"


@pytest.mark.parametrize(("benchmark", "names"), TABLES)
def test_a_pair_that_failed_or_was_not_run_shows(benchmark, names):
    rows = kept_rows.read(benchmark.RESULTS)
    rows.pop(names[0])
    rows[names[1]] = rows[names[1]] | {"ok": False, "exit": 1, "error": "ValueError: no such layer"}
    lines = benchmark.table(rows).splitlines()
    assert "not run yet" in lines[2]
    assert "no such layer" in lines[3] or "| 1 |" in lines[3]


def test_an_interrupted_benchmark_goes_on_with_what_its_file_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, ran = tmp_path / "rows.jsonl", []

    def run(name: str) -> kept_rows.Row:
        ran.append(name)
        if name == "interrupted":
            raise KeyboardInterrupt
        return {"ok": name != "wrong"}

    def measure(*names: str, commit: str = "one", again: bool = False) -> list[str]:
        monkeypatch.setattr(kept_rows, "code_commit", lambda: commit)
        ran.clear()
        kept_rows.measure(names, run, path, again=again)
        return list(ran)

    with pytest.raises(KeyboardInterrupt):
        measure("right", "interrupted", "later")
    assert kept_rows.read(path).keys() == {"right"}
    assert measure("right", "wrong", "later") == ["wrong", "later"]
    assert not kept_rows.read(path)["wrong"]["ok"]
    assert measure("right", "wrong", "later", commit="two") == ["wrong"], "what failed is run again"
    assert measure("right", "later", commit="two", again=True) == ["right", "later"]
    assert measure("right", "later", commit="two", again=True) == []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted((row["name"], row["commit"]) for row in rows) == [("later", "two"), ("right", "two"), ("wrong", "two")]
