"""Every setting: default, unit, check. YAML plus dotted overrides in, a resolved dump out.

Defaults are the vetted values; a recipe holds only what differs. Unknown keys are refused with the nearest valid one.
Checks here need nothing but the config itself; what needs files or a cluster is checked by `kdray.preflight` and
`cluster.placement`, before anything starts.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from kdray.autoscaling import ScalingRules
from kdray.errors import ConfigError
from kdray.workload import WINDOW_S

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]


class Settings(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


def _with_default_type(tree: Any, key: str, default: str) -> Any:
    """`tree` with the member of the union at `key` named, where only its other keys are given."""
    if isinstance(tree, dict) and isinstance(tree.get(key), dict):
        return {**tree, key: {"type": default} | tree[key]}
    return tree


# ---------------------------------------------------------------------------------------------------------- run


class RunSettings(Settings):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run; its folder is `<output>/<name>`. Letters, digits, dot, dash and underscore."""
    seed: NonNegative = 0
    """Seed of everything random: data order, draws, initial weights of tiny models."""
    output: Path = Path("runs")
    """Folder that holds run folders. A relative path counts from the folder the command was started in."""


# --------------------------------------------------------------------------------------------------------- data

TaskName = Literal["last_letters", "coin_flip", "arithmetic"]


class TaskPrompts(Settings):
    """Generated questions with an exact grader; no file, no network."""

    type: Literal["task"] = "task"
    tasks: list[TaskName] = Field(default=["last_letters"], min_length=1)
    """Tasks to draw from, in equal shares."""
    size: Positive = 4096
    """Number of training prompts, all different where the task has that many."""
    difficulty: Positive = 2
    """Words to concatenate, people around the coin, or digits of each number."""


class JsonlPrompts(Settings):
    """A file with one JSON object a line."""

    type: Literal["jsonl"]
    path: Path
    """The file; a relative path counts from the folder the command was started in."""
    prompt_column: str | None = None
    """Key that holds the prompt: a text, or a list of chat messages. Default: `prompt`, `question`, `instruction` or
    `messages`, whichever the first line has."""
    answer_column: str | None = None
    """Key that holds the reference answer. Default: `answer`, `completion`, `response` or `output`, where present."""
    domain_column: str | None = None
    """Key that says what a prompt is about, for `rollout.teachers` and for metrics by domain."""
    heldout_path: Path | None = None
    """A file of held-out prompts; without it the last `data.heldout_size` prompts are held out."""


class ParquetPrompts(Settings):
    """A Parquet file, or a folder of them."""

    type: Literal["parquet"]
    path: Path
    """The file or folder."""
    prompt_column: str | None = None
    """Column that holds the prompt; defaults as for JSONL."""
    answer_column: str | None = None
    """Column that holds the reference answer; defaults as for JSONL."""
    domain_column: str | None = None
    """Column that says what a prompt is about; as for JSONL."""
    heldout_path: Path | None = None
    """A file or folder of held-out prompts; without it the last `data.heldout_size` prompts are held out."""


class HubPrompts(Settings):
    """A dataset on the Hugging Face hub (or in its local cache), loaded by the `datasets` library."""

    type: Literal["hub"]
    name: str
    """Dataset id, such as `openai/gsm8k`."""
    subset: str | None = None
    """Configuration of the dataset, where it has several."""
    split: str = "train"
    """Split to train on."""
    heldout_split: str | None = None
    """Split of the held-out prompts; without it the last `data.heldout_size` prompts are held out."""
    revision: str | None = None
    """Commit or tag, so that a run can be repeated."""
    prompt_column: str | None = None
    """Column that holds the prompt; defaults as for JSONL."""
    answer_column: str | None = None
    """Column that holds the reference answer; defaults as for JSONL."""
    domain_column: str | None = None
    """Column that says what a prompt is about; as for JSONL."""


class IterablePrompts(Settings):
    """Prompts handed over by the caller of `cluster.launch.run(config, prompts=...)`; not usable from a file alone."""

    type: Literal["iterable"]


PromptSource = Annotated[
    TaskPrompts | JsonlPrompts | ParquetPrompts | HubPrompts | IterablePrompts, Field(discriminator="type")
]


class TaskText(Settings):
    """Solved examples of the generated tasks, one a document; no file, no network."""

    type: Literal["task"] = "task"
    tasks: list[TaskName] = Field(default=["arithmetic"], min_length=1)
    """Tasks to draw from, in equal shares."""
    size: Positive = 2048
    """Number of documents, all different."""
    difficulty: Positive = 2
    """As in `data.prompts.difficulty`."""


class JsonlText(Settings):
    """A file with one JSON object a line, each holding one document."""

    type: Literal["jsonl"]
    path: Path
    """The file; a relative path counts from the folder the command was started in."""
    column: str = "text"
    """Key that holds the document."""


class ParquetText(Settings):
    """A Parquet file, or a folder of them, one document a row."""

    type: Literal["parquet"]
    path: Path
    """The file or folder."""
    column: str = "text"
    """Column that holds the document."""


class HubText(Settings):
    """A dataset on the Hugging Face hub (or in its local cache), one document a row."""

    type: Literal["hub"]
    name: str
    """Dataset id."""
    subset: str | None = None
    """Configuration of the dataset, where it has several."""
    split: str = "train"
    """Split to read."""
    revision: str | None = None
    """Commit or tag, so that a run can be repeated."""
    column: str = "text"
    """Column that holds the document."""


TextSource = Annotated[TaskText | JsonlText | ParquetText | HubText, Field(discriminator="type")]


