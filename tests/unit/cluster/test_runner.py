"""What a run tells at its start, before anything is started."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from cluster.runner import Runner, RunPlan
from kdray.checks.gradient_notes import gradient_notes
from kdray.config.route import Route
from kdray.data.dataset import load_dataset
from kdray.errors import Interrupted
from kdray.models.resolve import task_tokenizer
from kdray.runs.context import Checked
from kdray.runs.folder import RunFolder, read_lines
from kdray.runs.lease import leased
from kdray.runs.report import write_report
from kdray.runs.reporter import RunReporter
from tests.support.stub_run import stub_config


async def test_what_the_checks_find_is_an_event_and_said_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(name: str, *lengths: int) -> str:
        (tmp_path / name).write_text("".join(json.dumps({"prompt": "x" * length}) + "\n" for length in lengths))
        return str(tmp_path / name)

    source = {"type": "jsonl", "path": rows("a.jsonl", 8, 20, 9, 30), "heldout_path": rows("b.jsonl", 8, 8, 8, 8)}
    data = {"prompts": source, "heldout_size": 3, "max_prompt_tokens": 10, "too_long": "drop"}
    config, tokenizer = stub_config(tmp_path / "runs", data=data, rollout={"filters": None}), task_tokenizer()
    dataset = load_dataset(config, tokenizer)
    terminal = io.StringIO()
    with leased(config, None) as lease:
        folder = RunFolder.create(config, guard=lease.check)
        reporter = RunReporter(folder, 1, Console(file=terminal, width=80))
        notes = list(gradient_notes(config))
        checked = Checked(config, tokenizer, dataset, len(tokenizer), (1,), Route.of(config), notes=notes)
        record = {"inputs": {}, "installation": {"host": "here"}}
        stores: Any = SimpleNamespace()
        runner = Runner("", RunPlan(checked, folder, reporter, None, None, lease, record, lambda: None), stores, stores)

        async def no_models() -> None:
            raise Interrupted

        monkeypatch.setattr(runner, "_with_models", no_models)
        with pytest.raises(Interrupted):
            await runner.run()
        reporter.close()
    (note,) = [line for line in read_lines(folder.events) if line["kind"] == "note"]
    assert note["found"].startswith("training.batch_size=")
    assert note["found"] in terminal.getvalue()
    (event,) = [line for line in read_lines(folder.events) if line["kind"] == "rows_dropped"]
    assert (event["total"], event["counts"]) == (3, {"too_long": 2, "beyond_heldout_size": 1})
    words = (
        "2 prompts have more than data.max_prompt_tokens=10 tokens, the first: "
        f"{tmp_path}/a.jsonl line 2; 1 prompts of {tmp_path}/b.jsonl are beyond its first 3 (data.heldout_size)"
    )
    assert event["found"] == words
    assert words in terminal.getvalue()
    assert f'<p class="note">Left out of the data, 3: {words}.</p>' in write_report(folder.path).read_text()
