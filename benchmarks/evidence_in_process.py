"""The cells of benchmarks/evidence.py in one process, without Ray, vLLM and DeepSpeed: many seeds in the time of a few runs.

    python -m benchmarks.evidence_in_process --seeds 0
    python -m benchmarks.evidence_in_process --seeds 100 101 102 103 104 --minutes 60
    python -m benchmarks.evidence_in_process --table --figure

Recipe, settings, questions, their order, who writes which response, tiny models, mixture and loss are kdray's own, read from
the same cell; only sampling and optimizer are plain PyTorch. It differs from a run in its draws, and in that the loss sees
the teacher's whole rows where a replica sends its top ids and the mass of the rest. One JSON file for each cell, a finished one
is skipped.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, LlamaForCausalLM, get_scheduler

import kdray
from benchmarks.evidence import (
    REGIMES,
    WAYS,
    Cell,
    commit_of_tree,
    draw,
    gap_text,
    page,
    read,
    record,
    write_page,
)
from benchmarks.evidence import RESULTS as RUNS
from benchmarks.evidence_differences import draw_differences
from kdray.config import Config, load_config
from kdray.data.dataset import Dataset, PromptStream, encode_answer, load_dataset
from kdray.evaluation import ends_in_a_loop
from kdray.models.resolve import build_tiny_model, task_tokenizer
from kdray.rollouts.draw import LoopSettings, sample_request
from kdray.runs.results.bootstrap import difference, share_of_gap
from kdray.runs.results.comparison import intervals_of
from kdray.runs.results.draws import Draw, Ratio, ratios
from kdray.types import Prompt

RESULTS = Path("benchmarks/results/evidence_in_process")
FIGURE = Path("benchmarks/results/evidence_in_process.svg")
DIFFERENCES = Path("benchmarks/results/evidence_differences.svg")
PAGE = Path("docs/evidence.md")
MARKS = ("<!-- table: benchmarks/evidence_in_process.py -->", "<!-- end of the table in one process -->")
MODELS = Path("runs/.evidence_in_process")

_LOOK_EVERY = 2
"""Supervised steps between two looks at the score that ends the phase: within ten, a student goes from 7% right to 37%."""


class TooWeakError(Exception):
    """The supervised phase ended below the share of right responses that the regime begins with: no cell of this seed."""


@dataclass(frozen=True)
class Responses:
    """Responses to prompts of one length, and what the models said of their tokens when they were drawn."""

    prompts: torch.Tensor  # [B, P]
    tokens: torch.Tensor  # [B, T]
    mask: torch.Tensor  # [B, T] bool, True up to the end of the response, which is included
    mixture: torch.Tensor  # [B, T] log m
    student: torch.Tensor  # [B, T] log q
    teacher: torch.Tensor  # [B, T] log p


@dataclass(frozen=True)
class Bench:
    """What all ways of a regime and a seed share."""

    config: Config
    tokenizer: Any
    teacher: LlamaForCausalLM
    start: LlamaForCausalLM
    """The student after its supervised phase."""


def rows_of(model: LlamaForCausalLM, prompts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Logits that predict `tokens`, [B, T, vocab]."""
    joined = torch.cat([prompts, tokens], dim=1)
    logits: torch.Tensor = model(joined[:, :-1], use_cache=False).logits
    return logits[:, prompts.shape[1] - 1 :]


@torch.no_grad()
def sample(
    models: tuple[LlamaForCausalLM, LlamaForCausalLM],
    prompts: torch.Tensor,
    alphas: torch.Tensor,
    limit: int,
    seed: int,
    end: int,
) -> Responses:
    """Draw from the mixture of (student, teacher). Args: prompts: [B, P]; alphas: [B, 1]; limit: tokens; end: its id."""
    student, teacher = models
    # Nothing is drawn from the teacher where no response is mixed: what it says of the tokens is then computed afterwards.
    asked = models if bool(alphas.any()) else (student,)
    caches = [DynamicCache() for _ in asked]
    generator = torch.Generator().manual_seed(seed)
    latest, going = prompts, torch.ones(len(prompts), dtype=torch.bool)
    columns: list[tuple[torch.Tensor, ...]] = []
    while len(columns) < limit and bool(going.any()):
        q, *mixed = (
            model(latest, past_key_values=cache, use_cache=True).logits[:, -1].log_softmax(-1)
            for model, cache in zip(asked, caches, strict=True)
        )
        m = kdray.log_mixture(mixed[0], q, alphas) if mixed else q
        latest = kdray.draw(m, torch.rand(len(m), generator=generator, dtype=torch.float64)).unsqueeze(-1)
        columns.append((latest, going.unsqueeze(-1), *(rows.gather(-1, latest) for rows in (m, q, *mixed))))
        going = going & (latest.squeeze(-1) != end)
    tokens, mask, m_said, q_said, *p_said = (torch.cat(column, dim=1) for column in zip(*columns, strict=True))
    if not p_said:
        p_said = [rows_of(teacher, prompts, tokens).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)]
    return Responses(prompts, tokens, mask, m_said, q_said, p_said[0])