class DataSettings(Settings):
    prompts: PromptSource = TaskPrompts()
    """Where prompts come from; the keys depend on `type`: task, jsonl, parquet, hub, iterable."""
    heldout_size: Positive = 256
    """Prompts kept out of training, on which before and after are measured."""
    max_prompt_tokens: Positive = 256
    """Longest prompt, in tokens."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """What happens to a longer prompt: `refuse` stops at start with the count, `drop` leaves it out and reports the count.
    A prompt is never cut."""
    chat_template: Literal["auto", "always", "never"] = "auto"
    """Whether a text prompt is wrapped as a user message by the student tokenizer's chat template: `auto` where it has one.
    Chat messages always need one."""

    @model_validator(mode="before")
    @classmethod
    def _default_type(cls, tree: Any) -> Any:
        return _with_default_type(tree, "prompts", "task")


# ------------------------------------------------------------------------------------------------------- models


class TinyTraining(Settings):
    """Supervised training that turns a tiny model into a teacher, in seconds on a CPU."""

    tasks: list[TaskName] = Field(default=["last_letters"], min_length=1)
    """Tasks to learn."""
    difficulty: Positive = 2
    """As in `data.prompts.difficulty`."""
    steps: Positive = 600
    """Optimizer steps."""
    batch_size: Positive = 128
    """Examples a step."""
    learning_rate: PositiveFloat = 3e-3
    """Peak AdamW learning rate, with a short warm-up and cosine decay."""


class TinyModel(Settings):
    """A small Llama over characters, built on the spot (and kept in `<output>/.models`): for recipes that run anywhere."""

    type: Literal["tiny"]
    layers: Positive = 2
    """Transformer layers."""
    width: Positive = 64
    """Hidden size; a multiple of 32, the size of an attention head (the smallest that vLLM has on CPUs)."""
    tie_embeddings: bool = False
    """Whether input and output embeddings share one matrix."""
    max_positions: Positive = 512
    """Longest sequence, in tokens."""
    vocab_rows: Positive | None = None
    """Rows of the embedding when more than the tokenizer has, as real model families pad theirs."""
    seed: NonNegative = 0
    """Seed of the initial weights and of the training examples."""
    train: TinyTraining | None = None
    """Training that the model gets before the run; None leaves it random."""

    @model_validator(mode="after")
    def _whole_heads(self) -> TinyModel:
        if self.width % 32:
            raise ValueError(f"width={self.width}: attention heads have 32 channels; choose a multiple of 32")
        return self


def _model_tag(value: Any) -> str:
    return "path" if isinstance(value, str | Path) else "tiny"


ModelSource = Annotated[Annotated[str, Tag("path")] | Annotated[TinyModel, Tag("tiny")], Discriminator(_model_tag)]


class StudentSettings(Settings):
    model: ModelSource
    """Hugging Face id, local folder, or a tiny model to build (`type: tiny`)."""
    revision: str | None = None
    """Commit or tag on the hub."""


_ENGINE_ARGS_TAKEN = {
    "model": "use the teacher's `model`",
    "revision": "use the teacher's `revision`",
    "tokenizer": "the engine sees ids only",
    "hf_overrides": "the mixture model needs it",
    "additional_config": "the recorder needs it",
    "logits_processors": "the recorder needs it",
    "worker_extension_cls": "the worker extension needs it",
    "skip_tokenizer_init": "the engine sees ids only",
    "dtype": "use `dtype`",
    "seed": "use `run.seed`",
    "max_model_len": "it follows from data.max_prompt_tokens and rollout.max_new_tokens",
    "max_num_seqs": "use `max_num_seqs`",
    "max_num_batched_tokens": "use `max_num_batched_tokens`",
    "tensor_parallel_size": "use `tensor_parallel_size`",
    "gpu_memory_utilization": "use `gpu_memory_utilization`",
    "trust_remote_code": "kdray runs no code from model folders",
    "speculative_config": "vLLM does not speculate beside a logits processor that draws; remove it",
}


class AutoscalingSettings(Settings):
    """How a pool's size follows its work: it grows while the trainer waits for it, and shrinks when it has too little to do."""

    min_replicas: NonNegative = 1
    """Fewest replicas. At 0 a pool without work holds nothing, and its next request waits for a replica to start."""
    max_replicas: Positive
    """Most replicas. What the cluster cannot place is waited for, and nothing more is asked for meanwhile."""
    initial_replicas: Positive | None = None
    """Replicas that a run starts with; None takes `min_replicas`, or 1 where that is 0."""
    upscale_wait_s: PositiveFloat = 5.0
    """The pool grows when the trainer waited for it longer than this in the last 30 seconds; below half it may shrink."""
    upscale_queue_age_s: PositiveFloat = 300.0
    """The pool also grows when a request has waited this long for a free place in an engine, whoever asks."""
    upscale_delay_s: NonNegativeFloat = 30.0
    """Seconds that such a condition must hold before the pool grows, counted anew once the last new replica serves. With less
    than 30, waits from before that replica make it grow further."""
    upscale_factor: Annotated[float, Field(ge=1.0)] = 1.5
    """Growth at once, as a factor; at least one replica."""
    upscale_ongoing: NonNegativeFloat = 2.0
    """Unanswered rollouts a replica below which the pool does not grow: nobody else can finish the last ones of a batch."""
    downscale_idle_s: PositiveFloat = 300.0
    """Seconds without any work after which the pool falls to `min_replicas`. Longer than the trainer's step, or every step
    starts the pool again."""
    downscale_busy: Fraction = 0.7
    """One replica goes when the others would then be at work for at most this share of the time."""
    downscale_delay_s: NonNegativeFloat = 300.0
    """Seconds that this must hold."""
    drain_s: PositiveFloat = 120.0
    """Time that a replica to be removed has to finish what it was asked; the rest is drawn again elsewhere."""
    placement_timeout_s: PositiveFloat = 600.0
    """Time after which a replica that does not come to serve is reported as an event; longer than loading its model takes."""
    report_every_s: PositiveFloat = 5.0
    """Seconds between the reports of a replica to Ray Serve's controller, which decides by them."""

    @model_validator(mode="after")
    def _bounds(self) -> AutoscalingSettings:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"autoscaling.min_replicas={self.min_replicas} is more than autoscaling.max_replicas={self.max_replicas}; "
                "lower the one or raise the other"
            )
        if not self.min_replicas <= self.starting_replicas <= self.max_replicas:
            raise ValueError(
                f"autoscaling.initial_replicas={self.starting_replicas} is not within min_replicas={self.min_replicas} and "
                f"max_replicas={self.max_replicas}; choose a number between them, or remove it"
            )
        if self.upscale_wait_s >= WINDOW_S:
            raise ValueError(
                f"autoscaling.upscale_wait_s={self.upscale_wait_s:g}: waiting is counted over the last {WINDOW_S:g} seconds, "
                "and never reaches that; choose less"
            )
        # Serve remembers requests of the last five reports, and would start an emptied pool again for them.
        if self.min_replicas == 0 and self.downscale_idle_s < 5 * self.report_every_s:
            raise ValueError(
                f"autoscaling.downscale_idle_s={self.downscale_idle_s:g} with min_replicas=0: a pool may be emptied after five "
                f"reports without work at the earliest; raise it to {5 * self.report_every_s:g}, or lower report_every_s"
            )
        return self

    @property
    def starting_replicas(self) -> int:
        """Replicas that a run starts with."""
        return max(1, self.min_replicas) if self.initial_replicas is None else self.initial_replicas

    @property
    def rules(self) -> ScalingRules:
        """The part that decides."""
        return ScalingRules(**{rule.name: getattr(self, rule.name) for rule in fields(ScalingRules)})


