"""The one name by which ranks find gloo instead of NCCL; they import this module with their settings."""

from __future__ import annotations

from typing import Literal

from actors.weights.sender import TRAINER_INFO
from kdray.config import TrainingSettings

TRAINER_INFO["gloo"] = "tests.support.gloo_transfer:GlooTrainerInitInfo"

EXTENSION = {"worker_extension_cls": "tests.support.gloo_transfer.GlooExtension"}
"""Engine arguments by which vLLM's workers find it."""

FAULT = "KDRAY_TEST_TRANSFER_FAULT"
"""Environment variable with the path of a file; where it exists, the next worker takes it away and does what it says after the
first tensor: `die` or `hang`."""


class GlooTraining(TrainingSettings):
    """Settings that no recipe can ask for."""

    weight_transfer: Literal["gloo"] = "gloo"  # type: ignore[assignment]
