"""`kdray run` of a recipe, with gloo instead of NCCL: python -m tests.support.gloo_run RECIPE."""

from __future__ import annotations

import sys
from pathlib import Path

from cluster import launch
from kdray.config import Config, load_config
from tests.support.gloo_settings import EXTENSION, GlooTraining


def with_gloo(config: Config) -> Config:
    training = GlooTraining.model_validate(config.training.model_dump() | {"weight_transfer": "gloo"})
    teachers = {name: each.model_copy(update={"engine_args": EXTENSION}) for name, each in config.teachers.items()}
    return config.model_copy(update={"training": training, "teachers": teachers})


if __name__ == "__main__":
    launch.run(with_gloo(load_config(Path(sys.argv[1]))))