class EngineSettings(Settings):
    """One kind of vLLM replica: its size, its place, its limits."""

    replicas: Positive = 1
    """Replicas, each one engine. Ignored where `autoscaling` is given."""
    autoscaling: AutoscalingSettings | None = None
    """Let the number of replicas follow the work; None keeps `replicas`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights and activations of the engine; `auto` is float32 on a CPU and the checkpoint's own elsewhere."""
    tensor_parallel_size: Positive = 1
    """GPUs that share one replica's layers."""
    num_cpus: NonNegativeFloat = 1.0
    """CPUs that Ray reserves for a replica; also its compute threads when it runs on CPUs."""
    num_gpus: NonNegativeFloat = 0.0
    """GPUs that Ray reserves for a replica: `tensor_parallel_size` on a GPU cluster, 0 on CPUs."""
    accelerator_type: str | None = None
    """Ray accelerator type to be placed on, such as `H100`."""
    accelerator_types: list[str] | None = None
    """Accelerator types that a replica may be placed on, whichever is free; with more than one, calls go to the replica that is
    expected to answer soonest, by measured tokens/s. Instead of `accelerator_type`."""
    resources: dict[str, float] = {}
    """Custom Ray resources that a replica takes, for placement."""
    max_num_seqs: Positive = 128
    """Sequences that a replica decodes at once."""
    max_num_batched_tokens: Positive = 4096
    """Tokens in one engine step; longer prefills are cut into chunks."""
    kv_cache_gib: PositiveFloat = 1.0
    """KV cache of a replica on CPUs, GiB."""
    gpu_memory_utilization: Fraction = 0.85
    """Share of GPU memory that the engine may take; leave room for the log-probability rows."""
    engine_args: dict[str, Any] = {}
    """Further vLLM engine arguments, passed through by name; those that kdray sets itself are refused."""

    @property
    def mixed_hardware(self) -> bool:
        """Whether replicas may differ in speed."""
        return self.accelerator_types is not None and len(self.accelerator_types) > 1

    @model_validator(mode="after")
    def _engine_rules(self) -> EngineSettings:
        for name in self.engine_args:
            if name in _ENGINE_ARGS_TAKEN:
                raise ValueError(f"engine_args.{name}: set by kdray; {_ENGINE_ARGS_TAKEN[name]}")
        if self.accelerator_types is not None:
            if self.accelerator_type is not None:
                raise ValueError(
                    f"accelerator_type={self.accelerator_type} with accelerator_types={self.accelerator_types}: one says where "
                    "a replica must be placed, the other where it may be; keep one of them"
                )
            if not self.accelerator_types or len(set(self.accelerator_types)) != len(self.accelerator_types):
                raise ValueError(f"accelerator_types={self.accelerator_types}: name at least one type, and each once")
        if self.tensor_parallel_size > 1 and self.num_gpus not in (0.0, float(self.tensor_parallel_size)):
            raise ValueError(
                f"num_gpus={self.num_gpus:g} with tensor_parallel_size={self.tensor_parallel_size}: a replica takes one GPU "
                f"for each part; set num_gpus={self.tensor_parallel_size}"
            )
        return self


class TeacherSettings(EngineSettings):
    """A teacher served by vLLM replicas on the cluster."""

    type: Literal["vllm"] = "vllm"
    scoring: Literal["recorder", "prompt_logprobs"] = "recorder"
    """How given sequences are scored by prefill. `recorder`: at any ids, with hidden states and both exact KLs.
    `prompt_logprobs`: vLLM's own, the teacher's top ids alone; for an engine whose prefill the recorder cannot read."""
    model: ModelSource
    """Hugging Face id, local folder, or a tiny model to build (`type: tiny`)."""
    revision: str | None = None
    """Commit or tag on the hub."""


class OpenAITeacherSettings(Settings):
    """A remote endpoint with OpenAI's interface, which writes whole responses; nothing of it runs on the cluster."""

    type: Literal["openai"]
    base_url: str
    """Address of the interface, usually ending in `/v1`."""
    model: str = Field(min_length=1)
    """Name of the model at the endpoint."""
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = "OPENAI_API_KEY"
    """Environment variable that holds the key; the key itself stands in no file. None for an endpoint without keys."""
    chat: bool = True
    """Ask by chat completions: the prompt's text is a user message, and the endpoint applies its own template. False asks by
    plain completions, which continue the text as it is."""
    system_prompt: str | None = None
    """System message before every prompt; for `chat`."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature at the endpoint; 0 is greedy. 1 draws from the teacher's own law."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus at the endpoint."""
    logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    """Top logprobs that the endpoint gives for every token: a support for the losses that need one. 0 asks for text only."""
    token_ids: bool = False
    """The endpoint takes and names token ids, as vLLM's server does, and its tokenizer is the student's. Prompts and responses
    then travel as ids, and nothing is tokenized again. Compared with the student's tokenizer at start."""
    max_concurrency: Positive = 8
    """Requests in flight at once."""
    requests_per_minute: PositiveFloat | None = None
    """Most requests started in a minute, evenly spread, repeated ones included; None sets no limit."""
    timeout_s: PositiveFloat = 120.0
    """Longest silence of the endpoint before a request is sent again."""
    retries: NonNegative = 5
    """Times a request is sent again after a timeout, a lost connection, a rate limit (429) or an error of the endpoint (5xx); a
    pause that the endpoint asks for is kept, up to two minutes."""

    @model_validator(mode="after")
    def _together(self) -> OpenAITeacherSettings:
        try:
            url = urlsplit(self.base_url)
        except ValueError as error:
            raise ValueError(f"base_url: not an address: {error}") from error
        # Neither message repeats the address: what is wrong with it may be a key inside.
        if url.username is not None or url.password is not None or url.query or url.fragment:
            raise ValueError("base_url: holds more than an address; give a key by `api_key_env`")
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError("base_url: not an address; write it as https://host/v1")
        if self.token_ids and self.chat:
            raise ValueError("token_ids=true with chat=true: chat completions take no ids; set chat=false or token_ids=false")
        if self.logprobs and not self.token_ids:
            raise ValueError(
                f"logprobs={self.logprobs} with token_ids=false: logprobs of tokens named by text cannot be told apart; set "
                "token_ids=true where the endpoint names ids (vLLM's server), or logprobs=0"
            )
        if self.system_prompt is not None and not self.chat:
            raise ValueError("system_prompt with chat=false: plain completions have no messages; set chat=true or remove it")
        return self


