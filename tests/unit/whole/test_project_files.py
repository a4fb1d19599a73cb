"""The files around the packages, compared with each other: changelog, workflow, Makefile, lock files."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

from kdray import __version__

ROOT = Path(__file__).parents[3]


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
