"""Exactness of the families: every pair of `tests/support/families.py` through engine, update and export; a table of the gaps.

    python benchmarks/families.py [--out FILE] [--only NAME ...]
    python benchmarks/families.py --table [--out FILE]        # writes the table of docs/models.md from the file

Every pair runs in a process of its own. Results are appended to a JSON-lines file; pairs already in it are not run again, so
that an interrupted run continues.
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

from cluster.diagnosis.exactness import try_pair
from tests.support.families import FAMILIES, family

_MARK = "RESULT "
_DOCS = Path(__file__).parents[1] / "docs" / "models.md"
_BEGIN, _END = "<!-- tried families -->\n", "<!-- end of tried families -->"
_ERROR = re.compile(r"\w+(Error|Exception): ")


def run_one(name: str) -> dict[str, Any]:
    """Result of a pair, in this process."""
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


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of the results, in the order of the families."""
    lines = ["| teacher > student | log p | log q | prefill | log q after an update | export |", "|---|---|---|---|---|---|"]
    known = {row["family"]: row for row in rows}
    for each in FAMILIES:
        row = known.get(each.name)
        if row is None or "error" in row:
            lines.append(f"| {each.name} | {'not run yet' if row is None else row['error']} | | | | |")
        else:
            gaps = " | ".join(f"{row[name]:.0e}" for name in ("teacher", "student", "scored", "updated", "export"))
            lines.append(f"| {each.name}{'' if row['ok'] else ' (beyond tolerance)'} | {gaps} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "families.jsonl")
    parser.add_argument("--only", nargs="*", default=[each.name for each in FAMILIES])
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--child")
    given = parser.parse_args()
    if given.child:
        print(_MARK + json.dumps(run_one(given.child)))
        return
    rows = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    if given.table:
        before, _, rest = _DOCS.read_text().partition(_BEGIN)
        _DOCS.write_text(before + _BEGIN + table(rows) + "\n" + _END + rest.partition(_END)[2])
        return
    known = {row["family"] for row in rows}
    for name in given.only:
        if name not in known:
            row = {"family": name, **run_apart(name)}
            print(json.dumps(row), flush=True)
            with given.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