class HFTeacherSettings(Settings):
    """A small Hugging Face model inside the run's own process, in float32 on the CPU: for tests and tiny teachers."""

    type: Literal["hf"]
    model: ModelSource
    """Hugging Face id, local folder, or a tiny model to build (`type: tiny`)."""
    revision: str | None = None
    """Commit or tag on the hub."""
    batch_size: Positive = 16
    """Sequences of one forward pass, which holds a row of logits for each of their tokens."""


class CaptureTeacherSettings(Settings):
    """Answers of a teacher that were recorded earlier: nothing is loaded or asked, and nothing else can be scored."""

    type: Literal["capture"]
    path: Path
    """Folder of a capture, or one Parquet file of rollouts. A relative path counts from the folder the command was started
    in."""


# ------------------------------------------------------------------------------------------------------ rollout


OtherTeacherSettings = OpenAITeacherSettings | HFTeacherSettings | CaptureTeacherSettings
"""Teachers that are no pool of replicas."""


def _teacher_tag(value: Any) -> str:
    kind = value.get("type", "vllm") if isinstance(value, dict) else getattr(value, "type", None)
    return str(kind)


TeacherSource = Annotated[
    Annotated[TeacherSettings, Tag("vllm")]
    | Annotated[OpenAITeacherSettings, Tag("openai")]
    | Annotated[HFTeacherSettings, Tag("hf")]
    | Annotated[CaptureTeacherSettings, Tag("capture")],
    Discriminator(_teacher_tag),
]


class RouteRule(Settings):
    pattern: str
    """Regular expression, found anywhere in the prompt's text as it was tokenized."""
    teacher: str
    """Name of the teacher that prompts with it go to."""

    @model_validator(mode="after")
    def _compiles(self) -> RouteRule:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern={self.pattern!r}: not a regular expression: {error}") from error
        return self


class RouteSettings(Settings):
    """Every prompt goes to one teacher. Give one of `map`, `rules`, `weights`."""

    type: Literal["route"]
    map: dict[str, str] | None = None
    """Teacher by the prompt's domain: the task's name, or what `data.prompts.domain_column` holds."""
    rules: list[RouteRule] | None = None
    """The first rule whose pattern is found decides."""
    weights: dict[str, NonNegativeFloat] | None = None
    """Each sample goes to a teacher drawn in proportion to these."""
    default: str | None = None
    """Teacher of prompts that `map` or `rules` do not name; None refuses them."""
    missing: Literal["wait", "stop"] = "wait"
    """What happens to the prompts of a teacher without any replica: `wait` for one, or `stop` the run with the reason."""
    missing_after_s: PositiveFloat = 120.0
    """Time without a replica after which a teacher counts as missing."""

    @model_validator(mode="after")
    def _one_way(self) -> RouteSettings:
        given = [name for name in ("map", "rules", "weights") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"rollout.teachers: type=route takes one of map, rules, weights, and {len(given)} are given")
        if self.weights is not None and self.default is not None:
            raise ValueError("rollout.teachers.default: weights send every prompt somewhere; remove it")
        return self

    def names(self) -> set[str]:
        """Teachers that it mentions."""
        mapped = [*(self.map or {}).values(), *(rule.teacher for rule in self.rules or []), *(self.weights or {})]
        return {*mapped, *([] if self.default is None else [self.default])}


class EnsembleSettings(Settings):
    """Several teachers make the target of every prompt together; one of them samples with the student."""

    type: Literal["ensemble"]
    teachers: list[str] | None = None
    """The chosen ones, in order; None takes all."""
    mean: Literal["arithmetic", "geometric"] | None = None
    """What the target is: the `arithmetic` mean of the probabilities is what a forward KL to each teacher asks for, the
    `geometric` mean what a reverse KL does. None takes the one of `loss.type`."""
    weights: dict[str, NonNegativeFloat] | None = None
    """Shares of the teachers; None is equal ones."""
    domain_weights: dict[str, dict[str, NonNegativeFloat]] | None = None
    """Shares by the prompt's domain; prompts of another domain have `weights`."""
    confidence_temperature: PositiveFloat | None = None
    """Given, every token has weights of its own: a softmax of the teachers' negative entropies, nats, over this. Sure is not
    right: it trusts a teacher that is wrong with confidence."""
    sampler: Literal["rotate", "first", "weights"] = "rotate"
    """Who samples: the teachers in turn, always the first, or one drawn by its weight."""
    support: Literal["union", "sampler"] = "union"
    """Ids at which the teachers are averaged. `union`: all teachers' and the student's top ids and the drawn one, which takes a
    second prefill at every teacher. `sampler`: those of the teacher that sampled, one prefill at the others."""
    missing: Literal["wait", "renormalise", "stop"] = "wait"
    """What happens while a teacher has no replica: `wait` for one, `renormalise` the weights of the others, or `stop` the run
    with the reason."""
    missing_after_s: PositiveFloat = 120.0
    """Time without a replica after which a teacher counts as missing."""

    @model_validator(mode="after")
    def _one_kind_of_weights(self) -> EnsembleSettings:
        if self.confidence_temperature is not None and (self.weights or self.domain_weights):
            raise ValueError(
                "rollout.teachers.confidence_temperature: it makes every token's weights; remove weights and domain_weights"
            )
        if self.teachers is not None and (not self.teachers or len(set(self.teachers)) != len(self.teachers)):
            raise ValueError(f"rollout.teachers.teachers={self.teachers}: name at least one teacher, and each once")
        return self

    def names(self) -> set[str]:
        """Teachers that it mentions."""
        shares = [self.weights or {}, *(self.domain_weights or {}).values()]
        return {*(self.teachers or []), *(name for mapping in shares for name in mapping)}


TeachersSettings = Annotated[RouteSettings | EnsembleSettings, Field(discriminator="type")]


