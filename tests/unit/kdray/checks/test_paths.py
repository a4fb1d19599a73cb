"""Files and models that are not there are refused before anything is loaded, each by its setting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from kdray.checks.models import check_models
from kdray.checks.preflight import check
from kdray.config import Config, load_config, parse_config
from kdray.data import hub
from kdray.errors import ConfigError, DataError

CONFIGS = Path(__file__).parents[4] / "configs"
TINY = {"model": {"type": "tiny"}}


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a model's files are read")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("kdray.checks.preflight.student_tokenizer", refuse)
    monkeypatch.setattr("kdray.checks.models.check_family", refuse)
    hub._problem.cache_clear()


def recipe(**sections: Any) -> Config:
    return parse_config({"run": {"name": "x"}, "student": TINY, "teachers": {"t": TINY}} | sections)


PROMPTS = {"type": "jsonl", "path": "rows.jsonl"}
FILES = {
    "data.prompts.path": recipe(data={"prompts": {"type": "jsonl", "path": "gone.jsonl"}}),
    "data.prompts.heldout_path": recipe(data={"prompts": {**PROMPTS, "heldout_path": "gone.jsonl"}}),
    "data.chat_template_file": recipe(data={"chat_template_file": "gone.jsonl"}),
    "training.pretraining.source.path": recipe(
        training={"pretraining": {"source": {"type": "jsonl", "path": "gone.jsonl"}, "weight": 0.1}}
    ),
    "teachers.t.path": recipe(
        teachers={"t": {"type": "capture", "path": "gone.jsonl"}}, loss={"type": "forward_kl"}, rollout={"alpha": 1}
    ),
}


@pytest.mark.parametrize("setting", FILES)
def test_a_file_that_is_not_there(setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n")
    with pytest.raises(DataError) as caught:
        check(FILES[setting])
    wanted = f"{setting}=gone.jsonl: no such file or folder (relative paths count from {tmp_path}); set {setting}=PATH"
    assert str(caught.value) == wanted


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"student": {"model": "org/none"}},
            r"^student\.model=org/none: there is no such folder here, .* unset HF_HUB_OFFLINE$",
        ),
        ({"student": {"model": "./none"}}, r"^student\.model=\./none: no such folder; name an existing one"),
        ({"teachers": {"t": {"model": "/none"}}}, r"^teachers\.t\.model=/none: no such folder"),
        ({"teachers": {"t": {"model": "none"}}}, r"^teachers\.t\.model=none: there is no such folder here"),
        ({"student": {"model": {"type": "pruned", "source": "none"}}}, r"^student\.model\.source=none: there is no such"),
        ({"student": {"model": "empty"}}, r"^student\.model=empty: the folder has no config\.json"),
        ({"student": {"model": "file"}}, r"^student\.model=file is a file"),
    ],
)
def test_a_model_that_is_not_there(
    sections: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises((ConfigError, DataError), match=words):
        check_models(recipe(**sections))


@pytest.mark.parametrize(
    ("setting", "stands"), [("student.model", "models/student"), ("teachers.main.model", "models/teacher")]
)
def test_a_placeholder_of_a_recipe_is_told_as_one(
    setting: str, stands: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "prompts.jsonl").touch()
    given = {"student.model", "teachers.main.model"} - {setting}
    config = load_config(CONFIGS / "own_models.yaml", [f"{each}=model" for each in given])
    with pytest.raises(
        ConfigError, match=rf"^{setting}={stands}: .*in a recipe it only stands for a model of yours: set {setting}="
    ):
        check(config)
