"""What others wrote is data: no pickle, no code of a model's folder, no code in a config; keys are in no file."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from actors.student.checkpoints.safe_load import tensors_only
from cluster.cli import app
from kdray.config import OpenAITeacherSettings, TinyModel, load_config, parse_config
from kdray.errors import EngineError, TrainingError
from kdray.models.resolve import build_tiny_model, task_tokenizer
from kdray.runs.folder import RunFolder
from kdray.runs.report import write_report
from kdray.runs.reporter import RunReporter
from kdray.runs.tracking.trackers import Trackers
from kdray.teachers.openai import RemoteTeacher
from kdray.types import Rollout, SampleRequest, StepReport
from tests.unit.kdray.teachers.test_openai import serving

ROOT = Path(__file__).parents[3]
SOURCES = sorted(path for package in ("kdray", "actors", "cluster") for path in (ROOT / package).rglob("*.py"))

READS_PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "pandas"}
UNPACKS = {"zipfile", "tarfile"}
UNPACKS_ITS_OWN = {"cluster/jobs/package.py"}
"""Takes the wheel apart that it has just built."""
NOT_FROM_DISK = {"actors/serving/serve_autoscaling.py", "actors/student/checkpoints/safe_load.py"}
"""The first hands an actor's handle to the Serve controller in a deployment's own settings: no file is read. The second catches
the error of a pickle that was not opened."""


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name, call) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keywords(call: ast.Call) -> dict[str, str]:
    return {word.arg or "**": ast.unparse(word.value) for word in call.keywords}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_of_others_is_run(path: Path) -> None:
    tree = ast.parse(path.read_text())
    if str(path.relative_to(ROOT)) not in NOT_FROM_DISK:
        imported = {
            alias.name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names
        }
        imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        forbidden = READS_PICKLES | (set() if str(path.relative_to(ROOT)) in UNPACKS_ITS_OWN else UNPACKS)
        assert not {part for name in imported for part in name.split(".")} & forbidden
    for name, call in calls(path):
        given = keywords(call)
        assert name.rpartition(".")[2] not in ("unsafe_load", "full_load") or "strict_yaml" in name
        assert not name.endswith("extractall") or str(path.relative_to(ROOT)) in UNPACKS_ITS_OWN
        assert name not in ("eval", "exec", "os.system", "torch.load", "yaml.load", "torch.jit.load"), name
        assert given.get("shell", "False") == "False"
        assert given.get("allow_pickle", "False") == "False"
        assert name not in ("np.load", "numpy.load") or given.get("allow_pickle") == "False"


LOADERS = ("get_config", "transformers.AutoConfig.from_pretrained")
FROM_PRETRAINED = [
    pytest.param(name, call, id=f"{path.relative_to(ROOT)}:{call.lineno}")
    for path in SOURCES
    for name, call in calls(path)
    if (name.startswith("Auto") and name.endswith(".from_pretrained")) or name in LOADERS
]


@pytest.mark.parametrize(("name", "call"), FROM_PRETRAINED)
def test_models_are_loaded_without_their_code_and_from_safetensors(name: str, call: ast.Call) -> None:
    given = keywords(call)
    assert given.get("trust_remote_code") == "False"
    if "Model" in name:
        assert given.get("use_safetensors") == "True"


def test_those_loads_are_found() -> None:
    assert len(FROM_PRETRAINED) > 10


def test_nothing_else_trusts_or_unpickles() -> None:
    """Wherever the words stand, as keyword, key or assignment, they are off."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            pairs: list[tuple[Any, Any]] = []
            if isinstance(node, ast.Dict):
                pairs = list(zip(node.keys, node.values, strict=True))
            for key, value in pairs:
                if isinstance(key, ast.Constant) and key.value in ("trust_remote_code", "load_format"):
                    # The table of refused engine arguments holds reasons.
                    assert ast.unparse(value) in ("False", "'safetensors'") or str(path).endswith("config/engine_args.py")