class RolloutSettings(Settings):
    alpha: Fraction = 0.2
    """Teacher's share of every next-token draw (MiniLLM's alpha): 0 samples from the student alone, 1 from the teacher."""
    max_new_tokens: Positive = 128
    """Longest response, in tokens."""
    samples_per_prompt: Positive = 1
    """Rollouts drawn for each prompt."""
    max_staleness: NonNegative = 1
    """Most optimizer steps between the weights that sampled a token and the weights being trained on it. A guarantee:
    0 is strictly on-policy; 1 lets sampling overlap training."""
    sampler: Literal["mixture", "student"] = "mixture"
    """`mixture`: teacher replicas sample and score in one pass. `student`: student-only replicas sample (alpha 0), teacher
    replicas score by prefill; for a teacher that is too slow to decode beside the student."""
    teacher_top_k: Positive = 32
    """Teacher logprobs kept for every token; the vocabulary's size makes every loss exact."""
    teacher_signal: Literal["support", "hidden"] = "support"
    """What a teacher returns for every token beside log p. `support`: logprobs at its top ids and the student's, and the mass
    outside; 6 bytes an id. `hidden`: its last hidden state too, from which the student's ranks make exact full rows with the
    teacher's output head; 2 bytes a channel, and a copy of the head on every rank. For the divergences."""
    student_top_k: NonNegative = 16
    """The student's own top ids at which the teacher's logprob is kept too: reverse KL needs them."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature. The mixture and its weights are exact at 1 only."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus. The mixture and its weights are exact at 1 only."""
    teachers: TeachersSettings | None = None
    """With several teachers: how they share the prompts (`type: route`), or make one target (`type: ensemble`)."""
    pool: EngineSettings = EngineSettings()
    """The student-only replicas of `sampler: student`."""
    retries: NonNegative = 5
    """Times a request is sent again after its replica died or failed."""

    @model_validator(mode="before")
    @classmethod
    def _alpha_of_sampler(cls, tree: Any) -> Any:
        # The default of alpha depends on who samples; written down here, it survives a dump.
        if isinstance(tree, dict) and tree.get("sampler") == "student":
            return {"alpha": 0.0} | tree
        return tree

    @model_validator(mode="after")
    def _exact(self) -> RolloutSettings:
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if value != 1.0:
                raise ValueError(
                    f"rollout.{name}={value:g}: the mixture and its importance weights are exact at {name}=1 only; "
                    f"remove rollout.{name}"
                )
        if self.sampler == "student" and self.alpha != 0.0:
            raise ValueError(
                f"rollout.alpha={self.alpha:g} with rollout.sampler=student: student-only replicas sample at alpha 0; "
                "set rollout.alpha=0 or rollout.sampler=mixture"
            )
        return self


# --------------------------------------------------------------------------------------------------------- loss


StalenessHandling = Literal["truncate", "mask"]


class MiniLLMLoss(Settings):
    """Policy gradient of the sequence-level reverse KL, split in a single-step and a long term (MiniLLM, eq. 3-6)."""

    type: Literal["minillm"] = "minillm"
    length_norm: bool = True
    """Divide the return by the number of tokens it sums (eq. 6); without it long responses dominate."""
    gamma: Fraction = 1.0
    """Discount of the return per token; 1 is the paper's."""
    single_step: bool = True
    """Whether a token's own reward enters as the exact per-position reverse KL (eq. 3), or read at the one draw as part of
    the return (eq. 2), with a higher variance."""
    whitening: bool = False
    """Shift and scale the returns to mean 0 and variance 1 over the response tokens of the whole step; their q is then the
    sampler's. Steadies the size of the long term against the single-step term, and changes the objective by that."""
    staleness: StalenessHandling = "truncate"
    """What happens to a token whose staleness ratio q_theta / q_sampled is above the cap: its ratio becomes the cap
    (`truncate`), or the long term leaves the token out (`mask`)."""
    staleness_cap: PositiveFloat = 2.0
    """Upper bound of the staleness ratio q_theta / q_sampled. The mixing weight q / m is bounded by 1 / (1 - alpha) and is
    never clipped."""


class LMOpsLoss(Settings):
    """MiniLLM as its reference code computes it (microsoft/LMOps), with the defaults of that code; for comparison."""

    type: Literal["lmops"]
    gamma: Fraction = 0.95
    """Discount of the return per token; the return starts at the token itself."""
    length_norm: bool = True
    """Divide the return by the number of tokens left, the token itself included."""
    single_step: bool = True
    """Whether the exact per-position reverse KL term is added."""
    whitening: bool = True
    """Shift and scale the returns to mean 0 and variance 1 over the response tokens of the whole step."""
    reward_scaling: PositiveFloat = 0.5
    """The log-ratio of a token is divided by this; whitening takes most of it back."""
    reward_clip: PositiveFloat = 100.0
    """Largest absolute reward of a token, after scaling."""
    clip: Annotated[float, Field(gt=0.0, lt=1.0)] | None = 0.2
    """PPO clip of q_theta / m: no gradient above 1 + clip at a positive advantage, nor below 1 - clip at a negative one. Mixing
    alone reaches it, before any staleness. None turns it off."""


class PerDecisionLoss(Settings):
    """Reverse KL over whole responses with per-decision importance weights: no bias from mixing or staleness."""

    type: Literal["per_decision"]
    horizon: NonNegative | None = None
    """Tokens that weights reach back and returns look ahead. None is exact, with a variance that grows exponentially in the
    response length; 0 is the per-position reverse KL; a few tokens trade one for the other."""


class VOPDLoss(Settings):
    """Reverse KL at the sampled token with the state's KL as baseline (vOPD, Oh et al. 2026)."""

    type: Literal["vopd"]
    gamma: Fraction = 0.0
    """Discount of later rewards: 0 is on-policy distillation's immediate reward, 1 the return of the whole response."""
    staleness: StalenessHandling = "truncate"
    """As for minillm: above the cap the ratio becomes the cap (`truncate`), or the token is left out (`mask`)."""
    staleness_cap: PositiveFloat = 2.0
    """Upper bound of the staleness ratio q_theta / q_sampled."""


class ReverseKLLoss(Settings):
    """KL(student || teacher) at every position of the student's samples (GKD with beta 1)."""

    type: Literal["reverse_kl"]


class ForwardKLLoss(Settings):
    """KL(teacher || student) at every position of the samples."""

    type: Literal["forward_kl"]


class JSDLoss(Settings):
    """Generalised Jensen-Shannon divergence on student samples (GKD, Agarwal et al. 2024)."""

    type: Literal["jsd"]
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Teacher's share of the mixture inside: towards 0 it behaves like forward KL, towards 1 like reverse KL."""


class SkewForwardKLLoss(Settings):
    """KL(teacher || skew teacher + (1 - skew) student) at every position of the samples (DistiLLM, Ko et al. 2024)."""

    type: Literal["skew_forward_kl"]
    skew: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Teacher's share of the mixture inside: bounds the loss by -log(skew); towards 0 it is forward KL."""


class SkewReverseKLLoss(Settings):
    """KL(student || skew student + (1 - skew) teacher) at every position of the samples (DistiLLM, Ko et al. 2024)."""

    type: Literal["skew_reverse_kl"]
    skew: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Student's share of the mixture inside: bounds the loss by -log(skew); towards 0 it is reverse KL."""


class TVDLoss(Settings):
    """Total variation distance at every position of the samples (f-DISTILL, Wen et al. 2023)."""

    type: Literal["tvd"]


