"""Tables of families in the documentation, and the files of results that they are made from."""

from __future__ import annotations

import json
import subprocess
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


def test_rows_have_the_commit_of_the_benchmarks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    def commit() -> str:
        git("add", ".")
        git("commit", "-qm", "x")
        return git("rev-parse", "--short=10", "HEAD")

    monkeypatch.setattr(kept_rows, "ROOT", tmp_path)
    git("init", "-q")
    for name in ("kdray/a.py", "actors/a.py", "cluster/a.py", "benchmarks/a.py", "benchmarks/results/rows.jsonl"):
        write(name, "")
    first = commit()
    assert kept_rows.code_commit() == first
    write("benchmarks/a.py", "changed")
    assert kept_rows.code_commit() == f"{first}-dirty"
    second = commit()
    assert kept_rows.code_commit() == second
    write("benchmarks/results/rows.jsonl", "a row")
    assert kept_rows.code_commit() == second
    commit()
    assert kept_rows.code_commit() == second
