"""The recipes for published models, with their sizes: each is placed on the nodes that it names, and fits there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from cluster.planning.memory import EngineMemory, ModelShape
from cluster.planning.plan import described_nodes, plan
from kdray.checks.devices import quantisation_notes
from kdray.config import load_config, vllm_build
from kdray.models.resolve import model_config
from tests.support.published_models import PUBLISHED, save_config

ROOT = Path(__file__).parents[4]
RECIPES = [ROOT / "configs/gsm8k.yaml", *sorted(ROOT.glob("configs/models/*.yaml"))]


def named(recipe: Path) -> dict[str, str]:
    """Settings that name a model in a recipe, with the model."""
    tree = yaml.safe_load(recipe.read_text())
    teachers = {f"teachers.{name}.model": teacher["model"] for name, teacher in tree["teachers"].items()}
    return {"student.model": tree["student"]["model"], **teachers}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_shapes_give_the_published_number_of_parameters(name: str, tmp_path: Path) -> None:
    shape = ModelShape.of(model_config(str(save_config(name, tmp_path)), None).get_text_config())
    assert f"{shape.parameters / 1e9:.1f}" == PUBLISHED[name].parameters


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_on_the_nodes_that_it_names(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cluster,) = re.findall(r"kdray plan \S+ --cluster (\S+)", recipe.read_text())
    assert f"kdray plan {recipe.relative_to(ROOT)} --cluster" in recipe.read_text()
    config = load_config(recipe, [f"{key}={save_config(name, tmp_path)}" for key, name in named(recipe).items()])
    # Its format is one that engines load there.
    monkeypatch.setattr(vllm_build, "vllm_device", lambda: "gpu")
    quantised = [name for name, model in named(recipe).items() if "quantization_config" in PUBLISHED[model].config]
    assert len(list(quantisation_notes(config))) == len(quantised)
    found = plan(config, described_nodes(ROOT / cluster))
    assert not [line for line in found.lines if "warning" in line]
    assert sum(role.bundle.count for role in found.roles if role.bundle.role == "student") == config.training.ranks
    (settings,) = config.teachers.values()
    (teacher,) = [role for role in found.roles if role.bundle.role.startswith("teacher")]
    assert isinstance(teacher.memory, EngineMemory)
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    replicas = settings.replicas
    assert replicas * teacher.memory.kv_tokens > 32 * longest, "too few of the longest sequences are held at once"


def test_every_model_that_is_listed_is_used() -> None:
    assert {name for recipe in RECIPES for name in named(recipe).values()} == set(PUBLISHED)