class AdaptiveKLLoss(Settings):
    """Forward and reverse KL, weighted by the gaps in the teacher's head and tail (AKL, Wu et al. 2024)."""

    type: Literal["adaptive_kl"]
    head_mass: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Teacher's mass that its most likely ids, the head, may sum to; the paper's mu."""


class MSELogitLoss(Settings):
    """Half the mean square difference of centred logits at every position of the samples (Ba & Caruana 2014)."""

    type: Literal["mse_logit"]


class HintonLoss(Settings):
    """Softened forward KL and cross entropy of the recorded tokens (Hinton et al. 2015). For samples that the teacher wrote:
    the student's own tokens are no labels."""

    type: Literal["hinton"]
    temperature: PositiveFloat = 2.0
    """Divides both models' logits in the soft term, whose gradient is multiplied back by its square."""
    soft_share: Fraction = 0.5
    """Weight of the soft term; the hard term has the rest."""


class ForwardKLSampledLoss(Settings):
    """Forward KL at the sampled token, weighted by p / m: sequence-level distillation at `rollout.alpha: 1` (Kim & Rush 2016).
    The weight is at most 1 / alpha; at alpha 0 it has no bound."""

    type: Literal["forward_kl_sampled"]


class SequenceLoss(Settings):
    """Cross entropy of the responses as they are: sequence-level distillation where a teacher wrote them (Kim & Rush 2016).
    Needs their text alone, so a black-box teacher will do; on the student's own samples it teaches nothing."""

    type: Literal["sequence"]


class ULDLoss(Settings):
    """Universal Logit Distillation over texts aligned as in GOLD, from a teacher with another tokenizer."""

    type: Literal["uld"]
    sorted_weight: NonNegativeFloat = 0.1
    """Weight of the distance between both laws sorted by probability (Boizard et al. 2024). A large one has local minima, where
    a matched id takes the rank of another."""
    matched_weight: NonNegativeFloat = 1.0
    """Weight of the forward KL over the student's ids that begin the teacher's tokens, everything else being one bucket."""

    @model_validator(mode="after")
    def _some_weight(self) -> ULDLoss:
        if not self.sorted_weight + self.matched_weight > 0.0:
            raise ValueError("loss.sorted_weight and loss.matched_weight are both 0: there is nothing to learn; raise one")
        return self


LossSettings = Annotated[
    MiniLLMLoss
    | LMOpsLoss
    | PerDecisionLoss
    | VOPDLoss
    | ReverseKLLoss
    | ForwardKLLoss
    | JSDLoss
    | SkewForwardKLLoss
    | SkewReverseKLLoss
    | TVDLoss
    | AdaptiveKLLoss
    | MSELogitLoss
    | HintonLoss
    | ForwardKLSampledLoss
    | SequenceLoss
    | ULDLoss,
    Field(discriminator="type"),
]


DIVERGENCE_LOSSES = (
    ReverseKLLoss,
    ForwardKLLoss,
    JSDLoss,
    SkewForwardKLLoss,
    SkewReverseKLLoss,
    TVDLoss,
    AdaptiveKLLoss,
    MSELogitLoss,
    HintonLoss,
)
"""Losses that compare both models' rows at every position and nothing else."""


def _type_of(loss: type[Settings]) -> str:
    return str(loss.model_fields["type"].annotation.__args__[0])  # type: ignore[union-attr]


# ----------------------------------------------------------------------------------------------------- training


class SFTSettings(Settings):
    """Supervised fine-tuning on the reference answers before distillation (MiniLLM's first phase)."""

    steps: NonNegative = 0
    """Optimizer steps; 0 leaves the phase out."""
    learning_rate: PositiveFloat = 1e-5
    """Peak AdamW learning rate."""
    batch_size: Positive = 64
    """Examples a step, over all ranks."""


class PretrainingSettings(Settings):
    """Plain text that the student keeps modelling beside distillation, so that it forgets less (MiniLLM's L_PT)."""

    source: TextSource
    """Where documents come from; the keys depend on `type`: jsonl, parquet, hub, task."""
    weight: PositiveFloat = 1.0
    """Weight of the mean over text tokens beside the mean over response tokens."""
    batch_size: Positive = 64
    """Windows a step, over all ranks."""
    window_tokens: Annotated[int, Field(ge=2)] = 512
    """Longest window; a longer document is cut into several, none of its tokens is left out."""
    teacher_share: Fraction = 0.0
    """Share of the forward KL to the teacher on the text; the rest is the text's own cross entropy. The reference code of
    MiniLLM has 0.5, its paper 0. Above 0 the teacher scores every window."""


_DEEPSPEED_TAKEN = {
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "micro_batch_size",
    "gradient_clipping": "gradient_clipping",
    "optimizer": "learning_rate, betas and weight_decay",
    "scheduler": "schedule and warmup_steps",
    "bf16": "precision",
    "fp16": "precision",
}


