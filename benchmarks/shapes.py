"""Shapes that papers and posts report of distillation, looked for on tiny models: the table "Shapes" of docs/evidence.md.

    python -m benchmarks.shapes --seeds 100 101 102 103 104 105 106 107 --minutes 6
    python -m benchmarks.shapes --table                          # rewrite the tables from the file

One process, as in benchmarks/evidence_in_process.py, whose models, sampling, losses and evaluation it uses. A row of
benchmarks/results/shapes.jsonl is a shape, a variant and a seed; a row that is there is not run again. Seeds below 100 are for
trying numbers of steps: the tables have the others.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks import evidence_in_process, kept_rows
from benchmarks.evidence import FIRST_CONFIRMING_SEED, mean_interval, spread
from benchmarks.evidence_in_process import distil, ids_of, measure, model_of, sample, supervise
from kdray.config import Config, load_config
from kdray.data.dataset import Dataset, load_dataset
from kdray.models.resolve import task_tokenizer
from kdray.types import Prompt

RECIPE = Path("configs/spelled_sum.yaml")
RESULTS = kept_rows.ROOT / "benchmarks" / "results" / "shapes.jsonl"
PAGE = kept_rows.ROOT / "docs" / "evidence.md"
MARK = "table: benchmarks/shapes.py"
MARGIN = 5.0
"""Points by which a score may fall and count as kept, set before any row was made."""

Settings = tuple[str, ...]
Found = Mapping[str, Mapping[str, Any]]
"""Rows of one shape and one seed, by variant."""


SUMS = (
    "data.prompts={type: task, tasks: [spelled_sum], difficulty: 6, size: 512, labelled: 256}",
    "data.heldout_size=64",
    "teachers.sums.model.train={tasks: [spelled_sum], steps: 200, difficulty: 6, batch_size: 32, learning_rate: 5.0e-3}",
    "rollout={alpha: 0, max_new_tokens: 48, max_staleness: 0}",
    "loss={type: reverse_kl}",
    "training.steps=40",
    "training.sft={steps: 400, batch_size: 32, learning_rate: 4.0e-3}",
)
"""Answers of 42 tokens, in six steps; the student writes its own responses, the loss is the reverse KL over whole rows."""

ONE_PROMPT = (
    # For grading alone: the student writes every response.
    "data.prompts.labelled=null",
    "training.steps=20",
    "training.batch_size=64",
    "training.warmup_steps=2",
)
OLD_SELF = ("data.prompts.labelled=null", "training.learning_rate=1.0e-3")
NEW_FACTS = (
    "data.prompts={type: task, tasks: [multiplication], difficulty: 1, size: 80}",
    "data.heldout_size=20",
    "training.sft={steps: 300, batch_size: 32, learning_rate: 1.0e-3}",
)
LABELS_AGAIN = ("training.sft={steps: 40, batch_size: 32}",)
RESULTS_ALONE = ("data.grader=last_number",)
"""Two ways of writing the sum out, graded by its result alone; a guess is right a third of the time."""
OFFLINE = ("rollout.max_staleness=40",)
"""Every response is then written before the first update."""

WEAK, TAUGHT, OLD, LEARNED = 40.0, 60.0, 95.0, 90.0
"""Percent of right responses from which on a supervised phase ends when it is next looked at, every ten steps: a start for
distillation; one from a teacher's texts, by results; the old self; facts learned."""

STALE_LOSSES = {
    "forward KL": "loss={type: forward_kl}",
    "reverse KL": "loss={type: reverse_kl}",
    "reverse KL of one token": "loss={type: vopd}",
}
STALE_VARIANTS = tuple(
    f"{loss}, {age}"
    # The oldest and the newest first: they tell most, should time run out.
    for ages, losses in (((0, 16), tuple(STALE_LOSSES)), ((1, 4), ("forward KL", "reverse KL")))
    for loss, age in product(losses, ages)
)
RATES: dict[str, Settings] = {"high": (), "low": ("training.learning_rate=3.0e-4",)}
"""Learning rates of distillation. The high one is the recipe's, 3e-3, and 1e-3 for the recovery of what was forgotten."""

RECOVERY, SAME = "on-policy reverse KL", "same teacher"


def config_of(seed: int, *settings: str) -> Config:
    seeds = (f"run.seed={seed}", f"student.model.seed={seed}")
    return load_config(RECIPE, (*seeds, "training.checkpoint_every=0", *SUMS, *settings))


