"""kdray as a library, on real engines: the snippets of docs/library.md, as a script and inside a running event loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

AS_A_SCRIPT = """
from tests.support.snippets import run_page

run_page("library.md", engines=True)
"""

IN_A_NOTEBOOK = """
import asyncio, ray
import kdray
from tests.support.snippets import snippets

# Ray is the program's own, and stays; the snippets run where a notebook's do, inside a running loop.
ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)


async def cell():
    names = {}
    for _, source in snippets("library.md", engines=True):
        if "kdray.run(" in source or "kdray.parse_config" in source:
            exec(source, names)


asyncio.run(cell())
assert ray.is_initialized(), "the program's Ray was shut down"
ray.shutdown()
"""


@pytest.mark.full
@pytest.mark.parametrize("program", [AS_A_SCRIPT, IN_A_NOTEBOOK], ids=["script", "notebook"])
def test_the_page_of_the_library_runs(tmp_path: Path, program: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "runs" / "notebook" / "summary.json").read_text())
    assert summary["steps"] == 2
