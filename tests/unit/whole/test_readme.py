"""Names of files in the README's map and in the documentation, compared with the tree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGES = ("kdray", "actors", "cluster")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob(".github/**/*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*.md")])

PATH = re.compile(r"`((?:kdray|actors|cluster|tests|unit|integration|configs|docs|benchmarks|requirements)/[\w./-]+)")
"""A path in code; the tests are named from the root or from `tests/`."""
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
"""A link to another file."""
CODE = re.compile(r"`[^`\n]+`")
"""Code in a line, in which brackets are no link, as in a regular expression."""


def map_entries() -> dict[str, list[str]]:
    """Top-level folder -> the names listed below it, in the README's map."""
    block = (ROOT / "README.md").read_text().split("## The map\n")[1].split("```")[1]
    entries: dict[str, list[str]] = {}
    top = ""
    for line in block.strip().splitlines():
        match = re.fullmatch(r" {0,2}(\S+) {2,}(\S.*)", line)
        assert match, f"a name, two spaces or more, its purpose: {line}"
        assert len(line) <= 128
        if line.startswith(" "):
            entries[top].append(match[1])
        else:
            top = match[1]
            entries[top] = []
    return entries


@pytest.mark.parametrize("package", PACKAGES)
def test_the_map_names_every_room_and_nothing_else(package: str) -> None:
    folder = ROOT / package
    files = [path for path in folder.rglob("*") if path.suffix in (".py", ".yaml")]
    rooms = {f"{path.parent.relative_to(folder)}/" for path in files} - {"./"}
    modules = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    listed = map_entries()[f"{package}/"]
    assert sorted(listed) == sorted(rooms | modules), "one line of README.md's map a folder and root file, with its purpose"


def test_the_map_names_folders_that_exist() -> None:
    tops = map_entries()
    assert set(tops) >= {f"{package}/" for package in PACKAGES}
    assert not [name for name in tops if not (ROOT / name).is_dir()]


def test_documents_name_files_that_exist() -> None:
    named = [(page, name.rstrip("/.")) for page in PAGES for name in PATH.findall(page.read_text())]
    assert len(named) > 50
    gone = [
        f"{page.relative_to(ROOT)}: {name}"
        for page, name in named
        if not any((base / name).exists() for base in (ROOT, ROOT / "tests"))
    ]
    assert not gone


def test_links_lead_to_files_that_exist() -> None:
    links = [(page, link) for page in PAGES for link in LINK.findall(CODE.sub("code", page.read_text()))]
    assert len(links) > 20
    gone = [f"{page.relative_to(ROOT)}: {link}" for page, link in links if not (page.parent / link).exists()]
    assert not gone


def test_the_sentence_about_the_quickstart_is_about_the_run_of_its_picture() -> None:
    """The picture's description has the numbers that can be read in it, and its date; the sentence has those and no others."""
    text = (ROOT / "README.md").read_text()
    (described,) = re.findall(r"!\[([^]]*)\]\(docs/images/report.png\)", text)
    (sentence,) = re.findall(r"In the run of the picture below.*?control \(95%", text, re.DOTALL)
    figures = re.findall(r"\d+\.\d", described)
    assert figures == ["18.8", "50.4", "42.2", "8.2"]
    assert re.findall(r"\d+\.\d", sentence) == figures
    assert re.findall(r"\d{4}-\d\d-\d\d", described) == re.findall(r"\d{4}-\d\d-\d\d", sentence)
