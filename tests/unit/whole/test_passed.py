"""An interrupted `make test-full` goes on where it was."""

from __future__ import annotations

import subprocess

import pytest

TESTS = """
import pytest

@pytest.mark.parametrize("number", range(3))
def test_right(number): pass

def test_wrong(): assert False

@pytest.fixture
def broken():
    yield
    raise ValueError

def test_left_broken(broken): pass

def test_skipped(): pytest.skip("for now")
"""
pytest_plugins = ["pytester"]


def test_what_passed_on_a_tree_is_left_out_on_the_same_tree_alone(pytester: pytest.Pytester) -> None:
    folder = pytester.path
    (folder / "test_these.py").write_text(TESTS)
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    (folder / ".gitignore").write_text(".pytest_cache\n__pycache__\n")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True)

    def run(passed: str, *more: str) -> tuple[dict[str, int], int]:
        done = pytester.runpytest_inprocess("-p", "tests.support.passed", "--passed", passed, *more)
        found = done.parseoutcomes()
        return {name: found[name] for name in ("passed", "failed", "skipped", "errors", "error") if name in found}, int(
            done.ret
        )

    whole = {"passed": 4, "failed": 1, "skipped": 1, "errors": 1}, 1
    left = {"passed": 1, "failed": 1, "skipped": 1, "errors": 1}, 1
    assert run("new") == whole
    assert run("resume", "-n", "2") == left, "in xdist's workers"
    assert run("resume") == left
    assert run("resume", "-k", "right") == ({"passed": 3}, 0), "another choice of tests"
    assert run("resume", "-k", "right") == ({}, 0), "nothing is left to do"
    assert run("new", "-k", "right") == ({"passed": 3}, 0)
    (folder / "of_the_tests.txt").write_text("")
    assert run("resume") == whole, "a new file"
    assert run("resume") == left
    (folder / "test_these.py").write_text(TESTS + "\n")
    assert run("resume") == whole, "a changed file"