@dataclass(frozen=True)
class Trial:
    """A config with its questions and its models."""

    config: Config
    dataset: Dataset
    teacher: LlamaForCausalLM

    def distil(self, student: LlamaForCausalLM) -> LlamaForCausalLM:
        """Returns: a copy of the student after distillation."""
        trained = copy.deepcopy(student)
        distil(trained, self.teacher, self.config, self.dataset, task_tokenizer())
        return trained

    def supervise(self, student: LlamaForCausalLM, enough: float) -> LlamaForCausalLM:
        """Returns: a copy of the student after supervised steps on the labels, until so many percent are right."""
        trained = copy.deepcopy(student)
        supervise(trained, self.config, self.dataset, task_tokenizer(), lambda student: self.right(student) >= enough)
        return trained

    def right(self, model: LlamaForCausalLM) -> float:
        """Compute the percentage of right responses to the held-out questions."""
        found = measure(model, self.teacher, self.config, self.dataset, task_tokenizer())
        return 100.0 * float(found["exact_match"].value)

    def scores(self, before: LlamaForCausalLM, after: LlamaForCausalLM) -> dict[str, float]:
        return {"before": self.right(before), "after": self.right(after), "teacher": self.right(self.teacher)}


def trial_of(seed: int, *settings: str, teacher: LlamaForCausalLM | None = None) -> Trial:
    config = config_of(seed, *settings)
    source: Any = next(iter(config.teachers.values()))
    return Trial(config, load_dataset(config, task_tokenizer()), teacher or model_of(source.model))


def drawn_student(trial: Trial) -> LlamaForCausalLM:
    return model_of(trial.config.student.model)


@lru_cache(maxsize=1)
def weak_start(seed: int) -> LlamaForCausalLM:
    """The student that learned a little from the labels."""
    trial = trial_of(seed)
    return trial.supervise(drawn_student(trial), WEAK)


def one_prompt(variant: str, seed: int, rate: Settings) -> dict[str, dict[str, float]]:
    """Distil on the first question that the start learned no label of, and measure on it and on the held-out ones."""
    trial, start = trial_of(seed, *ONE_PROMPT, *rate), weak_start(seed)
    learned = {prompt.text for prompt in trial_of(seed).dataset.train if prompt.has_reference}
    prompt = next(prompt for prompt in trial.dataset.train if prompt.text not in learned)
    of_prompt = replace(trial, dataset=replace(trial.dataset, train=[prompt], heldout=[prompt] * 64))
    after = of_prompt.distil(start)
    return {"that question": of_prompt.scores(start, after), "held-out questions": trial.scores(start, after)}


def facts_of(seed: int, teacher: LlamaForCausalLM) -> Trial:
    """The times table, measured on what is learned of it: facts cannot be told from each other."""
    trial = trial_of(seed, *NEW_FACTS, teacher=teacher)
    return replace(trial, dataset=replace(trial.dataset, heldout=trial.dataset.train))


@lru_cache(maxsize=1)
def forgetful(seed: int) -> tuple[Trial, LlamaForCausalLM]:
    """The old self as teacher of the sums, and the student that then learned the times table."""
    sums = trial_of(seed, *OLD_SELF)
    old = sums.supervise(drawn_student(sums), OLD)
    return replace(sums, teacher=old), facts_of(seed, old).supervise(old, LEARNED)


def forgetting(variant: str, seed: int, rate: Settings) -> dict[str, dict[str, float]]:
    """Learn sums, then the times table, then distil from the old self on sums; `teacher` is the old self."""
    sums, forgot = forgetful(seed)
    sums = replace(sums, config=config_of(seed, *OLD_SELF, *rate))
    again = config_of(seed, *OLD_SELF, *LABELS_AGAIN, f"training.sft.learning_rate={sums.config.training.learning_rate}")
    after = sums.distil(forgot) if variant == RECOVERY else replace(sums, config=again).supervise(forgot, float("inf"))
    return {"A: sums": sums.scores(forgot, after), "B: times table": facts_of(seed, sums.teacher).scores(forgot, after)}


def carry_first(answer: str) -> str:
    """The answer in another way: `b0+2=2` becomes `b2+0=2`, the sum before and then the digit."""
    return re.sub(r"(\d)\+(\d)", r"\2+\1", answer)