class TrainingSettings(Settings):
    steps: Positive = 100
    """Steps of the distillation phase: each trains one batch of rollouts and publishes one version of the student."""
    batch_size: Positive = 64
    """Rollouts a step, over all ranks."""
    micro_batch_size: Positive = 16
    """Rollouts that one rank holds in one forward pass; the gradient does not depend on it."""
    learning_rate: PositiveFloat = 5e-6
    """Peak AdamW learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Course of the learning rate after warm-up."""
    warmup_steps: NonNegative = 0
    """Steps over which the learning rate rises linearly from 0."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's decay rates."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay."""
    gradient_clipping: PositiveFloat = 1.0
    """Largest global gradient norm."""
    ranks: Positive = 1
    """Student ranks, one process each (one GPU each on a GPU cluster)."""
    cpus_per_rank: PositiveFloat = 1.0
    """CPUs that Ray reserves for a rank; also its compute threads when it runs on CPUs."""
    gpus_per_rank: NonNegativeFloat = 0.0
    """GPUs that Ray reserves for a rank: 1 on a GPU cluster, 0 on CPUs."""
    accelerator_type: str | None = None
    """Ray accelerator type that the ranks are placed on, such as `H100`."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """DeepSpeed ZeRO stage: what is sharded over ranks (1 optimizer, 2 and gradients, 3 and parameters)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of forward and backward; losses reduce in float32 either way."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    deepspeed: dict[str, Any] = {}
    """Further DeepSpeed settings, merged over the generated ones (offload, overlap, bucket sizes); those that kdray sets
    itself are refused."""
    checkpoint_every: NonNegative = 50
    """Steps between checkpoints; 0 writes one only at the end and on interruption."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints that are kept."""
    max_restarts: NonNegative = 2
    """Times the ranks may be restarted from the last checkpoint after one is lost."""
    sync_bucket_mib: PositiveFloat = 256.0
    """Size of one bucket of weights on their way to the replicas, MiB."""
    mini_batch_size: Positive | None = None
    """Rollouts of one optimizer update, over all ranks; None takes `batch_size`."""
    inner_epochs: Positive = 1
    """Passes over the rollouts of a step (PPO's inner epochs; MiniLLM has 4). The weights move meanwhile: the staleness ratio
    of the policy-gradient losses corrects that, up to its cap."""
    sft: SFTSettings = SFTSettings()
    """The supervised phase before distillation."""
    pretraining: PretrainingSettings | None = None
    """Pretraining text mixed into every update; None leaves it out."""

    @model_validator(mode="after")
    def _split(self) -> TrainingSettings:
        sizes = {"batch_size": self.batch_size, "sft.batch_size": self.sft.batch_size}
        if self.mini_batch_size is not None:
            sizes["mini_batch_size"] = self.mini_batch_size
            if self.batch_size % self.mini_batch_size:
                raise ValueError(
                    f"training.batch_size={self.batch_size} is not a multiple of "
                    f"training.mini_batch_size={self.mini_batch_size}; choose a divisor"
                )
        if self.pretraining is not None:
            sizes["pretraining.batch_size"] = self.pretraining.batch_size
            if self.pretraining.batch_size < self.ranks * self.mini_batches:
                raise ValueError(
                    f"training.pretraining.batch_size={self.pretraining.batch_size} is less than one window for each of "
                    f"{self.ranks} ranks in each of {self.mini_batches} mini-batches; raise it to "
                    f"{self.ranks * self.mini_batches} or more"
                )
        for name, size in sizes.items():
            if size % (self.ranks * self.micro_batch_size):
                raise ValueError(
                    f"training.{name}={size} is not a multiple of ranks x micro_batch_size = {self.ranks} x "
                    f"{self.micro_batch_size}; choose {name} so that every rank gets whole micro-batches"
                )
        for name in self.deepspeed:
            if name in _DEEPSPEED_TAKEN:
                raise ValueError(f"training.deepspeed.{name}: set by kdray; use training.{_DEEPSPEED_TAKEN[name]}")
        if "stage" in self.deepspeed.get("zero_optimization", {}):
            raise ValueError("training.deepspeed.zero_optimization.stage: set by kdray; use training.zero_stage")
        if self.warmup_steps > self.steps:
            raise ValueError(f"training.warmup_steps={self.warmup_steps} is more than training.steps={self.steps}")
        return self

    @property
    def mini_batches(self) -> int:
        """Mini-batches that the rollouts of one step make."""
        return self.batch_size // (self.mini_batch_size or self.batch_size)

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates of one step."""
        return self.mini_batches * self.inner_epochs


# --------------------------------------------------------------------------------------------------- evaluation


class EvaluationSettings(Settings):
    every: NonNegative = 0
    """Steps between evaluations during training; 0 measures only before and after."""
    prompts: Positive | None = None
    """Held-out prompts to use; None uses all of `data.heldout_size`."""
    control: bool = False
    """Also train a copy of the SFT student by SFT alone for the same number of student tokens, and report it beside."""


# ------------------------------------------------------------------------------------------------------ cluster


class ClusterSettings(Settings):
    address: str | None = None
    """Ray cluster to join; None takes RAY_ADDRESS, or starts a local Ray that ends with the run."""
    local_cpus: Positive | None = None
    """CPUs that a local Ray counts; None is the machine's. More than it has lets small models share cores."""
    health_check_period_s: PositiveFloat = 10.0
    """Seconds between health checks of a replica."""


