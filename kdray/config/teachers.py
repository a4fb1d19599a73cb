"""Teachers: a class of settings for each kind, with the facts that the rest of the program asks of it; and vLLM replicas.

A teacher kind of another distribution is a subclass of `TeacherSettings`, registered under its `type` in the entry-point group
`kdray.teachers`; see docs/extending.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, SerializeAsAny, model_validator

from kdray.config.base import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Settings
from kdray.config.labels import ACCELERATOR_LABEL, LabelSelector
from kdray.config.models import ModelSource
from kdray.config.registry import SettingsRegistry

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
    "code_revision": "kdray runs no code from model folders",
    "load_format": "kdray loads safetensors alone",
    "model_weights": "use the teacher's `model`",
    "hf_config_path": "use the teacher's `model`",
    "hf_token": "a key stands in no file; set HF_TOKEN in the environment",
    **dict.fromkeys(
        (
            "worker_cls",
            "scheduler_cls",
            "model_class_overrides",
            "io_processor_plugin",
            "reasoning_parser_plugin",
            "kv_transfer_config",
            "ec_transfer_config",
        ),
        "it names code, and a config runs none",
    ),
    "speculative_config": "vLLM does not speculate beside a logits processor that draws; remove it",
}


WAITING_WINDOW_S = 30.0
"""Time over which a pool's waiting and work are summed. A trainer that waits a little in every step starves as one does that
waits long once; the sum over a window sees both alike, whatever the length of a step."""


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
        if self.upscale_wait_s >= WAITING_WINDOW_S:
            raise ValueError(
                f"autoscaling.upscale_wait_s={self.upscale_wait_s:g}: waiting is counted over the last "
                f"{WAITING_WINDOW_S:g} seconds, "
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
    resources: dict[str, float] = Field(default={})
    """Custom Ray resources that a replica takes, for placement."""
    labels: LabelSelector = Field(default={})
    """Labels that a node must have for a replica to be placed on it: `value`, `!value`, `in(a, b)` or `!in(a, b)` by label."""
    max_replicas_per_node: Annotated[int, Field(ge=1, le=100)] | None = None
    """Most replicas on one node: 1 spreads them. None leaves it to Ray Serve, which fills nodes by what is free."""
    max_num_seqs: Positive = 128
    """Sequences that a replica decodes at once."""
    max_num_batched_tokens: Positive = 4096
    """Tokens in one engine step; longer prefills are cut into chunks."""
    kv_cache_gib: PositiveFloat = 1.0
    """KV cache of a replica on CPUs, GiB."""
    gpu_memory_utilization: Fraction = 0.85
    """Share of GPU memory that the engine may take; leave room for the log-probability rows."""
    engine_args: dict[str, Any] = Field(default={})
    """Further vLLM engine arguments, passed through by name; those that kdray sets itself are refused."""

    @property
    def label_selector(self) -> dict[str, str]:
        """Ray's, of a replica: the labels, and the accelerator types that it may be placed on."""
        kinds = self.accelerator_types
        return {**self.labels, **({ACCELERATOR_LABEL: f"in({','.join(kinds)})"} if kinds else {})}

    @property
    def mixed_hardware(self) -> bool:
        """Whether replicas may differ in speed."""
        return self.accelerator_types is not None and len(self.accelerator_types) > 1

    @model_validator(mode="after")
    def _engine_rules(self) -> EngineSettings:
        for name in self.engine_args:
            if name in _ENGINE_ARGS_TAKEN:
                raise ValueError(f"engine_args.{name}: not free to set; {_ENGINE_ARGS_TAKEN[name]}")
        if "." in str(self.engine_args.get("distributed_executor_backend", "")):
            raise ValueError(
                "engine_args.distributed_executor_backend: it names code, and a config runs none; use mp, ray or uni"
            )
        if self.accelerator_types is not None:
            if self.accelerator_type is not None:
                raise ValueError(
                    f"accelerator_type={self.accelerator_type} with accelerator_types={self.accelerator_types}: one says where "
                    "a replica must be placed, the other where it may be; keep one of them"
                )
            if not self.accelerator_types or len(set(self.accelerator_types)) != len(self.accelerator_types):
                raise ValueError(f"accelerator_types={self.accelerator_types}: name at least one type, and each once")
        if self.accelerator_types is not None and ACCELERATOR_LABEL in self.labels:
            raise ValueError("labels.ray.io/accelerator-type beside accelerator_types: both name it; keep one")
        if self.tensor_parallel_size > 1 and self.num_gpus not in (0.0, float(self.tensor_parallel_size)):
            raise ValueError(
                f"num_gpus={self.num_gpus:g} with tensor_parallel_size={self.tensor_parallel_size}: a replica takes one GPU "
                f"for each part; set num_gpus={self.tensor_parallel_size}"
            )
        return self