def with_answers(trial: Trial, answer_of: Callable[[Prompt], str]) -> Trial:
    """The trial with other answers to learn from; held-out ones stay as they are."""
    train = [replace(prompt, answer=answer_of(prompt), reference=None) for prompt in trial.dataset.train]
    return replace(trial, dataset=replace(trial.dataset, train=train))


@lru_cache(maxsize=1)
def other_teacher() -> LlamaForCausalLM:
    """A teacher of the same size that writes the carry first, trained on all labels, kept in a folder."""
    folder = evidence_in_process.MODELS / "carry-first"
    if not folder.exists():
        trial = trial_of(0, "data.prompts.labelled=null", *RESULTS_ALONE)
        source: Any = next(iter(trial.config.teachers.values())).model
        model = model_of(source.model_copy(update={"train": None}))
        with_answers(trial, lambda prompt: carry_first(str(prompt.answer))).supervise(model, 98.0).save_pretrained(folder)
    found: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return found


@lru_cache(maxsize=2)
def styled(seed: int, taught: str) -> LlamaForCausalLM:
    """The student that learned to answer from a teacher's texts, one of each question with a label, which is not used."""
    trial = trial_of(seed, *RESULTS_ALONE)
    teacher = trial.teacher if taught == SAME else other_teacher()
    asked = [prompt for prompt in trial.dataset.train if prompt.has_reference]
    tokenizer = task_tokenizer()
    own = torch.zeros(len(asked), 1)
    limit = trial.config.rollout.max_new_tokens
    drawn = sample((teacher, teacher), ids_of(asked), own, limit, seed, tokenizer.eos_token_id)
    texts = {
        prompt.prompt_id: tokenizer.decode(tokens[mask], skip_special_tokens=True)
        for prompt, tokens, mask in zip(asked, drawn.tokens, drawn.mask, strict=True)
    }
    of_asked = replace(trial, dataset=replace(trial.dataset, train=asked))
    return with_answers(of_asked, lambda prompt: texts[prompt.prompt_id]).supervise(drawn_student(trial), TAUGHT)


def same_teacher(variant: str, seed: int, rate: Settings) -> dict[str, dict[str, float]]:
    """Distil a student that learned from the texts of this teacher or of another one, offline or online."""
    taught, place = variant.split(", ")
    trial = trial_of(seed, *RESULTS_ALONE, *(OFFLINE if place == "offline" else ()), *rate)
    start = styled(seed, taught)
    return {"results of sums": trial.scores(start, trial.distil(start))}


def staleness(variant: str, seed: int, rate: Settings) -> dict[str, dict[str, float]]:
    """Distil on responses that are so many updates old."""
    loss, _, age = variant.rpartition(", ")
    trial, start = trial_of(seed, STALE_LOSSES[loss], f"rollout.max_staleness={age}", *rate), weak_start(seed)
    return {"held-out questions": trial.scores(start, trial.distil(start))}


@dataclass(frozen=True)
class Shape:
    run: Callable[[str, int, Settings], dict[str, dict[str, float]]]
    variants: tuple[str, ...]


SHAPES = {
    "one question": Shape(one_prompt, ("one question",)),
    "forgetting": Shape(forgetting, (RECOVERY, "labels of the sums")),
    "same teacher": Shape(
        same_teacher, tuple(", ".join(pair) for pair in product((SAME, "other teacher"), ("offline", "online")))
    ),
    "staleness": Shape(staleness, STALE_VARIANTS),
}


@dataclass(frozen=True)
class Claim:
    """A sentence of a source, and the number of one seed that would show it, in points."""

    shape: str
    says: str
    source: str
    shown_by: str
    of: Callable[[Found], float]
    expected: str
    """`above` or `below` 0, or `kept`: no more than `MARGIN` below 0."""


def change(variant: str, measured: str, since: str = "before") -> Callable[[Found], float]:
    return lambda found: found[variant]["right"][measured]["after"] - found[variant]["right"][measured][since]


def apart(variant: str, other: str, measured: str) -> Callable[[Found], float]:
    return lambda found: found[variant]["right"][measured]["after"] - found[other]["right"][measured]["after"]


def _lost(loss: str) -> Callable[[Found], float]:
    return apart(f"{loss}, 16", f"{loss}, 0", "held-out questions")


