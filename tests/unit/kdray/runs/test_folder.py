"""The run folder: who may have it, what is written into it and how."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path

import numpy as np
import pytest

from kdray.config import Config, load_config, parse_config
from kdray.errors import ConfigError, DataError
from kdray.runs import folder as module
from kdray.runs.folder import RunFolder, plain, read_lines, write_atomically


def config_in(output: Path, **sections: dict) -> Config:
    model = {"type": "tiny"}
    run = {"name": "trial", "output": str(output)} | sections.pop("run", {})
    return parse_config({"run": run, "student": {"model": model}, "teachers": {"t": {"model": model}}, **sections})


def test_create_writes_the_resolved_config(tmp_path):
    config = config_in(tmp_path)
    folder = RunFolder.create(config)
    assert folder.path == tmp_path / "trial"
    assert load_config(folder.config) == config
    assert "max_staleness" in folder.config.read_text(), "defaults belong into the resolved config"
    assert not folder.student.exists(), "a student folder means that training has ended"


def test_create_accepts_an_empty_folder(tmp_path):
    (tmp_path / "trial").mkdir()
    RunFolder.create(config_in(tmp_path))


def test_create_refuses_a_run_of_the_same_name_and_names_the_remedies(tmp_path):
    RunFolder.create(config_in(tmp_path)).append_metrics({"step": 1})
    with pytest.raises(ConfigError, match=r"trial: already holds a run.*--resume.*run\.name"):
        RunFolder.create(config_in(tmp_path))


@pytest.mark.parametrize("kept", ["metrics.jsonl", "ledger.jsonl", "summary.json", "student/config.json", "checkpoints/a/b"])
def test_a_run_that_saved_nothing_may_be_begun_again_and_one_that_saved_something_may_not(tmp_path, kept):
    """As after Ctrl-C while its teacher is trained; also by a recipe that was corrected meanwhile."""
    first = RunFolder.create(config_in(tmp_path))
    first.append_event("start")
    first.write_teachers({"t": {"model": "one"}})
    (first.logs / "driver.log").write_text("told")
    with first.events.open("a") as file:
        file.write('{"kind": "cut sh')
    again = RunFolder.create(config_in(tmp_path, rollout={"alpha": 0.5}))
    again.append_event("start")
    assert [line["kind"] for line in read_lines(again.events)] == ["start", "start"]
    assert again.load_config().rollout.alpha == 0.5
    assert again.read_teachers() == {}
    assert (again.logs / "driver.log").read_text() == "told"
    RunFolder.create(config_in(tmp_path, rollout={"alpha": 0.5}), resume=True)
    path = again.path / kept
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="already holds a run"):
        again.check_free()


def test_a_config_that_may_be_anybodys_is_not_written_over(tmp_path):
    (tmp_path / "trial").mkdir()
    (tmp_path / "trial" / "config.yaml").write_text("mine: true\n")
    with pytest.raises(ConfigError, match="already holds a run"):
        RunFolder.create(config_in(tmp_path))
    assert (tmp_path / "trial" / "config.yaml").read_text() == "mine: true\n"


def test_a_run_may_start_where_a_capture_lies(tmp_path):
    (tmp_path / "trial" / "capture").mkdir(parents=True)
    RunFolder.create(config_in(tmp_path))
    (tmp_path / "other" / "captures").mkdir(parents=True)
    with pytest.raises(ConfigError, match="exists and is not a run folder"):
        RunFolder.create(config_in(tmp_path, run={"name": "other"}))


def test_create_refuses_a_folder_that_is_no_run_and_leaves_it_alone(tmp_path):
    (tmp_path / "trial").mkdir()
    (tmp_path / "trial" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"trial: exists and is not a run folder.*run\.name"):
        RunFolder.create(config_in(tmp_path))
    assert [path.name for path in (tmp_path / "trial").iterdir()] == ["thesis.txt"]


def test_create_refuses_a_file_in_its_place(tmp_path):
    (tmp_path / "trial").write_text("mine")
    with pytest.raises(ConfigError, match="not a run folder"):
        RunFolder.create(config_in(tmp_path))


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(ConfigError, match="no run to resume; leave out --resume"):
        RunFolder.create(config_in(tmp_path), resume=True)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"training": {"steps": 200}},
        {"training": {"stuck_after_s": 9, "stuck_loading_after_s": 9, "max_restarts": 9, "sync_bucket_mib": 9}},
        {"training": {"sync_full_every": 9}},
        {
            "training": {"weight_transfer": "nccl", "gpus_per_rank": 1},
            "teachers": {"t": {"model": {"type": "tiny"}, "num_gpus": 1}},
        },
        {"evaluation": {"control": True, "every": 5}},
        {"cluster": {"address": "10.0.0.1:6379"}},
        {"run": {"storage": "s3://bucket/runs"}},
        {"training": {"learning_rate": 1e-3, "gradient_clipping": 0.5, "on_not_finite": "skip", "max_skipped": 9}},
        {"training": {"checkpoint_every": 7, "keep_checkpoints": 5}},
        {"rollout": {"filters": {"finished": True}, "retries": 9}},
    ],
)
def test_resume_takes_the_same_run_or_one_that_differs_in_what_may(tmp_path, sections):
    RunFolder.create(config_in(tmp_path))
    wanted = config_in(tmp_path, **sections)
    assert load_config(RunFolder.create(wanted, resume=True).config) == wanted


def test_every_change_of_a_resume_is_an_event(tmp_path):
    RunFolder.create(config_in(tmp_path))
    wanted = config_in(tmp_path, training={"learning_rate": 1e-3, "steps": 60}, rollout={"filters": {"finished": True}})
    folder = RunFolder.create(wanted, resume=True, step=40)
    found = {line["setting"]: (line["kind"], line["step"], line["old"], line["new"]) for line in read_lines(folder.events)}
    assert found["training.learning_rate"] == ("setting_changed", 40, 5e-6, 1e-3)
    assert found["training.steps"] == ("setting_changed", 40, 100, 60)
    assert found["rollout.filters.finished"] == ("setting_changed", 40, None, True)
    assert all(name.split(".")[0] in ("training", "rollout") for name in found)
    RunFolder.create(wanted, resume=True, step=50)
    assert len(read_lines(folder.events)) == len(found), "what is as it was is no change"


@pytest.mark.parametrize("backwards", [False, True])
def test_resume_takes_another_offload_of_the_same_stage(tmp_path, backwards):
    def config(**options: dict) -> Config:
        return config_in(tmp_path, training={"backend": {"zero_stage": 3, "options": options}})

    both = [config(), config(zero_optimization={"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}})]
    stored, wanted = reversed(both) if backwards else both
    RunFolder.create(stored)
    folder = RunFolder.create(wanted, resume=True, step=3)
    told = {line["setting"].removeprefix("training.backend.options.zero_optimization.") for line in read_lines(folder.events)}
    assert told == {"offload_optimizer.device", "offload_param.device"}
    with pytest.raises(ConfigError, match="overlap_comm: absent there, True now"):
        RunFolder.create(config(zero_optimization={"overlap_comm": True}), resume=True)


@pytest.mark.parametrize("backwards", [False, True])
def test_a_section_that_only_one_config_has_is_named_by_its_keys(tmp_path, backwards):
    """Not by its own name, too, as absent there and absent now."""
    both = [config_in(tmp_path), config_in(tmp_path, data={"grader": "last_number"})]
    stored, wanted = reversed(both) if backwards else both
    RunFolder.create(stored)
    with pytest.raises(ConfigError) as refusal:
        RunFolder.create(wanted, resume=True)
    assert "data.grader.type: " in str(refusal.value)
    assert "data.grader: " not in str(refusal.value)
    assert "absent there, absent now" not in str(refusal.value)


def test_resume_takes_a_run_that_was_moved(tmp_path):
    RunFolder.create(config_in(tmp_path / "there"))
    (tmp_path / "there").rename(tmp_path / "here")
    RunFolder.create(config_in(tmp_path / "here"), resume=True)


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"training": {"weight_decay": 0.1}}, "training.weight_decay"),
        ({"training": {"sft": {"batch_size": 32}}}, "training.sft.batch_size"),
        ({"run": {"seed": 7}}, "run.seed"),
        ({"loss": {"type": "forward_kl"}}, "loss.type"),
        ({"rollout": {"alpha": 0.5}}, "rollout.alpha"),
        ({"training": {"backend": {"options": {"steps_per_print": 5}}}}, "training.backend.options"),
    ],
)
def test_resume_refuses_other_settings_by_name(tmp_path, sections, key):
    stored = config_in(tmp_path)
    RunFolder.create(stored)
    with pytest.raises(ConfigError) as caught:
        RunFolder.create(config_in(tmp_path, **sections), resume=True)
    assert f"{key}" in str(caught.value)
    assert "training.gradient_clipping, training.keep_checkpoints, training.learning_rate, training.max_restarts" in str(
        caught.value
    )
    assert not (tmp_path / "trial" / "events.jsonl").exists()
    assert load_config(tmp_path / "trial" / "config.yaml") == stored, "a refused resume changes nothing"


def test_resume_drops_the_line_a_kill_cut_short(tmp_path):
    folder = RunFolder.create(config_in(tmp_path))
    folder.append_metrics({"step": 1})
    folder.append_event("start")
    for path in (folder.metrics, folder.events):
        with path.open("a") as file:
            file.write('{"step": 2, "lo')
    RunFolder.create(config_in(tmp_path), resume=True)
    folder.append_metrics({"step": 2})
    assert [line["step"] for line in read_lines(folder.metrics)] == [1, 2]
    assert [line["kind"] for line in read_lines(folder.events)] == ["start"]


def test_truncate_metrics_leaves_each_step_once(tmp_path):
    folder = RunFolder.create(config_in(tmp_path))
    folder.truncate_metrics(3)  # nothing written yet: nothing to do
    for step in range(1, 8):
        folder.append_metrics({"step": step, "loss": 0.1 * step})
    kept = folder.metrics.read_text().splitlines()[:5]
    folder.truncate_metrics(5)
    assert folder.metrics.read_text().splitlines() == kept
    for step in (6, 7):
        folder.append_metrics({"step": step})
    assert [line["step"] for line in read_lines(folder.metrics)] == [1, 2, 3, 4, 5, 6, 7]


def test_events_carry_time_and_kind(tmp_path):
    folder = RunFolder.create(config_in(tmp_path))
    folder.append_event("restart", rank=1, reason="killed\nby hand", log=Path("logs/x"))
    (line,) = read_lines(folder.events)
    assert line["time"].endswith("+00:00")
    assert line["time"][10] == "T"
    assert {key: line[key] for key in ("kind", "rank", "reason", "log")} == {
        "kind": "restart",
        "rank": 1,
        "reason": "killed\nby hand",
        "log": "logs/x",
    }


def test_summary_survives_numpy_and_not_a_number(tmp_path):
    folder = RunFolder.create(config_in(tmp_path))
    with pytest.raises(DataError, match="the run has not ended"):
        folder.read_summary()
    folder.write_summary({"steps": np.int64(3), "before": {"reverse_kl": float("nan")}, "ids": np.arange(2)})
    assert "NaN" not in folder.summary.read_text()
    assert folder.read_summary() == {"steps": 3, "before": {"reverse_kl": None}, "ids": [0, 1]}


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_broken_summary_names_the_file(tmp_path, content):
    folder = RunFolder(tmp_path)
    folder.summary.write_text(content)
    with pytest.raises(DataError, match=r"summary\.json"):
        folder.read_summary()


def test_write_that_fails_leaves_the_old_file_and_nothing_beside(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomically(path, "old")

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_plain_refuses_what_json_does_not_know():
    with pytest.raises(TypeError, match="object"):
        plain({"x": object()})
    assert plain([float("inf"), -float("inf"), np.float32(0.5), (1, True, None)]) == [None, None, 0.5, [1, True, None]]


def test_read_lines_names_the_broken_line_and_passes_over_an_unfinished_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + '\n{"step": 2')
    assert read_lines(path) == [{"step": 1}]
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        read_lines(path)
    path.write_text("[1]\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:1.*list"):
        read_lines(path)


def test_open_refuses_what_is_no_run(tmp_path):
    with pytest.raises(DataError, match="not a run folder"):
        RunFolder.open(tmp_path)
    folder = RunFolder.create(config_in(tmp_path))
    assert RunFolder.open(folder.path) == folder


def test_a_start_that_was_killed_before_it_had_a_config_may_be_made_again(tmp_path):
    config = config_in(tmp_path)
    for name in ("checkpoints", "samples", "logs"):
        (tmp_path / "trial" / name).mkdir(parents=True)
    (tmp_path / "trial" / ".config.yaml.0123").write_text("run:")
    assert load_config(RunFolder.create(config).config) == config
    (tmp_path / "other" / "samples").mkdir(parents=True)
    (tmp_path / "other" / "samples" / "mine.parquet").touch()
    with pytest.raises(ConfigError, match="exists and is not a run folder"):
        RunFolder.create(config_in(tmp_path, run={"name": "other"}))


def test_a_line_that_does_not_fit_on_the_disk_leaves_nothing_before_the_next(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_event("first")
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # Room for a part of the next line.
        resource.setrlimit(resource.RLIMIT_FSIZE, (folder.events.stat().st_size + 10, whole[1]))
        with pytest.raises(OSError, match="no room|too large"):
            folder.append_event("second")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, whole)
        signal.signal(signal.SIGXFSZ, handler)
    folder.append_event("third")
    assert [line["kind"] for line in read_lines(folder.events)] == ["first", "third"]
