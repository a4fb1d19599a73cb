"""Runs of one config with several seeds: their configs, and mean and spread of their results."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdray.config import Config
from kdray.config.load import load_saved_config
from kdray.config.resuming import changes
from kdray.errors import ConfigError
from kdray.runs.folder import RunFolder, plain, write_atomically
from kdray.runs.lines.events import each_event
from kdray.runs.results.bootstrap import LEVEL
from kdray.runs.results.comparison import DIFFERENCES, OUTCOMES

SEEDS = "seeds.json"
"""File with the results of all seeds, in the folder that holds their runs."""

_HEADLINES = ("exact_match", "step_match", "rouge_l", "reverse_kl", "forward_kl")
_NUMBERS = (
    *(((outcome, metric), f"{outcome} {metric}") for outcome in OUTCOMES for metric in _HEADLINES),
    *(
        (("differences", pair, metric, "value"), f"{pair} {metric}")
        for pair in (f"{one} - {other}" for one, other in DIFFERENCES)
        for metric in _HEADLINES
    ),
    (("gap_closed", "value"), "gap_closed"),
)
"""Entries that lead to each number in a summary, and its name."""
_FREE = ("run.", "cluster.")
"""Settings that do not change what a run comes to."""


def seeded(config: Config, count: int) -> dict[int, Config]:
    """Configs of `count` runs by seed, from `run.seed` on. Each has a folder of its own, `<run folder>/<name>-seed-<seed>`."""
    return {seed: _with_seed(config, seed) for seed in range(config.run.seed, config.run.seed + count)}


def begun(config: Config) -> dict[int, Config]:
    """Configs of the seeds that the folder of `config` has in its seeds.json, by seed."""
    path = config.run_folder / SEEDS
    return {int(seed): _with_seed(config, int(seed)) for seed in json.loads(path.read_text())["runs"]} if path.is_file() else {}


def _with_seed(config: Config, seed: int) -> Config:
    run = config.run
    # A whole name: trackers and the storage know a run by it alone.
    update = {"name": f"{run.name}-seed-{seed}", "seed": seed, "output": config.run_folder}
    return config.model_copy(update={"run": run.model_copy(update=update)})


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
    kinds = [line["kind"] for line in each_event(folder.events) if line["kind"] in ("start", "finished")]
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
    """Mean, its interval, sample standard deviation, and values by seed of the headline numbers, by `<evaluation> <metric>`;
    of their differences, by `<evaluation> - <other> <metric>`; and of `gap_closed`.

    A number that a seed lacks is left out of its mean. `std` is None for fewer than two values, and so are `low` and `high`
    (`mean_interval`), as well as for values that are all the same.
    """
    found = {}
    for entries, metric in _NUMBERS:
        values = {}
        for seed, summary in summaries.items():
            held: Any = summary
            for entry in entries:
                held = (held or {}).get(entry)
            if held is not None and math.isfinite(held):
                values[str(seed)] = float(held)
        if values:
            numbers = list(values.values())
            spread = statistics.stdev(numbers) if len(numbers) > 1 else None
            low, high = mean_interval(numbers) or (None, None)
            found[metric] = {"mean": statistics.fmean(numbers), "low": low, "high": high, "std": spread, "values": values}
    return found


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Interval of the mean of what `values` were drawn from, at `LEVEL`, by Student's t; None if they do not differ."""
    from scipy.stats import t

    if len(set(values)) < 2:
        # No spread seen is no certainty.
        return None
    quantile = float(t.ppf(0.5 + LEVEL / 2, len(values) - 1))
    mean, half = statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


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
