"""What a refused update tells the user to change."""

from __future__ import annotations

from typing import Any

import pytest

from actors.student.refusal import NotFinite, refuse_loss


class _Alone:
    """A backend of one rank."""

    def reduce(self, values: list[float]) -> list[float]:
        return values

    def gather(self, value: Any) -> list[Any]:
        return [value]


@pytest.mark.parametrize(
    ("phase", "setting"),
    [
        ("distill", "training.learning_rate"),
        ("sft", "training.sft.learning_rate"),
        ("control", "training.sft.learning_rate"),
        ("finetune", "training.finetune.learning_rate"),
    ],
)
def test_the_learning_rate_to_lower_is_that_of_the_phase(phase: str, setting: str) -> None:
    backend: Any = _Alone()
    with pytest.raises(NotFinite, match=f"it is not finite for sample 3.*lower {setting} or look"):
        refuse_loss(backend, ["it is not finite for sample 3"], [], step=2, number=0, phase=phase)
