"""A resume compares data, tokenizer, template and models with what its checkpoint recorded; versions are told, not refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from cluster import launch
from cluster.checkpointing import Checkpoint
from kdray.checks.inputs import changed_versions, check_inputs, inputs_of, installation
from kdray.config import parse_config
from kdray.config.resuming import changes
from kdray.config.route import Route
from kdray.data.dataset import load_dataset
from kdray.errors import ConfigError, DataError
from kdray.models.identity import model_identity, pinned
from kdray.models.inspect import origin
from kdray.models.resolve import task_tokenizer
from kdray.rollouts.arrow import rollouts_to_table
from kdray.runs.context import Checked
from kdray.runs.folder import RunFolder
from kdray.types import Reference, Rollout

ROWS = [{"prompt": f"question {number}?", "answer": str(number)} for number in range(12)]


PRUNED = {"type": "pruned", "source": "org/large", "layers": 4}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of a small model, large enough that its weights are not read whole."""
    path = tmp_path / "model"
    path.mkdir()
    save_file({"a": torch.zeros(64, 256), "b": torch.ones(3)}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (path / "README.md").write_text("not read")
    return path


def checked_of(tmp_path: Path, rows: list[dict[str, Any]] = ROWS, **student: Any) -> Checked:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = str(tmp_path / "model")
    config = parse_config(
        {
            "run": {"name": "r", "output": str(tmp_path / "runs")},
            "data": {"prompts": {"type": "jsonl", "path": str(prompts)}, "heldout_size": 2},
            "student": {"model": model, **student},
            "teachers": {"t": {"model": model}},
        }
    )
    tokenizer = task_tokenizer()
    dataset = load_dataset(config, tokenizer)
    return Checked(config, tokenizer, dataset, len(tokenizer), (1,), Route.of(config))


def checkpoint_of(checked: Checked, **changes: Any) -> Checkpoint:
    recorded = {"step": 4, "inputs": inputs_of(checked), "installation": installation(checked)} | changes
    # A marker is JSON.
    return Checkpoint(Path("checkpoints/step-000004"), json.loads(json.dumps(recorded)))


def test_the_same_inputs_are_accepted_also_from_another_folder(tmp_path: Path, folder: Path) -> None:
    checked = checked_of(tmp_path)
    checkpoint = checkpoint_of(checked)
    launch._record(checked, checkpoint)
    moved = folder.rename(tmp_path / "elsewhere")
    student = checked.config.student.model_copy(update={"model": str(moved)})
    teacher = checked.config.teachers["t"].model_copy(update={"model": str(moved)})
    config = checked.config.model_copy(update={"student": student, "teachers": {"t": teacher}})
    assert inputs_of(replace(checked, config=config)) == checkpoint.progress["inputs"]


def test_an_appended_row_is_refused_with_both_counts(tmp_path: Path, folder: Path) -> None:
    checkpoint = checkpoint_of(checked_of(tmp_path))
    with pytest.raises(ConfigError, match=r"data\.prompts: .*rows was 10, now 11.*choose another run\.name"):
        launch._record(checked_of(tmp_path, [*ROWS, {"prompt": "one more", "answer": "1"}]), checkpoint)


@pytest.mark.parametrize("changed", [{"prompt": "Question 0?"}, {"answer": "7"}])
def test_a_row_changed_in_place_is_refused(tmp_path: Path, folder: Path, changed: dict[str, str]) -> None:
    checkpoint = checkpoint_of(checked_of(tmp_path))
    with pytest.raises(ConfigError, match=r"data\.prompts: content was \w{16}, now \w{16}"):
        launch._record(checked_of(tmp_path, [ROWS[0] | changed, *ROWS[1:]]), checkpoint)


def test_a_changed_held_out_row_is_refused(tmp_path: Path, folder: Path) -> None:
    checkpoint = checkpoint_of(checked_of(tmp_path))
    with pytest.raises(ConfigError, match=r"than there are now: held-out prompts: content was"):
        launch._record(checked_of(tmp_path, [*ROWS[:-1], ROWS[-1] | {"answer": "7"}]), checkpoint)


def test_other_weights_are_refused_for_student_and_teacher_by_file(tmp_path: Path, folder: Path) -> None:
    checked = checked_of(tmp_path)
    checkpoint = checkpoint_of(checked)
    weights = torch.zeros(64, 256)
    weights[-1, -1] = 1e-6
    save_file({"a": weights, "b": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(ConfigError) as refused:
        launch._record(checked, checkpoint)
    for setting in ("student.model", "teachers.t.model"):
        assert f"{setting}: model.safetensors was {checkpoint.progress['inputs'][setting]['model.safetensors']}" in str(
            refused.value
        )
    assert "config.json" not in str(refused.value)


def test_another_template_and_vocabulary_are_refused(tmp_path: Path, folder: Path) -> None:
    checked = checked_of(tmp_path)
    checkpoint = checkpoint_of(checked)
    checked.tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(ConfigError, match="chat template: text was"):
        launch._record(checked, checkpoint)
    checked.tokenizer.chat_template = None
    checked.tokenizer.add_tokens(["new"])
    with pytest.raises(ConfigError, match="tokenizer: vocabulary was"):
        launch._record(checked, checkpoint)


def test_another_setting_is_named_before_what_it_causes(tmp_path: Path, folder: Path) -> None:
    checked = checked_of(tmp_path)
    RunFolder.create(checked.config)
    checkpoint = checkpoint_of(checked)
    other = checked_of(tmp_path, ROWS[:-1])
    data = other.config.data.model_copy(update={"heldout_size": 3})
    with pytest.raises(ConfigError, match=r"had other settings: data\.heldout_size: 2 there, 3 now"):
        launch._record(replace(other, config=other.config.model_copy(update={"data": data})), checkpoint)


def test_a_hub_repository_that_moved_is_refused_with_the_revision_to_set() -> None:
    before, now = {"student.model": {"commit": "aaa"}}, {"student.model": {"commit": "bbb"}}
    hub, tiny = {"model": "org/small"}, {"t": {"model": {"type": "tiny"}}}
    config = parse_config({"run": {"name": "r"}, "student": hub, "teachers": tiny})
    with pytest.raises(ConfigError, match=r"commit was aaa, now bbb \(set student\.revision=aaa\)"):
        check_inputs(config, before, now, {})


@pytest.mark.parametrize(
    ("setting", "tree"),
    [
        ("student.model", {"student": {"model": PRUNED}}),
        ("teachers.t.model", {"teachers": {"t": {"model": PRUNED}}}),
        ("data.prompts", {"data": {"prompts": {"type": "hub", "name": "org/questions"}}}),
        ("training.pretraining.source", {"training": {"pretraining": {"source": {"type": "hub", "name": "org/texts"}}}}),
    ],
)
def test_the_revision_to_set_is_one_that_a_resume_may_set(setting: str, tree: dict[str, Any]) -> None:
    tiny = {"model": {"type": "tiny"}}
    base = {"run": {"name": "r"}, "student": tiny, "teachers": {"t": tiny}}
    config = parse_config(base | tree)
    recorded = setting.removesuffix(".source")
    old, new = ({recorded: {"commit": each} if setting.endswith("model") else {"content": each}} for each in ("aaa", "bbb"))
    with pytest.raises(ConfigError, match=rf"\(set {setting}\.revision"):
        check_inputs(config, old, new, {})
    pinned_to = json.loads(json.dumps(base | tree))
    section = pinned_to
    for name in setting.split("."):
        section = section[name]
    section["revision"] = "aaa"
    (change,) = changes(config, parse_config(pinned_to))
    assert (change.setting, change.allowed) == (f"{setting}.revision", True)


def test_a_resume_may_pin_the_revision_that_its_checkpoint_tells(tmp_path: Path, folder: Path) -> None:
    checked = checked_of(tmp_path)
    RunFolder.create(checked.config)
    pinned = checked_of(tmp_path, revision="aaa")
    launch._record(pinned, checkpoint_of(checked))
    old = Checkpoint(Path("checkpoints/step-000004"), {"step": 4})
    launch._record(checked, old)
    with pytest.raises(
        ConfigError, match=r"student\.revision: None there, aaa now, but the checkpoint is of an earlier version"
    ):
        launch._record(pinned, old)


def test_other_versions_are_an_event_and_named_as_a_cause(tmp_path: Path, folder: Path) -> None:
    checked = checked_of(tmp_path)
    before = installation(checked)
    assert {"torch", "transformers", "ray", "kdray", "deepspeed"} <= before["versions"].keys()
    assert before["host"]
    older = before | {"versions": before["versions"] | {"torch": "1.0"}, "commit": None}
    now = before | {"commit": None}
    assert changed_versions(older, now) == {"torch": ["1.0", before["versions"]["torch"]]}
    assert changed_versions(before | {"host": "other"}, before) == {}
    events: list[tuple[str, dict[str, Any]]] = []
    reporter: Any = SimpleNamespace(event=lambda kind, **fields: events.append((kind, fields)))
    checkpoint = checkpoint_of(checked, installation=older)
    launch._tell_changes(reporter, checkpoint, launch._record(checked, checkpoint))
    ((kind, fields),) = events
    assert kind == "versions_changed"
    assert fields["step"] == 4
    assert fields["changed"]["torch"][0] == "1.0"
    with pytest.raises(ConfigError, match=r"since then .*torch went from 1\.0 to .*which may be the cause"):
        launch._record(checked_of(tmp_path, ROWS[:-1]), checkpoint)


def test_a_checkpoint_without_digests_is_resumed_with_a_warning(tmp_path: Path, folder: Path) -> None:
    checked = checked_of(tmp_path)
    old = Checkpoint(Path("checkpoints/step-000004"), {"step": 4})
    record = launch._record(checked, old)
    events: list[str] = []
    reporter: Any = SimpleNamespace(event=lambda kind, **fields: events.append(kind))
    launch._tell_changes(reporter, old, record)
    launch._tell_changes(reporter, None, record)
    assert events == ["inputs_unknown"]


def test_a_resume_may_add_a_phase_that_trains_on_the_answers(tmp_path: Path, folder: Path) -> None:
    checked = checked_of(tmp_path)
    ids = np.arange(3, dtype=np.int32)
    train = [replace(prompt, reference=Reference(ids, ids, np.ones(3, dtype=bool))) for prompt in checked.dataset.train]
    launch._record(replace(checked, dataset=replace(checked.dataset, train=train)), checkpoint_of(checked))


def test_a_file_that_no_engine_reads_is_not_part_of_a_model(folder: Path) -> None:
    before = model_identity(str(folder), None)
    (folder / "README.md").write_text("changed")
    assert model_identity(str(folder), None) == before
    assert before.keys() == {"config.json", "model.safetensors"}


def test_truncated_weights_are_an_error_that_names_the_model(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(
        DataError, match=r"model .*model: its files cannot be read: model\.safetensors is not a safetensors file"
    ):
        model_identity(str(folder), None)


def test_a_run_loads_the_commits_that_it_began_with(tmp_path: Path) -> None:
    """A replica that starts on a new node, days later, finds another default branch."""
    tree = {
        "run": {"name": "r"},
        "student": {"model": "org/small"},
        "teachers": {
            "hub": {"model": "org/large", "revision": "v1"},
            "folder": {"model": str(tmp_path)},
            "unknown": {"model": "org/other"},
        },
        "rollout": {"teachers": {"type": "ensemble"}},
        "loss": {"type": "forward_kl"},
    }
    config, small, large = parse_config(tree), 40 * "a", 40 * "b"
    inputs = {
        "student.model": {"commit": small},
        "teachers.hub.model": {"commit": large},
        "teachers.folder.model": {"config.json": "9f86d081884c7d65"},
        "teachers.unknown.model": {"commit": "None"},
    }
    found = pinned(config, inputs)
    assert found.source("hub") == ("org/large", large)
    assert found.source("folder") == (str(tmp_path), None)
    assert found.source("unknown") == ("org/other", None)
    assert (found.student.model, found.student.revision) == ("org/small", small)
    assert config.student.revision is None
    mine = {"me": {"type": "self", "prompt_template": "{prompt}!"}}
    alone = parse_config(tree | {"teachers": mine, "rollout": {"sampler": "student"}})
    assert pinned(alone, {"student.model": {"commit": small}, "teachers.me.model": {"commit": small}}).source("me")[1] == small


def test_a_teacher_that_follows_the_student_has_no_revision_to_set() -> None:
    teachers = {"me": {"type": "self", "prompt_template": "{prompt}!"}}
    tree = {"run": {"name": "r"}, "student": {"model": "org/small"}, "teachers": teachers, "rollout": {"sampler": "student"}}
    old, new = ({f"{each}.model": {"commit": commit} for each in ("student", "teachers.me")} for commit in ("aaa", "bbb"))
    with pytest.raises(ConfigError, match=r"\(set student\.revision=aaa\); teachers\.me\.model: commit was aaa, now bbb\. Put"):
        check_inputs(parse_config(tree), old, new, {})
    with pytest.raises(ConfigError, match=r"teachers\.gone\.model: commit was aaa, now absent\. Put"):
        check_inputs(parse_config(tree), {"teachers.gone.model": {"commit": "aaa"}}, {}, {})


def test_of_pruned_models_the_source_is_pinned() -> None:
    """Their own revision is refused: nothing on the hub has it."""
    commit = 40 * "a"
    config = parse_config({"run": {"name": "r"}, "student": {"model": PRUNED}, "teachers": {"t": {"model": PRUNED}}})
    found = pinned(config, {"student.model": {"commit": commit}, "teachers.t.model": {"commit": commit}})
    assert origin(found.student.model, found.student.revision) == ("org/large", commit)
    assert origin(*found.source("t")) == ("org/large", commit)


def test_other_recorded_answers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.parquet"
    config = parse_config(
        {
            "run": {"name": "r", "output": str(tmp_path / "runs")},
            "data": {"prompts": {"type": "task", "size": 8}, "heldout_size": 2},
            "student": {"model": {"type": "tiny"}},
            "teachers": {"t": {"type": "capture", "path": str(path)}},
            "loss": {"type": "sequence"},
            "rollout": {"alpha": 1.0},
        }
    )
    tokenizer = task_tokenizer()
    dataset = load_dataset(config, tokenizer)
    checked = Checked(config, tokenizer, dataset, len(tokenizer), (1,), Route.of(config))

    def answer(ids: list[int]) -> None:
        zeros = np.zeros(len(ids), np.float32)
        rollouts = [
            Rollout(
                sample_id=index,
                prompt_id=prompt.prompt_id,
                prompt_ids=prompt.token_ids,
                token_ids=np.array(ids, np.int32),
                mixture_logprobs=zeros,
                student_logprobs=None,
                student_versions=zeros.astype(np.int32),
                alpha=1.0,
                finish_reason="stop",
                teacher="t",
            )
            for index, prompt in enumerate(dataset.train)
        ]
        pq.write_table(rollouts_to_table(rollouts), path)

    answer([5, 6, 7])
    checkpoint = checkpoint_of(checked)
    answer([5, 6, 7])
    launch._record(checked, checkpoint)
    answer([5, 6, 8])
    with pytest.raises(ConfigError, match=r"teachers\.t\.path: answers\.parquet was [0-9a-f]{16}, now"):
        launch._record(checked, checkpoint)
    # Of an earlier version.
    del checkpoint.progress["inputs"]["teachers.t.path"]
    launch._record(checked, checkpoint)
