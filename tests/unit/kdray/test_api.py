"""The public Python API: its names, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kdray
from kdray.config import JSDLoss
from kdray.errors import ConfigError

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "configs/quickstart.yaml"


@pytest.mark.parametrize("name", kdray.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(kdray, name) is not None
    assert name in dir(kdray)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'kdray' has no attribute 'distil'"):
        _ = kdray.distil


def test_a_config_brings_neither_torch_nor_ray() -> None:
    code = (
        "import sys, kdray; kdray.load_config('configs/quickstart.yaml', ['training.steps=1']);"
        "loaded = {'torch', 'ray', 'vllm', 'deepspeed', 'transformers'} & set(sys.modules);"
        "sys.exit(str(loaded) if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "resumes"),
    [({}, False), ({"resume": True}, True)],
)
def test_run_hands_over_to_the_launcher(monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], resumes: bool) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("cluster.launch.run", lambda config, resume, prompts: seen.append((config, resume, prompts)) or {})
    config = kdray.load_config("configs/quickstart.yaml")
    assert kdray.run(config, **arguments) == {}
    assert seen == [(config, resumes, None)]


def test_a_file_of_ones_own_with_the_name_of_a_package_is_told(tmp_path: Path) -> None:
    """As a program started beside it meets it."""
    (tmp_path / "cluster.py").write_text("")
    (tmp_path / "program.py").write_text(f"import kdray\nkdray.run(kdray.load_config({str(RECIPE)!r}))\n")
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    last = done.stderr.splitlines()[-1]
    assert f"`import cluster` finds {tmp_path / 'cluster.py'}, not kdray's package of that name in {ROOT}" in last
    assert "rename the other, or" in last


def test_a_loss_that_needs_more_than_logits_is_refused() -> None:
    import torch

    logits, ids = torch.zeros(1, 3, 4), torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ConfigError, match=r"loss\.type=minillm needs more than two models' logits"):
        kdray.distillation_loss(logits, logits, ids, ids == 0, "minillm")
    with pytest.raises(ConfigError, match=r"loss\.type='jds': no installed loss has this name; did you mean `jsd`"):
        kdray.distillation_loss(logits, logits, ids, ids == 0, "jds")
    with pytest.raises(kdray.KdrayError, match=r"mask: no token after the first is a target"):
        kdray.distillation_loss(logits, logits, ids, torch.tensor([[True, False, False]]), "jsd")


def test_a_loss_with_settings_of_its_own() -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 1, 3, 5, generator=generator)
    ids = torch.zeros(1, 3, dtype=torch.long)
    beta = 0.1
    p, q = (logits[0, :2].softmax(-1) for logits in (teacher, student))
    m = beta * p + (1 - beta) * q
    by_hand = (beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()) / 2
    for loss in ({"type": "jsd", "beta": beta}, JSDLoss(type="jsd", beta=beta)):
        assert kdray.distillation_loss(student, teacher, ids, ids == 0, loss).item() == pytest.approx(by_hand.item(), rel=1e-5)
    for given, message in (
        ({"type": "jsd", "beta": 7}, r"^loss\.beta=7: input should be less than 1$"),
        ({"type": "jsd", "bta": 0.1}, r"^loss\.bta: unknown key; did you mean `beta`\?$"),
        ({"type": "jds"}, r"^loss\.type='jds': no installed loss has this name; did you mean `jsd`"),
    ):
        with pytest.raises(ConfigError, match=message):
            kdray.distillation_loss(student, teacher, ids, ids == 0, given)


def test_distillation_loss_is_the_mean_over_targets_by_hand() -> None:
    import torch

    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 5, requires_grad=True), torch.randn(2, 4, 6)
    ids, mask = torch.randint(0, 5, (2, 4)), torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0]]).bool()
    expected, count = 0.0, 0
    for b, s in [(0, 2), (0, 3), (1, 1)]:
        # The row that predicts the token, cut to the shared ids.
        p, q = (logits[b, s - 1, :5].softmax(-1) for logits in (teacher, student))
        expected, count = expected + float((p * (p / q).log()).sum()), count + 1
    found = kdray.distillation_loss(student, teacher, ids, mask)
    assert found.item() == pytest.approx(expected / count, rel=1e-5)
    found.backward()
    assert student.grad is not None
    assert student.grad[:, -1].abs().sum() == 0, "the last row predicts no token of the sequence"