TEACHERS: SettingsRegistry[TeacherSettings] = SettingsRegistry("kdray.teachers", "teacher", default="vllm")


@TEACHERS.root
class TeacherSettings(Settings):
    """A teacher. The class variables and properties are facts: where it runs, and what becomes of its weights."""

    type: str
    """Name of the kind; a subclass narrows it to `Literal` of its own."""

    implementation: ClassVar[str]
    """`module:name` of its `kdray.teachers.kind.TeacherKind`: how a teacher of this kind is checked, opened and identified."""
    served: ClassVar[bool] = False
    """Replicas of a vLLM engine on the cluster serve it; its settings are those of an engine too. Otherwise it answers inside
    the run's own process, or from there."""
    white_box: ClassVar[bool] = False
    """The ranks can load its weights, which stay as they are during the run."""
    follows_student: ClassVar[bool] = False
    """Its weights are the student's, as they were earlier."""
    learns: ClassVar[bool] = False
    """It is another student, trained in the same run."""
    replays: ClassVar[bool] = False
    """It gives answers that were recorded, and cannot be asked anything new."""
    remote: ClassVar[bool] = False
    """It answers from elsewhere: its `model` is a name there, and nothing of it is loaded here."""

    @property
    def renewal(self) -> tuple[int, float] | None:
        """Steps between its renewals by the student's weights, and the share of its own that one keeps; None without any."""
        return None


class ServedTeacherSettings(TeacherSettings, EngineSettings):
    """A teacher served by vLLM replicas on the cluster."""

    implementation = "kdray.teachers.served:ServedKind"
    served = True

    prompt_template: str | None = None
    """What the teacher reads in place of a prompt: `{prompt}` stands for it, `{answer}` for its reference answer. Lets the
    teacher know more than the student, such as the same model with the answer in front. Student-only replicas then sample."""
    scoring: Literal["recorder", "prompt_logprobs"] = "recorder"
    """How given sequences are scored by prefill. `recorder`: at any ids, with hidden states and both exact KLs.
    `prompt_logprobs`: vLLM's own, the teacher's top ids alone; for an engine whose prefill the recorder cannot read."""

    @model_validator(mode="after")
    def _template(self) -> ServedTeacherSettings:
        if self.prompt_template is not None:
            check_template("prompt_template", self.prompt_template, required=("prompt",), allowed=("prompt", "answer"))
        return self


def check_template(setting: str, template: str, required: Sequence[str], allowed: Sequence[str]) -> None:
    """Raises: ValueError where a template cannot be filled in, lacks a field, or has one that nobody knows."""
    try:
        found = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"{setting}: cannot be filled in: {error}; write {{{{ and }}}} for braces of its own") from error
    for name in sorted(found - set(allowed)):
        raise ValueError(f"{setting}: {{{name}}} stands for nothing; use {', '.join(f'{{{one}}}' for one in allowed)}")
    for name in required:
        if name not in found:
            raise ValueError(f"{setting}: lacks {{{name}}}")


