"""Pytest plugin: an interrupted run of the tests goes on where it was.

python -m pytest -p tests.support.passed --passed new ...       # keeps the names of tests that pass
python -m pytest -p tests.support.passed --passed resume ...    # leaves them out while no file has changed
"""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--passed", choices=["new", "resume"], help="keep the names of tests that pass; resume leaves them out")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.passed is not None:
        config.pluginmanager.register(Passed(config), "passed tests")


class Passed:
    """Names of the tests that passed, in a file for each set of tests; its first line is the state of the tree."""

    def __init__(self, config: pytest.Config) -> None:
        chosen = " ".join([*config.args, config.option.markexpr, config.option.keyword])
        name = hashlib.sha256(chosen.encode()).hexdigest()[:16]
        self._path = config.rootpath / ".pytest_cache" / f"passed-{name}"
        state = tree_state(config.rootpath)
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        self._before = set(lines[1:]) if config.option.passed == "resume" and lines[:1] == [state] else set()
        self._failed: set[str] = set()
        # Workers of xdist only read it, and do so before the first test ends.
        self._writes = not hasattr(config, "workerinput")
        if self._writes and not self._before:
            self._path.parent.mkdir(exist_ok=True)
            self._path.write_text(state + "\n")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        left_out = [item for item in items if item.nodeid in self._before]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item.nodeid not in self._before]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            self._failed.add(report.nodeid)
        elif self._writes and report.when == "teardown" and report.nodeid not in self._failed:
            with self._path.open("a") as file:
                file.write(report.nodeid + "\n")

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self._before:
            session.exitstatus = pytest.ExitCode.OK


def tree_state(root: Path) -> str:
    """Digest of the commit and of what differs from it, files that git does not know yet included."""

    def git(*arguments: str) -> bytes:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=True).stdout

    digest = hashlib.sha256(git("rev-parse", "HEAD") + git("diff", "HEAD"))
    for name in sorted(git("ls-files", "--others", "--exclude-standard", "-z").split(b"\0")):
        path = root / name.decode()
        if name and path.is_file():
            digest.update(name + path.read_bytes())
    return digest.hexdigest()
