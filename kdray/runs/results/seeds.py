"""Runs of one config with several seeds: their configs, and mean and spread of their results."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdray.config import Config
from kdray.config.load import load_saved_config
from kdray.config.resuming import changes
from kdray.errors import ConfigError
from kdray.runs.folder import RunFolder, plain, read_lines, write_atomically
from kdray.runs.results.comparison import OUTCOMES

SEEDS = "seeds.json"
"""File with the results of all seeds, in the folder that holds their runs."""

_HEADLINES = ("exact_match", "step_match", "rouge_l", "reverse_kl", "forward_kl")
_FREE = ("run.", "cluster.")
"""Settings that do not change what a run comes to."""


def seeded(config: Config, count: int) -> dict[int, Config]:
    """Configs of `count` runs by seed, from `run.seed` on. Each has a folder of its own, `<run folder>/<name>-seed-<seed>`."""
    run = config.run
    return {
        seed: config.model_copy(
            update={
                # A whole name: trackers and the storage know a run by it alone.
                "run": run.model_copy(update={"name": f"{run.name}-seed-{seed}", "seed": seed, "output": config.run_folder})
            }
        )
        for seed in range(run.seed, run.seed + count)
    }


def check_seeds(config: Config, configs: Mapping[int, Config], resume: bool) -> None:
    """Check that the seeds may run in the folder of `config`. Args: configs: as `seeded` gives them; resume: some may have run.

    Raises: ConfigError with the remedies.
    """
    if RunFolder(config.run_folder).config.is_file():
        raise ConfigError(f"{config.run_folder}: holds a run of one seed; choose another run.name for several")
    if not resume:
        for each in configs.values():
            RunFolder(each.run_folder).check_free()


def finished(config: Config) -> dict[str, Any] | None:
    """Summary of a run if it has ended; None if it is not there or has to go on.

    Raises: ConfigError if it ended with other settings: its results do not belong to those of the other seeds.
    """
    folder = RunFolder(config.run_folder)
    if not (folder.config.is_file() and folder.events.is_file() and folder.summary.is_file()):
        return None
    # A finished run may have been resumed for more steps.
    kinds = [line["kind"] for line in read_lines(folder.events) if line["kind"] in ("start", "finished")]
    if kinds[-1:] != ["finished"]:
        return None
    other = [each for each in changes(load_saved_config(folder.config), config) if not each.setting.startswith(_FREE)]
    if other:
        told = "; ".join(f"{each.setting}: {each.old!r} there, {each.new!r} now" for each in other)
        raise ConfigError(
            f"{folder.path}: this seed has ended with other settings ({told}); set them back, or choose another run.name"
        )
    return folder.read_summary()


def across(summaries: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean, sample standard deviation and values by seed of the headline numbers, by `<evaluation> <metric>`.

    A number that a seed lacks is left out of its mean; `std` is None for fewer than two values.
    """
    found = {}
    for name in [f"{outcome} {metric}" for outcome in OUTCOMES for metric in _HEADLINES] + ["gap_closed value"]:
        entry, metric = name.split()
        values = {
            str(seed): float(value)
            for seed, summary in summaries.items()
            if (value := (summary.get(entry) or {}).get(metric)) is not None and math.isfinite(value)
        }
        if values:
            numbers = list(values.values())
            spread = statistics.stdev(numbers) if len(numbers) > 1 else None
            found[name.removesuffix(" value")] = {"mean": statistics.fmean(numbers), "std": spread, "values": values}
    return found


def write_seeds(folder: Path, configs: Mapping[int, Config], summaries: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Replace seeds.json of the folder of all seeds; returns its content.

    Args: summaries: of those that have ended, by seed.
    """
    found = {
        "seeds": sorted(summaries),
        "pending": sorted(configs.keys() - summaries.keys()),
        "runs": {str(seed): config.run_folder.name for seed, config in configs.items()},
        "results": across(summaries),
    }
    write_atomically(folder / SEEDS, json.dumps(plain(found), indent=2, allow_nan=False) + "\n")
    return found
