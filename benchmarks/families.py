"""Exactness of the families: every pair of `tests/support/families.py` through engine, update and export; a table of the gaps.

    python -m benchmarks.families [--only NAME ...] [--again] [--out FILE]
    python -m benchmarks.families --table [--out FILE]        # writes the table of docs/models.md from the file

Every pair runs in a process of its own. Results are kept as JSON lines; a pair that is in the file and passed is not run again,
so that an interrupted run continues; with `--again` only if it was measured on this commit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import kept_rows
from tests.support.families import FAMILIES, family

_MARK = "RESULT "
RESULTS = kept_rows.ROOT / "benchmarks" / "results" / "families.jsonl"
DOCS = kept_rows.ROOT / "docs" / "models.md"
MARK = "tried families"
_ERROR = re.compile(r"\w+(Error|Exception): ")


def run_one(name: str) -> dict[str, Any]:
    """Result of a pair, in this process."""
    from cluster.diagnosis.exactness import try_pair

    pair = family(name)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        gaps = asyncio.run(try_pair(pair.spec(folder), folder, reference=pair.reference(folder)))
    return {**asdict(gaps), "ok": not gaps.over(pair.tolerance) and gaps.moved > pair.tolerance}


def run_apart(name: str) -> dict[str, Any]:
    """Result of a pair, from a process of its own; the last line of its error if it fails."""
    command = [sys.executable, __file__, "--child", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            return json.loads(line.removeprefix(_MARK))
    # vLLM's last error says only that there is an earlier one.
    errors = [line for line in done.stderr.splitlines() if _ERROR.search(line) and "See root cause above" not in line]
    return {"ok": False, "error": (errors or done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1][-400:]}


def table(rows: dict[str, kept_rows.Row]) -> str:
    """Markdown of the results, in the order of the families."""
    lines = ["| teacher > student | log p | log q | prefill | log q after an update | export |", "|---|---|---|---|---|---|"]
    for each in FAMILIES:
        row = rows.get(each.name)
        if row is None or "error" in row:
            lines.append(f"| {each.name} | {'not run yet' if row is None else row['error']} | | | | |")
        else:
            gaps = " | ".join(f"{row[name]:.0e}" for name in ("teacher", "student", "scored", "updated", "export"))
            lines.append(f"| {each.name}{'' if row['ok'] else ' (beyond tolerance)'} | {gaps} |")
    return "\n".join([*lines, "", kept_rows.origin(rows.values())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="*", default=[each.name for each in FAMILIES])
    parser.add_argument("--again", action="store_true", help="run also those that were measured on another commit")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--child")
    given = parser.parse_args()
    if given.child:
        print(_MARK + json.dumps(run_one(given.child)))
    elif given.table:
        kept_rows.write_between(DOCS, MARK, table(kept_rows.read(given.out)))
    else:
        kept_rows.measure(given.only, run_apart, given.out, again=given.again)


if __name__ == "__main__":
    main()