def answers(prompts: Sequence[Prompt], tokenizer: Any) -> Responses:
    """The reference answers, as if they had been drawn; their log-probabilities are not recorded."""
    rows = [torch.from_numpy(encode_answer(tokenizer, prompt)).long() for prompt in prompts]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(tokens.shape[1]) < torch.tensor([[len(row)] for row in rows])
    unknown = torch.zeros(tokens.shape)
    return Responses(ids_of(prompts), tokens, mask, unknown, unknown, unknown)


def joined(parts: Sequence[Responses]) -> Responses:
    """The responses of all parts, padded to the longest."""
    longest = max(part.tokens.shape[1] for part in parts)

    def column(name: str) -> torch.Tensor:
        columns = [getattr(part, name) for part in parts]
        return torch.cat([torch.nn.functional.pad(each, (0, longest - each.shape[1])) for each in columns])

    names = ("tokens", "mask", "mixture", "student", "teacher")
    return Responses(torch.cat([part.prompts for part in parts]), *map(column, names))


class Optimizer:
    """AdamW with the recipe's schedule and clipping."""

    def __init__(self, model: LlamaForCausalLM, config: Config, rate: float, steps: int, schedule: str, warmup: int) -> None:
        training = config.training
        self._parameters = list(model.parameters())
        self._adamw = torch.optim.AdamW(self._parameters, lr=rate, betas=training.betas, weight_decay=training.weight_decay)
        self._schedule = get_scheduler(schedule, self._adamw, num_warmup_steps=warmup, num_training_steps=steps)
        self._clip = training.gradient_clipping

    def step(self, loss: torch.Tensor) -> None:
        self._adamw.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._adamw.step()
        self._schedule.step()


def supervise(
    student: LlamaForCausalLM,
    config: Config,
    dataset: Dataset,
    tokenizer: Any,
    enough: Callable[[LlamaForCausalLM], bool] = lambda student: False,
    every: int = 10,
) -> None:
    """The supervised phase before distillation. Args: enough: asked every so many steps, ends the phase."""
    sft = config.training.sft
    stream = PromptStream([prompt for prompt in dataset.train if prompt.has_reference], config.run.seed)
    optimizer = Optimizer(student, config, sft.learning_rate, sft.steps, "constant", 0)
    for step in range(sft.steps):
        if step and not step % every and enough(student):
            return
        rows = answers([stream.at(step * sft.batch_size + place) for place in range(sft.batch_size)], tokenizer)
        logits = rows_of(student, rows.prompts, rows.tokens)
        optimizer.step(torch.nn.functional.cross_entropy(logits[rows.mask], rows.tokens[rows.mask]))


def written(
    models: tuple[LlamaForCausalLM, LlamaForCausalLM], config: Config, dataset: Dataset, tokenizer: Any, step: int
) -> Responses:
    """The responses of a step, from (student, teacher) and the labels as the config's settings say."""
    settings, size = LoopSettings.of(config), config.training.batch_size
    stream = PromptStream(dataset.train, config.run.seed)
    by_id = {prompt.prompt_id: prompt for prompt in dataset.train}
    requests = [sample_request(settings, stream, step * size + place) for place in range(size)]
    parts = []
    if given := [by_id[request.prompt_id] for request in requests if request.writer == "data"]:
        parts.append(answers(given, tokenizer))
    if drawn := [request for request in requests if request.writer != "data"]:
        alphas = torch.tensor([[request.alpha] for request in drawn])
        prompts = ids_of([by_id[request.prompt_id] for request in drawn])
        seed = drawn[0].seed >> 1
        parts.append(sample(models, prompts, alphas, settings.max_new_tokens, seed, tokenizer.eos_token_id))
    return joined(parts)


