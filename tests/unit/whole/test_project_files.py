"""The files around the packages, compared with each other: changelog, workflow, Makefile, lock files."""

from __future__ import annotations

import re
import tomllib
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from kdray import __version__

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHONS = [f"3.{minor}" for minor in range(30) if SpecifierSet(PROJECT["project"]["requires-python"]).contains(f"3.{minor}.0")]
"""Those that `requires-python` admits."""


# -------------------------------------------------------------------------------------------------------- changelog

KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
"""Of Keep a Changelog."""


def test_the_changelog_has_a_dated_section_for_this_version() -> None:
    sections = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[0] == "[Unreleased]", "what comes is written there"
    dated = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", section) for section in sections[1:]]
    assert all(dated), f"`## [1.2.3] - YYYY-MM-DD`: {sections[1:]}"
    released = {match[1]: date.fromisoformat(match[2]) for match in dated if match}
    assert __version__ in released
    assert list(released.values()) == sorted(released.values(), reverse=True)


def test_the_changelog_groups_entries_by_kind() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= KINDS
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        before, *groups = re.split(r"^### ", section, flags=re.MULTILINE)
        assert "\n- " not in before, "an entry stands below one of the kinds"
        assert all("\n- " in group for group in groups)


def test_the_security_page_supports_this_version() -> None:
    series = ".".join(__version__.split(".")[:2])
    assert f"| {series}.x | yes |" in (ROOT / "SECURITY.md").read_text()


# --------------------------------------------------------------------------------------------------------- workflow

WORKFLOW: dict[Any, Any] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
JOBS: dict[str, Any] = WORKFLOW["jobs"]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def targets(job: str) -> list[str]:
    """Targets that a job's steps make."""
    commands = [step.get("run", "") for step in JOBS[job]["steps"]]
    return [target for command in commands for words in re.findall(r"\bmake ([^&|;\n]+)", command) for target in words.split()]


def pythons(job: str) -> list[str]:
    """Python versions that a job runs on."""
    (setup,) = [step for step in JOBS[job]["steps"] if step.get("uses", "").startswith("actions/setup-python@")]
    version = setup["with"]["python-version"]
    if "matrix" not in str(version):
        return [version]
    assert version == "${{ matrix.python-version }}"
    return list(JOBS[job]["strategy"]["matrix"]["python-version"])


def test_the_workflow_makes_what_the_makefile_has() -> None:
    assert {job: targets(job) for job in JOBS} == {
        "lint": ["lint"],
        "unit": ["test-unit"],
        "integration": ["test-integration"],
    }
    assert {target for job in JOBS for target in targets(job)} <= TARGETS


def test_the_workflow_makes_all_of_make_test() -> None:
    (needs,) = re.findall(r"^test:([^#\n]*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {target for job in JOBS for target in targets(job)} == set(needs.split())


@pytest.mark.parametrize("job", JOBS)
def test_the_workflow_runs_on_the_pythons_of_the_project(job: str) -> None:
    # Ruff's and mypy's verdicts are those of the lowest version, whatever runs them.
    assert pythons(job) == (PYTHONS[:1] if job == "lint" else PYTHONS)


def test_the_pythons_are_the_same_everywhere() -> None:
    assert len(PYTHONS) >= 2
    lowest, above = PYTHONS[0], f"3.{int(PYTHONS[-1].split('.')[1]) + 1}"
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{lowest.replace('.', '')}"
    assert PROJECT["tool"]["mypy"]["python_version"] == lowest
    assert (
        f"({lowest.replace('.', ', ')}) <= sys.version_info[:2] < ({above.replace('.', ', ')})"
        in (ROOT / "setup.sh").read_text()
    )
    assert f"Python {lowest} to {PYTHONS[-1]}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("job", JOBS)
def test_the_workflow_may_only_read_and_ends(job: str) -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert "permissions" not in JOBS[job]
    assert JOBS[job]["timeout-minutes"] <= 120
    (checkout,) = [step for step in JOBS[job]["steps"] if step.get("uses", "").startswith("actions/checkout@")]
    assert checkout["with"] == {"persist-credentials": False}
    assert "${{ github.ref }}" in WORKFLOW["concurrency"]["group"]


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.name)
def test_the_forms_ask_for_something(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= set(form)
    asked = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in asked}) == len(asked)
    assert any(field.get("validations", {}).get("required") for field in asked)


# ------------------------------------------------------------------------------------------------------- lock files

LOCKED = re.compile(r"(\S+==[^\s;]+(?: ; [^\\]+?)?)((?: --hash=sha256:[0-9a-f]{64})+)")
"""One package on one line: version, where it is for, hashes; and nothing else, such as an index or a path."""
TORCH = re.findall(r"^torch=(\S+)$", (ROOT / "setup.sh").read_text(), re.MULTILINE)[0]


def locked(build: str, python: str) -> dict[str, str]:
    """Package -> version that a lock file has for a Python on Linux x86_64."""
    text = (ROOT / f"requirements/{build}.lock").read_text()
    lines = [line for line in text.replace(" \\\n    ", " ").splitlines() if not line.startswith("#")]
    where = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
    }
    found: dict[str, str] = {}
    for line in lines:
        match = LOCKED.fullmatch(line)
        assert match, f"requirements/{build}.lock: {line}"
        package = Requirement(match[1])
        if package.marker is None or package.marker.evaluate(where):
            assert package.name not in found
            found[package.name] = str(package.specifier).removeprefix("==")
    return found


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("build", ["cpu", "gpu"])
def test_the_lock_files_have_what_the_project_asks_for(build: str, python: str) -> None:
    versions = locked(build, python)
    if build == "cpu":
        assert "torch" not in versions, "its CPU build is not the registry's: setup.sh installs it first"
        versions["torch"] = TORCH
    extras = PROJECT["project"]["optional-dependencies"]
    asked_for = [extras[name] for name in (build, "wandb", "mlflow", "lm-eval", "dev")]
    for line in [*PROJECT["project"]["dependencies"], *(line for lines in asked_for for line in lines)]:
        asked = Requirement(line)
        version = versions.get(canonicalize_name(asked.name))
        assert version is not None, f"{line} is not in requirements/{build}.lock: make lock"
        assert asked.specifier.contains(version), f"{line}, but {version} is in requirements/{build}.lock: make lock"


def test_the_lock_files_have_what_builds_kdray() -> None:
    """setup.sh builds it without an environment of its own."""
    (needed,) = [Requirement(line) for line in PROJECT["build-system"]["requires"]]
    assert all(needed.specifier.contains(locked(build, python)[needed.name]) for build in ("cpu", "gpu") for python in PYTHONS)


def test_the_cpu_lock_file_leaves_out_what_breaks_a_cpu_build() -> None:
    assert locked("cpu", PYTHONS[0]).keys().isdisjoint({"torchvision", "torchaudio", "torchcodec"})