class Config(Settings):
    """A whole run."""

    run: RunSettings
    """Name, seed, output."""
    data: DataSettings = DataSettings()
    """Prompts and what is held out."""
    student: StudentSettings
    """The model that learns."""
    teachers: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")], TeacherSource] = Field(min_length=1)
    """Teachers by name; the keys depend on `type`: vllm (the default), openai, hf or capture."""
    rollout: RolloutSettings = RolloutSettings()
    """How sequences are drawn."""
    loss: LossSettings = MiniLLMLoss()
    """What is minimised; the keys depend on `type`, and docs/losses.md says which when."""
    training: TrainingSettings = TrainingSettings()
    """Optimizer, ranks, precision, checkpoints."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """What is measured on held-out prompts."""
    cluster: ClusterSettings = ClusterSettings()
    """Where it runs."""

    @model_validator(mode="before")
    @classmethod
    def _default_type(cls, tree: Any) -> Any:
        return _with_default_type(tree, "loss", "minillm")

    @model_validator(mode="after")
    def _together(self) -> Config:
        self._check_teachers()
        if isinstance(self.loss, MiniLLMLoss | LMOpsLoss | PerDecisionLoss | VOPDLoss) and self.rollout.alpha == 1.0:
            raise ValueError(
                f"rollout.alpha=1 with loss.type={self.loss.type}: the weight q/m is unbounded when the teacher draws "
                "every token; use alpha below 1, or loss.type=forward_kl"
            )
        if isinstance(self.loss, ForwardKLSampledLoss) and self.rollout.alpha == 0.0:
            raise ValueError(
                "rollout.alpha=0 with loss.type=forward_kl_sampled: the weight p/m is unbounded when the student draws every "
                "token; use alpha above 0, or loss.type=forward_kl"
            )
        if self.rollout.teacher_signal == "hidden" and not isinstance(self.loss, DIVERGENCE_LOSSES):
            raise ValueError(
                f"rollout.teacher_signal=hidden with loss.type={self.loss.type}: exact rows are made for the divergences "
                f"({', '.join(sorted(_type_of(loss) for loss in DIVERGENCE_LOSSES))}); choose one of them, or "
                "rollout.teacher_signal=support"
            )
        if isinstance(self.loss, SequenceLoss) and self.rollout.alpha < 1.0:
            raise ValueError(
                f"rollout.alpha={self.rollout.alpha:g} with loss.type=sequence: cross entropy of what the student drew teaches "
                "nothing; set rollout.alpha=1, so that the teacher writes"
            )
        if isinstance(self.loss, ULDLoss) and (
            self.rollout.sampler != "student" or len(self.teachers) > 1 or not self.served_teachers
        ):
            raise ValueError(
                "loss.type=uld: a teacher with another tokenizer cannot sample beside the student, nor share a target with "
                "others; set rollout.sampler=student, and keep one teacher of type vllm"
            )
        if isinstance(self.loss, ULDLoss) and self.training.pretraining is not None and self.training.pretraining.teacher_share:
            raise ValueError("training.pretraining.teacher_share with loss.type=uld: the text is in other ids; set it to 0")
        if "rollout" in self.teachers:
            raise ValueError("teachers.rollout: that is the name of the rollout pool; give the teacher another name")
        if self.training.batch_size % self.rollout.samples_per_prompt:
            raise ValueError(
                f"training.batch_size={self.training.batch_size} is not a multiple of "
                f"rollout.samples_per_prompt={self.rollout.samples_per_prompt}"
            )
        return self

    def _check_teachers(self) -> None:
        names, sharing = ", ".join(self.teachers), self.rollout.teachers
        text = self.training.pretraining
        if text is not None and text.teacher_share and not self.served_teachers:
            raise ValueError(
                f"training.pretraining.teacher_share={text.teacher_share:g}: the text is scored by a teacher of type vllm, and "
                "there is none; set it to 0"
            )
        if sharing is None:
            if len(self.teachers) > 1:
                raise ValueError(
                    f"teachers names {names}: say who teaches what: set rollout.teachers.type to route or ensemble"
                )
            return
        unknown = sorted(sharing.names() - set(self.teachers))
        if unknown:
            raise ValueError(f"rollout.teachers names {', '.join(unknown)}, but the teachers are {names}")
        if isinstance(sharing, EnsembleSettings) and sharing.support == "sampler" and self.rollout.sampler == "student":
            raise ValueError(
                "rollout.teachers.support=sampler with rollout.sampler=student: no teacher samples, so none has a support to "
                "share; use rollout.teachers.support=union"
            )
        if self.rollout.teacher_signal == "hidden" and len(self.teachers) > 1:
            raise ValueError(
                f"rollout.teacher_signal=hidden with teachers {names}: the ranks hold one output head; use "
                "rollout.teacher_signal=support"
            )
        if text is not None and text.teacher_share and len(self.teachers) > 1:
            raise ValueError(
                f"training.pretraining.teacher_share={text.teacher_share:g} with teachers {names}: nothing says which of them "
                "scores the text; set it to 0"
            )

    @property
    def served_teachers(self) -> dict[str, TeacherSettings]:
        """Teachers that replicas on the cluster serve."""
        return {name: teacher for name, teacher in self.teachers.items() if isinstance(teacher, TeacherSettings)}

    @property
    def other_teachers(self) -> dict[str, OtherTeacherSettings]:
        """Teachers that are no pool of replicas."""
        return {name: teacher for name, teacher in self.teachers.items() if not isinstance(teacher, TeacherSettings)}

    @property
    def has_rollout_pool(self) -> bool:
        """Whether student-only replicas run: they sample, or measure a student whose teacher cannot hold it."""
        return self.rollout.sampler == "student" or bool(self.other_teachers)

    @property
    def run_folder(self) -> Path:
        return self.run.output / self.run.name

    @property
    def max_model_len(self) -> int:
        """Longest sequence that an engine must hold, in tokens."""
        text = self.training.pretraining
        window = text.window_tokens if text is not None and text.teacher_share else 0
        return max(self.data.max_prompt_tokens + self.rollout.max_new_tokens, window)

    def dump(self) -> str:
        """The resolved config as YAML: every setting, defaults included; `load_config` reads it back to an equal config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


# ------------------------------------------------------------------------------------------------ load, override


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML recipe and apply `a.b=value` overrides (values are YAML).

    Raises: ConfigError with file, setting, value and remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as `run:` and `student:`, found {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree, source=str(path))


def parse_config(tree: dict[str, Any], source: str = "config") -> Config:
    """Validate a tree of plain values. Raises: ConfigError listing every problem, one a line."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise ConfigError(f"{source}: " + ("\n  " if len(lines) > 1 else "") + "\n  ".join(lines)) from error


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write it as section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error
    node: Any = tree
    *parents, leaf = key.split(".")
    for depth, part in enumerate(parents):
        if part in node and not isinstance(node[part], dict) and node[part] is not None:
            raise ConfigError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
    node[leaf] = value


def _explain(item: Any) -> str:
    """One pydantic error as setting, value and remedy."""
    location = _written_keys(item["loc"], keep_last=item["type"] == "extra_forbidden")
    setting = ".".join(location)
    kind = item["type"]
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], _keys_at(tuple(location[:-1])), n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"valid keys: {', '.join(sorted(_keys_at(tuple(location[:-1]))))}"
        return f"{setting}: unknown key; {hint}"
    if kind == "missing":
        return f"{setting}: required, but not set"
    if kind == "value_error":
        message = str(item["ctx"]["error"])
        return message if not setting or message.startswith(setting) else f"{setting}: {message}"
    message = item["msg"][0].lower() + item["msg"][1:]
    if kind.startswith("union_tag") or isinstance(item.get("input"), dict):
        return f"{setting}: {message}"
    return f"{setting}={item.get('input')!r}: {message}"


def _written_keys(location: tuple[int | str, ...], keep_last: bool) -> list[str]:
    """The keys that the user wrote, out of a location of pydantic's, which names the members of unions too.

    Args: keep_last: whether the last part is a key that no model knows.
    """
    models: list[type[BaseModel]] = [Config]
    keys = []
    for depth, part in enumerate(location):
        known = [model for model in models if part in model.model_fields or model is TeachersMap]
        if known:
            models = _models_below(known, str(part))
        elif not isinstance(part, int) and not (keep_last and depth == len(location) - 1):
            continue
        keys.append(str(part))
    return keys


def _keys_at(location: tuple[str, ...]) -> list[str]:
    """Names of the settings that the section at `location` knows; over all members where the section is a union."""
    models: list[type[BaseModel]] = [Config]
    for part in location:
        models = _models_below(models, part)
    return sorted({name for model in models for name in model.model_fields if model is not TeachersMap})


def _models_below(models: list[type[BaseModel]], key: str) -> list[type[BaseModel]]:
    following: list[type[BaseModel]] = []
    for model in models:
        if model is TeachersMap:
            following += _models_in(TeacherSource)
        elif key in model.model_fields:
            following += _models_in(model.model_fields[key].annotation)
    return following


class TeachersMap(BaseModel):
    """Stands for the map of teachers in `_keys_at`: any name leads to the kinds of teacher."""


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    arguments = getattr(annotation, "__args__", ())
    if getattr(annotation, "__origin__", None) is dict:
        return [TeachersMap]
    return [model for argument in arguments for model in _models_in(argument)]