@TEACHERS.add("vllm")
class VLLMTeacherSettings(ServedTeacherSettings):
    """A teacher with weights of its own."""

    white_box = True

    type: Literal["vllm"] = "vllm"
    model: ModelSource
    """Hugging Face id, local folder, or a tiny model to build (`type: tiny`)."""
    revision: str | None = None
    """Commit or tag on the hub."""


@TEACHERS.add("self")
class SelfTeacherSettings(ServedTeacherSettings):
    """The student itself as it was earlier: a snapshot, or an exponential average of its versions. Self-distillation."""

    implementation = "kdray.teachers.served:SelfKind"
    follows_student = True

    type: Literal["self"]
    every: Positive | None = None
    """Steps between renewals; None keeps the student that distillation began with."""
    decay: Annotated[Fraction, Field(lt=1.0)] = 0.0
    """Share of the teacher's weights that a renewal keeps: 0 copies the student, more averages over its versions."""

    @model_validator(mode="after")
    def _renewed(self) -> SelfTeacherSettings:
        if self.decay and self.every is None:
            raise ValueError(f"decay={self.decay:g} without `every`: nothing is ever renewed; set every, or remove decay")
        return self

    @property
    def renewal(self) -> tuple[int, float] | None:
        return None if self.every is None else (self.every, self.decay)


@TEACHERS.add("peer")
class PeerTeacherSettings(ServedTeacherSettings):
    """Another student, which learns from this one while this one learns from it: mutual distillation. It is trained with the
    run's own settings, in a run folder of its own below `peers/`."""

    implementation = "kdray.teachers.served:PeerKind"
    learns = True

    type: Literal["peer"]
    model: ModelSource
    """Hugging Face id, local folder, or a tiny model to build (`type: tiny`)."""
    revision: str | None = None
    """Commit or tag on the hub."""


@TEACHERS.add("openai")
class OpenAITeacherSettings(TeacherSettings):
    """A remote endpoint with OpenAI's interface, which writes whole responses; nothing of it runs on the cluster."""

    implementation = "kdray.teachers.openai:OpenAIKind"
    remote = True

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


@TEACHERS.add("hf")
class HFTeacherSettings(TeacherSettings):
    """A small Hugging Face model inside the run's own process, in float32 on the CPU: for tests and tiny teachers."""

    implementation = "kdray.teachers.huggingface:HFKind"
    white_box = True

    type: Literal["hf"]
    model: ModelSource
    """Hugging Face id, local folder, or a tiny model to build (`type: tiny`)."""
    revision: str | None = None
    """Commit or tag on the hub."""
    batch_size: Positive = 16
    """Sequences of one forward pass, which holds a row of logits for each of their tokens."""


@TEACHERS.add("capture")
class CaptureTeacherSettings(TeacherSettings):
    """Answers of a teacher that were recorded earlier: nobody is asked, and nothing else can be scored."""

    implementation = "kdray.capturing.teacher:CaptureKind"
    replays = True

    type: Literal["capture"]
    path: Path
    """Folder of a capture, or one Parquet file of rollouts. A relative path counts from the folder the command was started
    in."""
    model: ModelSource | None = None
    """The teacher that must have answered: Hugging Face id, local folder, tiny model, or the name at an endpoint. A capture by
    another is refused; None takes any. `rollout.teacher_signal=hidden` takes the output head from it."""
    revision: str | None = None
    """Commit or tag of `model` on the hub."""

    @model_validator(mode="after")
    def _of_a_model(self) -> CaptureTeacherSettings:
        if self.revision is not None and self.model is None:
            raise ValueError(f"revision={self.revision} without `model`: of which model? set model, or remove revision")
        return self


TeacherSource = Annotated[SerializeAsAny[TeacherSettings], TEACHERS.member()]
"""A teacher of any kind; its other keys depend on `type`."""