# ------------------------------------------------------------------------------------------------- hostile inputs


class Hostile:
    """Unpickling one touches a file."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self._marker,)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(
        TinyModel(type="tiny", layers=1, width=32, max_positions=64), tmp_path_factory.mktemp("m") / "model"
    )


def recipe(folder: Path, model: Path) -> Path:
    path = folder / "recipe.yaml"
    tree = {
        "run": {"name": "x", "output": str(folder)},
        "data": {"prompts": {"type": "task", "size": 32}, "heldout_size": 4, "max_prompt_tokens": 32},
        "student": {"model": str(model)},
        "teachers": {"t": {"model": str(model)}},
        "rollout": {"max_new_tokens": 16},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def spoiled(model: Path, folder: Path) -> Path:
    copy = folder / "copy"
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_a_pickle_in_a_models_folder_is_not_opened(model: Path, tmp_path: Path) -> None:
    marker, copy = tmp_path / "marker", spoiled(model, tmp_path)
    pickle.loads(pickle.dumps(Hostile(tmp_path / "control")))
    assert (tmp_path / "control").exists()
    (copy / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt"):
        (copy / name).write_bytes(pickle.dumps(Hostile(marker)))
    result = CliRunner().invoke(app, ["validate", str(recipe(tmp_path, copy))])
    assert result.exit_code == 2
    assert "a pickle can run code (model.pt" in result.stderr or "a pickle can run code (pytorch_model.bin" in result.stderr
    assert not marker.exists()


def test_the_code_of_a_models_folder_is_not_run(model: Path, tmp_path: Path) -> None:
    marker, copy = tmp_path / "marker", spoiled(model, tmp_path)
    (copy / "odd.py").write_text(f"open({str(marker)!r}, 'w')\nclass Odd: ...\n")
    config = json.loads((copy / "config.json").read_text())
    names = {"AutoConfig": "odd.Odd", "AutoModelForCausalLM": "odd.Odd", "AutoTokenizer": ["odd.Odd", None]}
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "odd", "auto_map": names}))
    result = CliRunner().invoke(app, ["validate", str(recipe(tmp_path, copy))])
    assert result.exit_code == 2
    assert "never run here" in result.stderr
    # The library's own advice would be to switch it on.
    assert "trust_remote_code=True" not in result.stderr
    assert not marker.exists()


def test_known_architectures_load_by_the_librarys_code_whatever_the_folder_brings(model: Path, tmp_path: Path) -> None:
    marker, copy = tmp_path / "marker", spoiled(model, tmp_path)
    (copy / "odd.py").write_text(f"open({str(marker)!r}, 'w')\nclass Odd: ...\n")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "odd.Odd"}}))
    result = CliRunner().invoke(app, ["validate", str(recipe(tmp_path, copy))])
    assert result.exit_code == 0, result.stderr
    assert not marker.exists()


@pytest.mark.parametrize(
    "text",
    [
        "run: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{}']]",
        "run: !!python/name:os.system",
    ],
)
def test_a_config_runs_no_code(tmp_path: Path, text: str) -> None:
    marker = tmp_path / "marker"
    path = tmp_path / "recipe.yaml"
    path.write_text(text.format(marker))
    for arguments in (
        ["validate", str(path)],
        ["validate", str(ROOT / "configs/quickstart.yaml"), text.replace(": ", "=", 1).format(marker)],
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert "a config holds plain values; remove it" in result.stderr
    assert not marker.exists()


def test_a_template_cannot_reach_into_python(model: Path, tmp_path: Path) -> None:
    """A chat template is a program of a model's folder; the library runs it in a sandbox, and its refusal is a message."""
    copy = spoiled(model, tmp_path)
    tokenizer = json.loads((copy / "tokenizer_config.json").read_text())
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    (copy / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"chat_template": template}))
    result = CliRunner().invoke(app, ["validate", str(recipe(tmp_path, copy))])
    assert result.exit_code == 2
    assert "chat template refuses" in result.stderr