LAB = "Lu 2025"
"""A post without arXiv id, thinkingmachines.ai/blog/on-policy-distillation."""
LIGHTNING = "arXiv 2604.13010"
ASYNC = "arXiv 2606.24143"
_IT, _REST, _A, _B, _RESULT = "that question", "held-out questions", "A: sums", "B: times table", "results of sums"
CLAIMS = (
    Claim(
        "one question",
        "trained many times on one question, a student improves",
        LAB,
        "on it, after minus before",
        change("one question", _IT),
        "above",
    ),
    Claim(
        "one question",
        "... to the teacher's level",
        LAB,
        "on it, after minus teacher",
        change("one question", _IT, "teacher"),
        "kept",
    ),
    Claim(
        "one question",
        "... and on other questions too",
        LAB,
        "held out, after minus teacher",
        change("one question", _REST, "teacher"),
        "kept",
    ),
    Claim(
        "forgetting",
        "training on B costs A",
        LAB,
        "A, after B minus old self",
        lambda found: found[RECOVERY]["right"][_A]["before"] - found[RECOVERY]["right"][_A]["teacher"],
        "below",
    ),
    Claim(
        "forgetting",
        "distilling from the old self on A brings A back",
        LAB,
        "A, after minus before",
        change(RECOVERY, _A),
        "above",
    ),
    Claim("forgetting", "... nearly to where it was", LAB, "A, after minus old self", change(RECOVERY, _A, "teacher"), "kept"),
    Claim("forgetting", "... and B stays", LAB, "B, after minus before", change(RECOVERY, _B), "kept"),
    Claim(
        "same teacher",
        "offline, a student that learned from this teacher's texts ends above one that learned from another's",
        LIGHTNING,
        "same minus other",
        apart("same teacher, offline", "other teacher, offline", _RESULT),
        "above",
    ),
    Claim(
        "same teacher",
        "online too",
        LIGHTNING,
        "same minus other",
        apart("same teacher, online", "other teacher, online", _RESULT),
        "above",
    ),
    Claim(
        "same teacher",
        "with the same teacher offline reaches online",
        LIGHTNING,
        "offline minus online",
        apart("same teacher, offline", "same teacher, online", _RESULT),
        "kept",
    ),
    Claim(
        "staleness", "forward KL tolerates stale responses", ASYNC, "16 updates old minus fresh", _lost("forward KL"), "kept"
    ),
    Claim("staleness", "reverse KL does not", ASYNC, "16 updates old minus fresh", _lost("reverse KL"), "below"),
    Claim(
        "staleness",
        "... nor from the sampled token alone",
        ASYNC,
        "16 updates old minus fresh",
        _lost("reverse KL of one token"),
        "below",
    ),
    Claim(
        "staleness",
        "reverse KL loses more than forward KL",
        ASYNC,
        "reverse KL's loss minus forward KL's",
        lambda found: _lost("reverse KL")(found) - _lost("forward KL")(found),
        "below",
    ),
)


def verdict(expected: str, low: float, high: float) -> str:
    """Say what an interval says of a claim. Args: expected: as in `Claim`."""
    if expected == "below":
        return verdict("above", -high, -low)
    border = -MARGIN if expected == "kept" else 0.0
    if low > border:
        return "yes"
    return "no" if high < border else "cannot be told" if expected == "kept" else "not seen"


def seeds_of(rows: Iterable[kept_rows.Row], shape: str, rate: str) -> dict[int, dict[str, kept_rows.Row]]:
    """Rows of a shape at a rate by confirming seed and variant."""
    found: dict[int, dict[str, kept_rows.Row]] = {}
    for row in rows:
        if (row["shape"], row["rate"]) == (shape, rate) and row["seed"] >= FIRST_CONFIRMING_SEED:
            found.setdefault(row["seed"], {})[row["variant"]] = row
    return dict(sorted(found.items()))


def claims_table(rows: Sequence[kept_rows.Row]) -> str:
    """Markdown table of the claims, each at both rates over the seeds that have the whole shape, at least three."""
    columns = "".join(f" {rate} rate: points (95% interval), seeds | agrees |" for rate in RATES)
    lines = [f"| shape | what is said | source | measured here |{columns}", f"|{'---|' * (4 + 2 * len(RATES))}"]
    for claim in CLAIMS:
        seen = " | ".join(_seen(claim, seeds_of(rows, claim.shape, rate).values()) for rate in RATES)
        lines.append(f"| {claim.shape} | {claim.says} | {claim.source} | {claim.shown_by} | {seen} |")
    return "\n".join(lines)


