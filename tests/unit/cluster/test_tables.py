"""Tables on narrow terminals: nothing is cut, and nothing is wider than the terminal."""

from __future__ import annotations

import pytest
from rich.cells import cell_len

from cluster.cli_base import print_columns, print_rows
from cluster.jobs.client import TABLE

METRICS = ("reverse_kl", "forward_kl", "exact_match", "exact_match/last_letters", "response_tokens", "truncated")
COLUMNS = ("before", "distilled", "after", "control", "teacher")
RESULTS = {name: dict.fromkeys(METRICS, 0.539061 + index) for index, name in enumerate(COLUMNS)}
INTERVALS = {name: {metric: [0.4771 + index, 0.6012 + index] for metric in METRICS} for index, name in enumerate(COLUMNS)}


def words(output: str) -> list[str]:
    return "".join(letter if letter not in "┃│┳┻╋┏┓┗┛┡┩┠┨├┤┴┬┼╇━─└┘┌┐╎" else " " for letter in output).split()


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_results_are_whole_at_any_width(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    print_columns("held-out", RESULTS, INTERVALS)
    output = capsys.readouterr().out
    assert max(map(cell_len, output.splitlines())) <= width
    assert "…" not in output
    found = words(output)
    for index, name in enumerate(COLUMNS):
        assert found.count(name) == 1
        assert found.count(f"{0.539061 + index:.4g}") == len(METRICS)
        assert output.count(f"({0.4771 + index:.3g} to {0.6012 + index:.3g})") == len(METRICS)
    assert found.count("exact_match/last_letters") == found.count("held-out")
    assert (found.count("held-out") == 1) == (width == 200)
    assert output.count("\n") == len(METRICS) + 4 if width == 200 else output.count("\n") > 2 * len(METRICS)


@pytest.mark.parametrize("width", [60, 80])
def test_a_placement_wraps_at_words(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    roles = {
        "teacher main": {"does": "samples, 64 sequences at once", "nodes": "1 on a node of kind 1 H100; 2 on kind 2"},
        "student": {"does": "trains, DeepSpeed ZeRO stage 1, bf16", "response tokens/s, modelled": "1,234,567"},
    }
    print_columns("role", roles)
    output = capsys.readouterr().out
    assert max(map(cell_len, output.splitlines())) <= width
    cells = ["role", *roles, *(text for role in roles.values() for text in role.values()), "does nodes"]
    assert sorted(words(output)) == sorted(" ".join([*cells, "response tokens/s, modelled"]).split())


@pytest.mark.parametrize("width", [60, 80, 140])
def test_jobs_are_whole_and_become_lines_where_there_is_no_room(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    job = ("own-models-20261130-064240-abcdef", "RUNNING", "", "distill 1045/10000", "2026-11-30 06:42:40", "1 day, 2:03:04")
    print_rows(TABLE, [job, job])
    output = capsys.readouterr().out
    assert max(map(cell_len, output.splitlines())) <= width
    assert words(output).count(job[0]) == 2
    assert ("│" in output) == (width == 140)
    if width < 140:
        assert output.splitlines()[3].split() == ["started", "2026-11-30", "06:42:40"]


def test_the_widest_column_wraps_first(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    print_rows(TABLE, [("sent", "RUNNING", "", "distill 110/2000", "2026-11-30 06:42:40", "0:03:04")])
    output = capsys.readouterr().out
    assert "│ sent │ RUNNING │           │ distill 110/2000 │ 2026-11-30        │ 0:03:04  │" in output


def test_a_path_over_a_column_is_folded_and_costs_the_numbers_nothing(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    path = "/tmp/pytest-of-somebody/pytest-7/popen-gw0/workplace0/exported-in-8-bits/"
    names = {"student": "before", path: "after"}
    print_columns("held-out", {key: RESULTS[of] for key, of in names.items()}, {k: INTERVALS[of] for k, of in names.items()})
    output = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")] for line in output.splitlines()]
    assert ["", "exact_match", "0.5391", "2.539", ""] in cells
    assert path in "".join(line.split("┃")[3].strip() for line in output.splitlines() if "┃" in line)
    assert max(map(cell_len, output.splitlines())) <= 80