# ------------------------------------------------------------------------------------------------------------ keys

KEY = "sk-live-3f9a77c1"


def test_a_key_is_in_no_file_and_no_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint that quotes the key back in its refusal; everything that a run then writes or prints is searched."""
    monkeypatch.setenv("MY_KEY", KEY)
    with serving(
        lambda number, body: (401, {"x-echo": KEY}, {"error": {"message": f"Incorrect API key provided: {KEY}"}})
    ) as server:
        address = f"http://127.0.0.1:{server.port}/v1"
        tree = {
            "run": {"name": "x", "output": str(tmp_path)},
            "student": {"model": {"type": "tiny"}},
            "teachers": {"far": {"type": "openai", "base_url": address, "model": "m", "api_key_env": "MY_KEY"}},
            "rollout": {"alpha": 1.0},
            "loss": {"type": "sequence"},
        }
        config = parse_config(tree)
        folder = RunFolder.create(config)
        settings = config.teachers["far"]
        assert isinstance(settings, OpenAITeacherSettings)
        teacher = RemoteTeacher("far", settings, task_tokenizer(), lambda request: "q", 99, (1,))
        request = SampleRequest(0, 0, np.array([4], np.int32), 1.0, 0, 4)

        async def ask() -> list[list[Rollout]]:
            try:
                return [part async for part in teacher.sample([request])]
            finally:
                await teacher.close()

        with pytest.raises(EngineError) as refused:
            asyncio.run(ask())
        assert server.seen[0].authorization == f"Bearer {KEY}", "the endpoint must have been given the key"
    assert KEY not in str(refused.value) + repr(refused.value.__cause__)
    reporter = RunReporter(folder, 1, trackers=Trackers(config, folder.path))
    reporter.event("failed", reason=str(refused.value))
    reporter.step(StepReport(1, 0.5, 1, 1.0, 0.1, 0.1), {})
    reporter.close()
    folder.write_summary({"steps": 1})
    write_report(folder.path)
    assert load_config(folder.config) == config

    # As `kdray run` ends: the message on the terminal, a traceback in the log where the error is none of kdray's.
    for error in (refused.value, RuntimeError(f"wrapped: {refused.value}")):
        monkeypatch.setattr("kdray.runs.report.write_report", lambda *_, error=error: (_ for _ in ()).throw(error))
        result = CliRunner().invoke(app, ["report", str(folder.path)])
        assert result.exit_code == 1
        assert KEY not in result.output + result.stderr
    written = [path for path in folder.path.rglob("*") if path.is_file()]
    assert {"config.yaml", "events.jsonl", "metrics.jsonl", "report.html", "summary.json"} <= {path.name for path in written}
    assert not [path for path in written if KEY.encode() in path.read_bytes()]


def test_a_checkpoint_of_deepspeed_runs_nothing(tmp_path: Path) -> None:
    """As DeepSpeed opens it: with everything allowed."""
    state, trace = tmp_path / "optim_states.pt", tmp_path / "trace"
    torch.save({"step": 3, "loss_scaler": Hostile(trace)}, state)
    with pytest.raises(TrainingError, match="more than tensors and plain values"), tensors_only():
        torch.load(state, weights_only=False)
    assert not trace.exists()
    torch.load(state, weights_only=False)
    assert trace.exists(), "outside, it would have run"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_checkpoint_of_deepspeed_has_what_its_optimizers_write(tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    state = tmp_path / "optim_states.pt"
    records = (LossScaler, ZeroStageEnum, fragment_address)
    torch.save([LossScaler(2.0), ZeroStageEnum.weights, fragment_address(numel=3, start=1), torch.ones(2)], state)
    with tensors_only(*records):
        scaler, stage, address, tensor = torch.load(state, weights_only=False)
    assert (scaler.cur_scale, stage, address, tensor.sum()) == (2.0, 3, fragment_address(3, 1), 2.0)