def distil(student: LlamaForCausalLM, teacher: LlamaForCausalLM, config: Config, dataset: Dataset, tokenizer: Any) -> int:
    """Distillation as the config says. Returns: the number of tokens that the student was trained on.

    Responses are as old as `rollout.max_staleness` lets them be: those of a step were written that many updates before it,
    and those of the first steps by the student that it began with.
    """
    training = config.training
    loss_of = kdray.loss_function(config.loss)
    optimizer = Optimizer(student, config, training.learning_rate, training.steps, training.schedule, training.warmup_steps)
    trained = 0
    waiting: deque[Responses] = deque()
    for step in range(training.steps):
        while len(waiting) <= min(config.rollout.max_staleness, training.steps - 1 - step):
            waiting.append(written((student, teacher), config, dataset, tokenizer, step + len(waiting)))
        rows = waiting.popleft()
        with torch.no_grad():
            teacher_logits = rows_of(teacher, rows.prompts, rows.tokens)
        batch = kdray.LossBatch(
            token_ids=rows.tokens,
            mask=rows.mask,
            vocab_size=len(tokenizer),
            mixture_logprobs=rows.mixture,
            student_logprobs=rows.student,
            teacher_logprobs=rows.teacher,
            teacher_logits=teacher_logits,
        )
        output = loss_of(rows_of(student, rows.prompts, rows.tokens), batch, config.loss)
        optimizer.step(output.total / rows.mask.sum())
        trained += int(rows.mask.sum())
    return trained


@torch.no_grad()
def measure(
    model: LlamaForCausalLM, teacher: LlamaForCausalLM, config: Config, dataset: Dataset, tokenizer: Any
) -> dict[str, Ratio]:
    """A response of the model to each held-out prompt, graded and compared with the teacher."""
    grade, limit = dataset.grade, config.rollout.max_new_tokens
    assert grade is not None
    prompts = ids_of(dataset.heldout)
    drawn = sample((model, teacher), prompts, torch.zeros(len(prompts), 1), limit, config.run.seed, tokenizer.eos_token_id)
    own, other = (rows_of(each, drawn.prompts, drawn.tokens).log_softmax(-1) for each in (model, teacher))
    divergence = (own.exp() * (own - other)).sum(-1) * drawn.mask
    found = []
    for prompt, tokens, mask, nats in zip(dataset.heldout, drawn.tokens, drawn.mask, divergence, strict=True):
        ids = tokens[mask].numpy()
        ended = bool(ids[-1] == tokenizer.eos_token_id)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        found.append(
            Draw(
                prompt_id=prompt.prompt_id,
                draw=0,
                domain=prompt.domain,
                tokens=len(ids),
                truncated=not ended,
                repeats=ends_in_a_loop(ids[:-1] if ended else ids),
                exact_match=grade(prompt, text),
                reverse_kl=float(nats.sum()),
                forward_kl=None,
                top_overlap=None,
                step_match=grade.step_match(prompt, text),
            )
        )
    return ratios(found)


def ids_of(prompts: Sequence[Prompt]) -> torch.Tensor:
    """Token ids of prompts of one length, [B, P]."""
    # Prompts of a task at one difficulty have one length.
    return torch.from_numpy(np.stack([prompt.token_ids for prompt in prompts])).long()


def model_of(source: Any) -> LlamaForCausalLM:
    """The tiny model of a recipe (`TinyModel`), trained if the recipe says so, built once."""
    name = "-".join(str(value) for value in (source.layers, source.width, source.seed))
    taught = source.train
    if taught is not None:
        name += "-" + "-".join([*taught.tasks, *map(str, (taught.difficulty, taught.steps, taught.batch_size))])
    folder = MODELS / name
    if not folder.exists():
        build_tiny_model(source, folder)
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


@lru_cache(maxsize=1)
def bench_of(regime: str, seed: int) -> Bench:
    """Models of a regime and a seed, the student after its supervised phase: the same for every way."""
    cell = Cell("MiniLLM", regime, seed)
    config = load_config(cell.recipe, cell.settings)
    tokenizer = task_tokenizer()
    teacher: Any = next(iter(config.teachers.values()))
    bench = Bench(config, tokenizer, model_of(teacher.model), model_of(config.student.model))
    dataset, share = load_dataset(config, tokenizer), REGIMES[regime].start

    def enough(student: LlamaForCausalLM) -> bool:
        return share is not None and measure(student, bench.teacher, config, dataset, tokenizer)["exact_match"].value >= share

    supervise(bench.start, config, dataset, tokenizer, enough, _LOOK_EVERY)
    if share is not None and not enough(bench.start):
        raise TooWeakError(f"seed {seed}: below {share:.0%} after {config.training.sft.steps} supervised steps")
    return bench