def _seen(claim: Claim, seeds: Iterable[Found]) -> str:
    # A seed counts once all variants of its shape are there.
    values = [claim.of(found) for found in seeds if found.keys() >= set(SHAPES[claim.shape].variants)]
    if len(values) < 3:
        return f"{len(values)} | too few seeds"
    mean, low, high = mean_interval(values)
    return f"{mean:+.1f} ({low:.1f} to {high:.1f}), {len(values)} | {verdict(claim.expected, low, high)}"


def _place(variant: str) -> tuple[int, int]:
    """Place in the table of scores: losses as they stand, each by age."""
    loss, _, age = variant.rpartition(", ")
    return (list(STALE_LOSSES).index(loss), int(age)) if loss in STALE_LOSSES else (0, 0)


def scores_table(rows: Sequence[kept_rows.Row]) -> str:
    """Markdown table of all variants: right responses in percent, mean and standard deviation over seeds."""
    lines = ["| shape | variant | right responses to | rate | seeds | before | after | teacher |", f"|{'---|' * 8}"]
    for (name, shape), rate in product(SHAPES.items(), RATES):
        by_seed = seeds_of(rows, name, rate)
        for variant in sorted(shape.variants, key=_place):
            found = [each[variant]["right"] for each in by_seed.values() if variant in each]
            for measured in found[0] if found else ():
                numbers = [spread([each[measured][when] for each in found], ".1f") for when in ("before", "after", "teacher")]
                lines.append(f"| {name} | {variant} | {measured} | {rate} | {len(found)} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def starts_table(rows: Sequence[kept_rows.Row]) -> str:
    """Markdown table of what the students began with, seed by seed, in percent; variants with one start share a line."""
    starts: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in (row for row in rows if row["seed"] >= FIRST_CONFIRMING_SEED):
        for measured, scores in row["right"].items():
            starts.setdefault((row["shape"], row["variant"], measured), {})[row["seed"]] = scores["before"]
    seeds = sorted({seed for found in starts.values() for seed in found})
    sharing: dict[tuple[str, str, str], list[str]] = {}
    for (shape, variant, measured), found in starts.items():
        numbers = " | ".join(f"{found[seed]:.1f}" if seed in found else "" for seed in seeds)
        sharing.setdefault((shape, measured, numbers), []).append(variant)
    lines = [f"| shape | variant | right responses to | {' | '.join(map(str, seeds))} |", f"|{'---|' * (3 + len(seeds))}"]
    for (shape, measured, numbers), variants in sharing.items():
        which = "all" if len(variants) == len(SHAPES[shape].variants) else "; ".join(variants)
        lines.append(f"| {shape} | {which} | {measured} | {numbers} |")
    return "\n".join(lines)


def run(name: str) -> kept_rows.Row:
    """Run a row by its name."""
    shape, variant, rate, seed = name.split("; ")
    began = time.monotonic()
    right = SHAPES[shape].run(variant, int(seed), RATES[rate])
    wall_s = round(time.monotonic() - began, 1)
    kept = {"shape": shape, "variant": variant, "rate": rate, "seed": int(seed), "right": right, "wall_s": wall_s}
    return {"ok": True, **kept}


def names(shapes: Sequence[str], rates: Sequence[str], seeds: Sequence[int]) -> Iterator[str]:
    """Names of the rows: everything of a seed before the next seed."""
    for seed, rate, shape in product(seeds, rates, shapes):
        yield from (f"{shape}; {variant}; {rate}; {seed}" for variant in SHAPES[shape].variants)


def until(end: float, rows: Iterable[str]) -> Iterator[str]:
    """Pass names on until the clock says `end`."""
    for row in rows:
        if time.monotonic() > end:
            return
        yield row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="seeds to run")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES), metavar="SHAPE", help="some shapes")
    parser.add_argument("--rates", nargs="*", default=list(RATES), choices=list(RATES), metavar="RATE", help="high, low")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no row after so many minutes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of the rows")
    parser.add_argument("--table", action="store_true", help=f"rewrite the tables in {PAGE.name}")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    end = time.monotonic() + 60.0 * given.minutes
    kept_rows.measure(until(end, names(given.shapes, given.rates, given.seeds)), run, given.out)
    rows = list(kept_rows.read(given.out).values())
    if given.table:
        used = [row for row in rows if row["seed"] >= FIRST_CONFIRMING_SEED]
        text = "\n\n".join([claims_table(rows), scores_table(rows), starts_table(rows), kept_rows.origin(used)])
        kept_rows.write_between(PAGE, MARK, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
