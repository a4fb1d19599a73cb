"""Measurements kept as JSON lines, one a name, each with its date and commit, and as tables of the documentation.

An interrupted benchmark goes on with what its file lacks.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

Row = dict[str, Any]


def read(path: Path) -> dict[str, Row]:
    """Rows of a file by name; none if there is no file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return {row["name"]: row for row in rows}


def measure(names: Iterable[str], run: Callable[[str], Row], path: Path, *, again: bool = False) -> None:
    """Run what the file lacks, or has as failed, and keep each row at once; prints them.

    Args: run: measures a name, and says by `ok` how it went; again: run also what was measured on another commit.
    """
    commit = code_commit()
    for name in names:
        known = read(path)
        if name in known and known[name]["ok"] and not (again and known[name]["commit"] != commit):
            continue
        row = {"name": name, **run(name), "date": datetime.now(UTC).date().isoformat(), "commit": commit}
        print(json.dumps(row), flush=True)
        written = path.with_suffix(".new")
        written.write_text("".join(json.dumps(each) + "\n" for each in (known | {name: row}).values()), encoding="utf-8")
        os.replace(written, path)


def code_commit() -> str:
    """Last commit of the packages and the benchmarks, marked where their files differ from it."""
    # Without benchmarks/results: a row that is kept there changes no number.
    code = ["--", "kdray", "actors", "cluster", "benchmarks/*.py"]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return git("log", "-1", "--format=%h", "--abbrev=10", *code) + ("-dirty" if git("status", "--porcelain", *code) else "")


def origin(rows: Iterable[Row]) -> str:
    """Sentence for a table: numbers of its rows by day and commit, newest first."""
    found = Counter((row["date"], row["commit"]) for row in rows)
    groups = [f"{count} on {day} at commit {commit}" for (day, commit), count in sorted(found.items(), reverse=True)]
    return f"Rows measured on CPUs: {', '.join(groups)}."


def write_between(page: Path, mark: str, text: str) -> None:
    """Put `text` between `<!-- mark -->` and `<!-- end of mark -->` of a page."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    page.write_text(before + begin + text + "\n" + end + rest.partition(end)[2], encoding="utf-8")
