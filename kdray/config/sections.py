"""The sections `run`, `evaluation` and `cluster`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, field_validator, model_validator

from kdray.config.base import NonNegative, NonNegativeFloat, OnResume, Positive, PositiveFloat, Settings, expanded
from kdray.config.job import JobSettings
from kdray.config.secret_files import Reader, SecretFiles
from kdray.config.storage import check_storage_url
from kdray.config.trackers import TensorBoardTracker, TrackerSource


class RunSettings(Settings):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run; its folder is `<output>/<name>`. Letters, digits, dot, dash and underscore."""
    seed: NonNegative = 0
    """Seed of all randomness: data order, sampling, initial weights of tiny models."""
    output: Annotated[Path, AfterValidator(expanded), OnResume()] = Path("runs")
    """Parent folder of run folders; `~` is the home folder, and relative paths are resolved from the directory in which the
    command was started."""
    storage: Annotated[str | None, OnResume()] = None
    """URL of a folder in an object store, or of a shared folder, that holds a copy of run folders: `s3://bucket/folder`,
    `gs://bucket/folder`, `file:///folder`. Checkpoints are then written only there, and a run resumes from it on any machine.
    None: the run folder is the only copy, and every node with student ranks must be able to access it. Credentials come from
    the environment."""

    untried_models: Annotated[list[str], OnResume()] = Field(default=[])
    """Model types (`model_type` of config.json) that the run may use although the table in docs/models.md has no row of them.
    At your own risk: a student is still compared with its replicas, but nobody has compared such a teacher with anything."""
    trackers: Annotated[list[TrackerSource], OnResume()] = Field(default=[TensorBoardTracker()])
    """Destinations of numbers and events besides the run folder's own files; the keys depend on `type`: tensorboard,
    prometheus, wandb, mlflow, or one of another distribution. One that fails is reported as the event `tracker_failed` and
    dropped; the run continues."""

    @field_validator("storage")
    @classmethod
    def _check_storage(cls, value: str | None) -> str | None:
        return None if value is None else check_storage_url(value)


class LmEvalSettings(Settings):
    """Tasks of the LM-Evaluation-Harness, which `kdray eval --lm-eval` measures a student by. They need the package lm_eval
    (`pip install 'kdray[lm-eval]'`)."""

    tasks: Annotated[list[str], Field(min_length=1)]
    """Names of tasks or groups: the harness's own (`lm-eval ls tasks`), whose data it downloads, or those in the folder of
    `--lm-eval-include`. No setting names that folder, since its files may run code."""
    limit: Positive | None = None
    """Number of documents of each task; None takes all."""
    shots: NonNegative | None = None
    """Number of solved examples before each question; None leaves it to the task."""
    batch_size: Positive = 8
    """Number of sequences that the model computes at once."""
    chat_template: bool = False
    """Ask by the tokenizer's chat template."""


class EvaluationSettings(Settings):
    every: NonNegative = 0
    """Steps between evaluations during training; 0 measures only before and after."""
    prompts: Positive | None = None
    """Number of held-out prompts to use; None uses all of `data.heldout_size`."""
    control: bool = False
    """Also train a copy of the SFT student by SFT alone for the same number of student tokens, and report it for comparison."""
    teacher: bool = True
    """Measure the teacher itself once, at the start of distillation, on the same prompts, so that results can be seen against
    it. Left out, with the reason, if nothing grades the prompts or the teacher cannot answer them as they are."""
    rouge_l: bool = False
    """Measure `rouge_l` too, the overlap of responses with the reference answers: for summaries and other free text, where no
    grader tells right from wrong. The held-out prompts need reference answers; those without are left out."""
    samples_per_prompt: Positive = 1
    """Responses drawn to each held-out prompt, each with a seed of its own. More narrow the intervals, up to what the number of
    prompts allows."""
    pass_at: list[Positive] | None = None
    """Values of k for which `pass_at_<k>` is estimated, the probability that at least one of k responses is right; at most
    `samples_per_prompt`. None is `samples_per_prompt` itself where that is above 1."""

    lm_eval: LmEvalSettings | None = None
    """Tasks of the LM-Evaluation-Harness for `kdray eval RUN --lm-eval`; a run itself does not measure them."""

    @model_validator(mode="after")
    def _enough_samples(self) -> EvaluationSettings:
        for k in self.pass_at or []:
            if k > self.samples_per_prompt:
                raise ValueError(
                    f"pass_at={self.pass_at} with samples_per_prompt={self.samples_per_prompt}: pass@{k} needs at least {k} "
                    "responses to a prompt; raise evaluation.samples_per_prompt, or remove it from evaluation.pass_at"
                )
        return self

    @property
    def passes(self) -> list[int]:
        """Values of k that are measured."""
        if self.pass_at is not None:
            return sorted(set(self.pass_at))
        return [self.samples_per_prompt] if self.samples_per_prompt > 1 else []