def keep_start(regime: str, seed: int) -> None:
    """Write the student that runs of a regime and a seed begin with, unless it is there. Raises: TooWeakError without one."""
    folder = Cell("MiniLLM", regime, seed).start
    assert folder is not None
    if folder.exists():
        return
    bench = bench_of(regime, seed)
    partial = folder.with_name(f".{folder.name}.partial")
    for part in (bench.start, bench.tokenizer):
        part.save_pretrained(partial)
    partial.rename(folder)
    print(f"{folder}: written", flush=True)


def summary_of(cell: Cell) -> dict[str, Any]:
    """Run a cell. Returns: the keys of a run's summary that `record` keeps."""
    began = time.monotonic()
    bench = bench_of(cell.regime, cell.seed)
    config = load_config(cell.recipe, cell.settings)
    dataset = load_dataset(config, bench.tokenizer)
    student = copy.deepcopy(bench.start)
    trained = distil(student, bench.teacher, config, dataset, bench.tokenizer)
    shared = bench.teacher, config, dataset, bench.tokenizer
    found = {
        name: measure(model, *shared)
        for name, model in (("before", bench.start), ("after", student), ("teacher", bench.teacher))
    }
    before, after, teacher = (found[name]["exact_match"] for name in ("before", "after", "teacher"))
    gap = difference(teacher, before, share=True)
    share = None if gap is None or gap.low <= 0.0 else share_of_gap(after, before, teacher, gap)
    numbers = {name: {metric: ratio.value for metric, ratio in metrics.items()} for name, metrics in found.items()}
    return {
        **numbers,
        "intervals": {name: intervals_of(metrics) for name, metrics in found.items()},
        "gap_closed": {key: getattr(share, key, None) for key in ("value", "low", "high")},
        "verdict": None,
        "warnings": [],
        "trained_tokens": trained,
        "wall_s": round(time.monotonic() - began, 1),
        "versions": {"kdray": kdray.__version__, "torch": torch.__version__},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="seeds to run: all ways of one seed before the next")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS), metavar="WAY", help="some of the ways")
    parser.add_argument("--regime", default="few labels", choices=list(REGIMES))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no cell after so many minutes")
    parser.add_argument("--starts", action="store_true", help="only bring students to where runs begin; needs a regime of such")
    parser.add_argument("--table", action="store_true", help=f"rewrite the table in {PAGE}")
    parser.add_argument("--figure", action="store_true", help=f"rewrite {FIGURE} and {DIFFERENCES}")
    given = parser.parse_args()
    if given.starts and REGIMES[given.regime].start is None:
        parser.error(f'runs of regime "{given.regime}" have a supervised phase of their own; leave out --starts')
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    began = time.monotonic()
    for seed in given.seeds:
        try:
            if given.starts:
                keep_start(given.regime, seed)
            for way in () if given.starts else given.ways:
                run_cell(Cell(way, given.regime, seed), 60.0 * given.minutes - (time.monotonic() - began))
        except TooWeakError as error:
            print(error, flush=True)
    cells: Sequence[Mapping[str, Any]] = read(RESULTS)
    if given.table:
        write_page(PAGE, page(cells), MARKS)
    if given.figure:
        draw(cells, FIGURE)
        draw_differences(cells, read(RUNS), DIFFERENCES)
    return 0


def run_cell(cell: Cell, left_s: float) -> None:
    """Run a cell that has no file yet, and write its file, if there is time left."""
    target = RESULTS / f"{cell.name}.json"
    if target.exists() or left_s < 0.0:
        return
    found = record(cell, summary_of(cell), commit_of_tree())
    for path in RESULTS.glob(f"*-{cell.regime.replace(' ', '-')}-{cell.seed}.json"):
        other = json.loads(path.read_text())["before"]["exact_match"]
        if other != found["before"]["exact_match"]:
            sys.exit(
                f"{cell.name}: begins at {found['before']['exact_match']:.1%}, {path.stem} at {other:.1%}: machines and "
                "versions of torch round differently; choose a seed that has no cells, or run all ways of this one anew"
            )
    RESULTS.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(target)
    match = f"exact match {found['before']['exact_match']:.3f} to {found['after']['exact_match']:.3f}"
    print(f"{cell.name}: {match}, gap closed {gap_text([found])} %, {found['wall_s']:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
