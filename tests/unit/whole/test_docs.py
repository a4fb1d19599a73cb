"""Snippets of the documentation, executed."""

from __future__ import annotations

import re
import runpy

import pytest

from kdray.config import parse_config
from kdray.data.dataset import encode_answer, load_dataset
from kdray.models.random_models import byte_tokenizer
from tests.support.plugins import EXAMPLE
from tests.support.snippets import DOCS, run_page, snippets


@pytest.mark.parametrize("page", ["library.md"])
def test_every_snippet_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert snippets(page), "the page has no snippets: nothing was tested"
    run_page(page)


def test_prompts_of_the_library_page_load():
    """The config that the page makes takes the prompts that it passes."""
    names = {}
    for _, source in snippets("library.md"):
        exec(source, names)
        if "mine" in names:
            break
    found = load_dataset(names["mine"], byte_tokenizer(), names["questions"], references=True)
    assert (len(found.train), len(found.heldout)) == (32, 8)
    assert all(found.grade.can_grade(prompt) for prompt in found.heldout)
    assert "What is 39 + 39?" in found.heldout[-1].text


FORMATS = re.findall(r"^```jsonl\n(.*?)^```", (DOCS / "data.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("rows", FORMATS)
def test_every_format_of_the_page_of_data_loads(rows, tmp_path):
    """As a file of two such rows: question and answer are found, and the answer is what the assistant would write."""
    (tmp_path / "rows.jsonl").write_text(rows * 2, encoding="utf-8")
    tiny = {"model": {"type": "tiny"}}
    data = {"prompts": {"type": "file", "path": str(tmp_path / "rows.jsonl")}, "heldout_size": 1}
    config = parse_config({"run": {"name": "x"}, "data": data, "student": tiny, "teachers": {"main": tiny}})
    tokenizer = byte_tokenizer()
    (prompt,) = load_dataset(config, tokenizer, references=True).train
    assert "France" in prompt.text
    assert prompt.answer == "Paris."
    assert tokenizer.decode(encode_answer(tokenizer, prompt)) == "Paris.<|im_end|>"


def test_the_page_of_data_shows_the_usual_formats():
    assert len(FORMATS) == 8


def test_the_page_of_clusters_lists_the_kinds_of_events():
    table = (DOCS / "clusters.md").read_text(encoding="utf-8").rpartition("\n## Events\n")[2]
    kinds = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    listed = set(re.findall(r"`([a-z_]+)`", " ".join(kinds)))
    sources = [path for package in ("kdray", "actors", "cluster") for path in (DOCS.parent / package).rglob("*.py")]
    told = r"(?:(?:event|_record|append_event)\(|\.append\(\()\s*\"([a-z_]+)\""
    written = {kind for path in sources for kind in re.findall(told, path.read_text(encoding="utf-8"))}
    assert len(written) > 30, "the pattern no longer finds the events"
    assert "ranks_lost" in written, "the pattern no longer finds the events that are gathered in a list"
    # Some kinds are constants or chosen by an expression.
    assert written <= listed
    assert listed - written == {"data", "rows_dropped", "setting_changed", "tracker_failed", "failed"}


def test_the_page_of_settings_is_that_of_the_docstrings():
    found = runpy.run_path(str(DOCS / "settings.py"))["page"]()
    assert (DOCS / "settings.md").read_text(encoding="utf-8") == found, "run `make settings`"


def test_the_page_of_settings_says_what_every_setting_means():
    rows = [line for line in (DOCS / "settings.md").read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert len(rows) > 300
    assert not [row for row in rows if row.endswith("|  |")], "a field without a docstring"


def test_the_page_of_clusters_installs_the_torch_of_the_setup():
    (version,) = re.findall(r"^torch=(\S+)$", (DOCS.parent / "setup.sh").read_text(encoding="utf-8"), re.MULTILINE)
    assert f"'torch=={version}+cpu'" in (DOCS / "clusters.md").read_text(encoding="utf-8")


def test_the_page_of_plugins_shows_the_files_that_are_tested():
    """Every file of the example distribution stands in the page, as it is."""
    text = (DOCS / "extending.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^```\w+ \{file=([\w./]+)\}\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    files = {path.relative_to(EXAMPLE).as_posix(): path for path in EXAMPLE.rglob("*") if path.suffix in (".py", ".toml")}
    assert shown.keys() == files.keys() - {"kdray_example/__init__.py"}
    for name, source in shown.items():
        assert source.rstrip() == files[name].read_text(encoding="utf-8").rstrip(), f"{name} differs from the page"