class ClusterSettings(Settings):
    address: str | None = None
    """Ray cluster to join; None takes RAY_ADDRESS, or starts a local Ray that ends with the run."""
    local_cpus: Positive | None = None
    """Number of CPUs of a local Ray; None is the machine's. A larger number lets small models share cores."""
    roles: dict[str, dict[str, Any]] = Field(default={})
    """Size and placement of the run's parts on this cluster, overriding the recipe's: by `teachers` (all), `teachers.<name>`,
    `rollout.pool` or `training`, settings of those sections such as replicas, num_gpus, labels or ranks."""
    may_grow: bool = False
    """The cluster adds nodes on demand (Ray's autoscaler): resources that no node has are then requested and waited for."""
    wait_s: NonNegativeFloat = 600.0
    """Longest wait for resources that are in use, or that nodes yet to be added will bring; then the run ends and says what is
    missing."""
    start_timeout_s: PositiveFloat = 3600.0
    """Longest start of an engine: reading the weights, compiling, capturing graphs. The 140 GB of a 70B model take 20 minutes
    at 120 MB/s. A replica whose engine takes longer ends, and Ray Serve starts another, three times in all; pools that do not
    serve a minute later, without a word, end the command (`start_stuck`)."""
    grace_s: PositiveFloat | None = None
    """Time from the signal to stop to the kill, where the run's machine is taken away: 30 where pods are evicted, 120 on spot
    instances of AWS. The run has ended by then, with a checkpoint if the rest of the step and one fit, by the time that the
    latest took, and otherwise at once: what came after the last checkpoint is trained again. None takes all the time that it
    needs."""
    teardown_s: PositiveFloat = 120.0
    """Longest wait for pools of replicas to be deleted when a run ends; what is not gone by then, or could not be deleted, is
    named in an event (`teardown_stuck`), and the command goes on without it."""
    stuck_after_s: PositiveFloat = 300.0
    """Longest time between two steps of an engine; beyond it the engine counts as stuck, and its replica is replaced."""
    request_silence_s: PositiveFloat = 1800.0
    """Shortest time without any answer after which a call to a replica that serves counts as lost; ten times the slowest of the
    last 32 calls (per token) if that is longer. What is missing of it is then sent to another replica (`rollout.retries`). It
    has to be longer than the ranks take to restart: replicas may wait for their weights."""
    hedge_after: Annotated[float, Field(gt=1.0)] | None = 3.0
    """Factor over the slowest of the last 32 calls (per token; at least 2 s) after which a call to a replica counts as slow, if
    another call sent no earlier has been answered, or three times that long while none is answered at all. A slow call is also
    sent to another replica, and the first answer counts; the slow replica gets no calls for a minute, as long as there are
    others. Never before 8 calls were answered. None disables hedging. Pools of several `accelerator_types` go by measured speed
    instead."""
    stuck_run_after_s: PositiveFloat = 18000.0
    """Longest time in which a run may make no step, get no answer and begin or end no part. Beyond it the event `run_stuck` and
    `logs/stuck.txt` say who waits for whom, and the run ends with 1; `--resume` continues it. The last of the deadlines: it has
    to be longer than the others (a config in which it is not is refused), and than the longest outage of a teacher that is to
    be waited for."""
    health_check_period_s: PositiveFloat = 10.0
    """Seconds between health checks of a replica."""
    secrets: SecretFiles = Field(default={})
    """Environment variables whose values lie in files, by name, as in
    `HF_TOKEN: {file: /run/secrets/hf-token, read_by: [driver, replicas, ranks]}`. The values are in nothing that kdray hands to
    Ray or writes."""
    job: JobSettings = JobSettings()
    """Settings of the run as a Ray job, for `kdray submit`."""

    def secret_files(self, reader: Reader) -> dict[str, Path]:
        """Files of the secrets that a kind of process gets, by the variable's name."""
        return {name: secret.file for name, secret in self.secrets.items() if reader in secret.read_by}
