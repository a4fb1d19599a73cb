"""Teachers: a settings class for each kind, with the facts that the rest of the program needs about it; and vLLM replicas.

A teacher kind from another distribution is a subclass of `TeacherSettings`, registered under its `type` in the entry-point
group `kdray.teachers`; see docs/extending.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import Formatter
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, SerializeAsAny, model_validator

from kdray.config import vllm_build
from kdray.config.base import Fraction, LocalPath, NonNegative, NonNegativeFloat, OnResume, Positive, PositiveFloat, Settings
from kdray.config.engine_args import check_engine_args
from kdray.config.labels import ACCELERATOR_LABEL, LabelSelector
from kdray.config.models import ModelSource
from kdray.config.registry import SettingsRegistry
from kdray.config.secret_files import VariableName, check_sent

WAITING_WINDOW_S = 30.0
"""Window over which a pool's waiting and busy time are summed. A trainer that waits briefly in every step is starved as much as
one that waits long once; the sum over a window treats both alike, whatever the length of a step."""


class AutoscalingSettings(Settings):
    """Autoscaling of a pool: it grows while the trainer waits for it, and shrinks when it is underused."""

    min_replicas: NonNegative = 1
    """Minimum number of replicas. At 0, an idle pool uses no resources, and its next request waits for a replica to start."""
    max_replicas: Positive
    """Maximum number of replicas. While the cluster cannot place one, the pool waits and requests no more."""
    initial_replicas: Positive | None = None
    """Number of replicas at the start of a run; None takes `min_replicas`, or 1 if that is 0."""
    upscale_wait_s: PositiveFloat = 5.0
    """The pool grows if the trainer waited for it longer than this in the last 30 seconds; below half of it, the pool may
    shrink."""
    upscale_queue_age_s: PositiveFloat = 300.0
    """The pool also grows if any request has waited this long for a free slot in an engine."""
    upscale_delay_s: NonNegativeFloat = 30.0
    """Seconds that such a condition must hold before the pool grows, restarted once the last new replica serves. Below 30,
    waits from before that replica cause further growth."""
    upscale_factor: Annotated[float, Field(ge=1.0)] = 1.5
    """Growth factor of one step; at least one replica is added."""
    upscale_ongoing: NonNegativeFloat = 2.0
    """Unanswered rollouts per replica below which the pool does not grow: a new replica cannot take over the last ones of a
    batch."""
    downscale_idle_s: PositiveFloat = 300.0
    """Seconds without any work after which the pool drops to `min_replicas`. Choose it longer than the trainer's step, or every
    step restarts the pool."""
    downscale_busy: Fraction = 0.7
    """A replica is removed if the others would then be busy for at most this share of the time."""
    downscale_delay_s: NonNegativeFloat = 300.0
    """Seconds that this condition must hold."""
    drain_s: PositiveFloat = 120.0
    """Time that a replica to be removed has to finish its requests; the rest is resampled on other replicas."""
    placement_timeout_s: PositiveFloat = 600.0
    """Time after which a replica that is not yet serving is reported as an event; longer than its model takes to load."""
    report_every_s: PositiveFloat = 5.0
    """Seconds between a replica's reports to Ray Serve's controller, which decides on them."""

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
        # Serve keeps the requests of the last five reports, and would restart an emptied pool for them.
        if self.min_replicas == 0 and self.downscale_idle_s < 5 * self.report_every_s:
            raise ValueError(
                f"autoscaling.downscale_idle_s={self.downscale_idle_s:g} with min_replicas=0: a pool may be emptied after five "
                f"reports without work at the earliest; raise it to {5 * self.report_every_s:g}, or lower report_every_s"
            )
        return self

    @property
    def starting_replicas(self) -> int:
        """Number of replicas at the start of a run."""
        return max(1, self.min_replicas) if self.initial_replicas is None else self.initial_replicas


def _gpus_needed(engine: dict[str, Any]) -> float:
    """GPUs that a replica cannot do without: a build of vLLM for GPUs takes one for each part, or the first that it sees."""
    return float(engine.get("tensor_parallel_size", 1)) if vllm_build.vllm_device() == "gpu" else 0.0


class EngineSettings(Settings):
    """A vLLM replica: its size, placement and limits."""

    replicas: Positive = 1
    """Number of replicas, each with its own engine. Ignored if `autoscaling` is set."""
    autoscaling: AutoscalingSettings | None = None
    """Adapt the number of replicas to the load; None keeps `replicas`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the engine's weights and activations. `auto` is the checkpoint's own on GPUs, float32 included; on CPUs it is
    float32, whatever the checkpoint has."""
    tensor_parallel_size: Positive = 1
    """GPUs that share one replica's layers."""
    num_cpus: NonNegativeFloat = 1.0
    """CPUs that Ray reserves for a replica; also its number of compute threads on CPUs."""
    num_gpus: NonNegativeFloat = Field(default_factory=_gpus_needed)
    """GPUs that Ray reserves for a replica: `tensor_parallel_size`, or a share of one; 0 on CPUs. The default is what the
    installed build of vLLM needs: `tensor_parallel_size` for one that computes on GPUs, otherwise 0."""
    accelerator_type: str | None = None
    """Ray accelerator type to place replicas on, such as `H100`."""
    accelerator_types: list[str] | None = None
    """Accelerator types that a replica may be placed on, whichever is free; with more than one, calls go to the replica that is
    expected to answer soonest, by measured tokens/s. Use instead of `accelerator_type`."""
    resources: dict[str, float] = Field(default={})
    """Custom Ray resources that a replica requires, for placement."""
    labels: LabelSelector = Field(default={})
    """Labels that a replica's node must have: `value`, `!value`, `in(a, b)` or `!in(a, b)` by label."""
    max_replicas_per_node: Annotated[int, Field(ge=1, le=100)] | None = None
    """Maximum number of replicas per node: 1 spreads them. None leaves it to Ray Serve, which packs nodes by free resources."""
    max_num_seqs: Positive = 128
    """Maximum number of sequences that a replica decodes concurrently."""
    max_num_batched_tokens: Positive = 4096
    """Maximum number of tokens per engine step; longer prefills are chunked."""
    kv_cache_gib: PositiveFloat = 1.0
    """Size of a replica's KV cache on CPUs, GiB."""
    gpu_memory_utilization: Fraction = 0.85
    """Share of GPU memory that the engine may use; leave room for the rows of log-probabilities."""
    model_runner: Literal["v1", "v2"] = "v1"
    """Model runner of vLLM. `v2` is its newer one, experimental and for GPUs alone; it has not been run. Change it when vLLM
    drops the first, or a model needs the newer one."""
    engine_args: dict[str, Any] = Field(default={})
    """Further vLLM engine arguments, passed through by name: those of an allow list, which name no code and leave the records
    right."""
    unsafe_engine_args: dict[str, Any] = Field(default={})
    """vLLM engine arguments outside that list. They may run code that the config names and make the records wrong; a run that
    has any says so at its start. Those that kdray sets itself are rejected."""

    @property
    def label_selector(self) -> dict[str, str]:
        """Ray label selector of a replica: the labels, and the accelerator types that it may be placed on."""
        kinds = self.accelerator_types
        return {**self.labels, **({ACCELERATOR_LABEL: f"in({','.join(kinds)})"} if kinds else {})}

    @property
    def mixed_hardware(self) -> bool:
        """True if replicas may differ in speed."""
        return self.accelerator_types is not None and len(self.accelerator_types) > 1

    @model_validator(mode="after")
    def _engine_rules(self) -> EngineSettings:
        check_engine_args(self.engine_args, self.unsafe_engine_args)
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
    """A teacher. The class variables and properties are facts: where it runs, and how its weights change."""

    type: str
    """Name of the kind; a subclass narrows it to a `Literal` of its own."""

    implementation: ClassVar[str]
    """`module:name` of its `kdray.teachers.kind.TeacherKind`, which checks, opens and identifies teachers of this kind."""
    served: ClassVar[bool] = False
    """Served by vLLM replicas on the cluster; its settings include those of an engine. Otherwise it runs in, or is called from,
    the run's own process."""
    white_box: ClassVar[bool] = False
    """The ranks can load its weights, which stay fixed during the run."""
    follows_student: ClassVar[bool] = False
    """Its weights are an earlier version of the student's."""
    learns: ClassVar[bool] = False
    """It is another student, trained in the same run."""
    replays: ClassVar[bool] = False
    """It replays recorded answers, and cannot answer new requests."""
    remote: ClassVar[bool] = False
    """It runs elsewhere: its `model` is a name there, and no part of it is loaded here."""
    pauses: ClassVar[bool] = False
    """Its draws end at the `stop_ids` of a request, so that an environment can answer them."""

    @property
    def renewal(self) -> tuple[int, float] | None:
        """Steps between updates from the student's weights, and the share of its weights that an update keeps; or None."""
        return None

    @property
    def key_in_clear(self) -> bool:
        """Whether its settings accept that others read its key on the way (`unsafe_http`)."""
        return False

    @property
    def silence(self) -> tuple[str, float, int] | None:
        """Setting of the longest silence in an attempt at a request, that time in seconds, and the number of attempts; or None
        if the kind has no such setting."""
        return None


class ServedTeacherSettings(TeacherSettings, EngineSettings):
    """A teacher served by vLLM replicas on the cluster."""

    implementation = "kdray.teachers.served:ServedKind"
    served = True
    pauses = True

    prompt_template: str | None = None
    """Template of the teacher's prompt: `{prompt}` is replaced by the student's prompt, `{answer}` by its reference answer.
    Gives the teacher privileged information, such as the same model with the answer in its prompt. Student-only replicas then
    sample."""
    holds_student: bool = True
    """True if replicas also hold the student, to sample from the mixture and for exact KLs. False for a teacher that only
    scores what student-only replicas sample: it loads no student, and takes no weights."""
    scoring: Literal["recorder", "prompt_logprobs"] = "recorder"
    """Method of scoring given sequences by prefill. `recorder`: at any ids, with hidden states and both exact KLs.
    `prompt_logprobs`: vLLM's own, only the teacher's top ids, or under `model_runner: v2` at any ids; for an engine whose
    prefill the recorder cannot read."""

    @model_validator(mode="after")
    def _template(self) -> ServedTeacherSettings:
        if self.prompt_template is not None:
            check_template("prompt_template", self.prompt_template, required=("prompt",), allowed=("prompt", "answer"))
        return self


def check_template(setting: str, template: str, required: Sequence[str], allowed: Sequence[str]) -> None:
    """Raises: ValueError if a template cannot be filled in, lacks a required field, or has an unknown one."""
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
    """A teacher with its own weights."""

    white_box = True

    type: Literal["vllm"] = "vllm"
    model: ModelSource
    """Hugging Face id, local folder, or a tiny model to build (`type: tiny`)."""
    revision: Annotated[str | None, OnResume()] = None
    """Commit or tag on the hub. A resume may set it to the commit that its checkpoint recorded."""


@TEACHERS.add("self")
class SelfTeacherSettings(ServedTeacherSettings):
    """An earlier state of the student itself: a snapshot, or an exponential moving average of its versions.
    Self-distillation."""

    implementation = "kdray.teachers.served:SelfKind"
    follows_student = True

    type: Literal["self"]
    every: Positive | None = None
    """Steps between updates of the teacher; None keeps the student as of the start of distillation."""
    decay: Annotated[Fraction, Field(lt=1.0)] = 0.0
    """Share of the teacher's weights that an update keeps: 0 copies the student; larger values average over its versions."""

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
    """Another student, trained in the same run: each learns from the other (mutual distillation). It uses the run's settings,
    and has its own run folder below `peers/`."""

    implementation = "kdray.teachers.served:PeerKind"
    learns = True

    type: Literal["peer"]
    model: ModelSource
    """Hugging Face id, local folder, or a tiny model to build (`type: tiny`)."""
    revision: Annotated[str | None, OnResume()] = None
    """Commit or tag on the hub. A resume may set it to the commit that its checkpoint recorded."""


@TEACHERS.add("openai")
class OpenAITeacherSettings(TeacherSettings):
    """A remote endpoint with an OpenAI-compatible API, which writes whole responses; no part of it runs on the cluster."""

    implementation = "kdray.teachers.openai:OpenAIKind"
    remote = True

    type: Literal["openai"]
    base_url: str
    """Base URL of the API, usually ending in `/v1`."""
    model: str = Field(min_length=1)
    """Name of the model at the endpoint."""
    api_key_env: VariableName | None = "OPENAI_API_KEY"
    """Environment variable with the API key; the key itself is written to no file. Its name says that it is one (KEY, TOKEN,
    SECRET), and is not that of another service's. None for an endpoint without keys."""
    unsafe_http: bool = False
    """Send the key by plain http to another machine, where others may read it on the way."""
    chat: bool = True
    """Use chat completions: the prompt is sent as a user message, and the endpoint applies its own template. False uses plain
    completions, which continue the text as given."""
    system_prompt: str | None = None
    """System message before every prompt; only with `chat`."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature at the endpoint; 0 is greedy, 1 samples from the teacher's own distribution."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus probability at the endpoint."""
    thinking: bool = False
    """Put the endpoint's thoughts, where it sends them apart from the answer, before it, between `<think>` and `</think>`; only
    with `chat`. False drops them."""
    logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    """Number of top logprobs that the endpoint returns per token: a support for the losses that need one. 0 requests text
    only."""
    token_ids: bool = False
    """The endpoint accepts and returns token ids, as vLLM's server does, and its tokenizer is the student's. Prompts and
    responses are then sent as ids, and nothing is tokenized twice. Checked against the student's tokenizer at start."""
    max_concurrency: Positive = 8
    """Maximum number of concurrent requests."""
    requests_per_minute: PositiveFloat | None = None
    """Maximum number of requests started per minute, evenly spaced, retries included; None sets no limit."""
    timeout_s: PositiveFloat = 120.0
    """Longest time without data from the endpoint before a request is retried."""
    retries: NonNegative = 5
    """Maximum number of retries of a request after a timeout, a lost connection, a rate limit (429) or a server error (5xx); a
    delay that the endpoint asks for is respected, up to two minutes."""

    @property
    def silence(self) -> tuple[str, float, int]:
        return "timeout_s", self.timeout_s, self.retries + 1

    @property
    def key_in_clear(self) -> bool:
        return self.unsafe_http

    @model_validator(mode="after")
    def _together(self) -> OpenAITeacherSettings:
        try:
            url = urlsplit(self.base_url)
        except ValueError as error:
            raise ValueError(f"base_url: not an address: {error}") from error
        # Neither message quotes the address: the invalid part may be a key inside it.
        if url.username is not None or url.password is not None or url.query or url.fragment:
            raise ValueError("base_url: holds more than an address; give a key by `api_key_env`")
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError("base_url: not an address; write it as https://host/v1")
        if self.api_key_env is not None:
            check_sent(self.api_key_env, url.hostname)
        if self.token_ids and self.chat:
            raise ValueError("token_ids=true with chat=true: chat completions take no ids; set chat=false or token_ids=false")
        if self.logprobs and not self.token_ids:
            raise ValueError(
                f"logprobs={self.logprobs} with token_ids=false: logprobs of tokens named by text cannot be told apart; set "
                "token_ids=true where the endpoint names ids (vLLM's server), or logprobs=0"
            )
        if self.system_prompt is not None and not self.chat:
            raise ValueError("system_prompt with chat=false: plain completions have no messages; set chat=true or remove it")
        if self.thinking and not self.chat:
            raise ValueError("thinking=true with chat=false: plain completions are one text; set chat=true or thinking=false")
        return self


@TEACHERS.add("hf")
class HFTeacherSettings(TeacherSettings):
    """A small Hugging Face model in the run's own process, in float32 on the CPU: for tests and tiny teachers."""

    implementation = "kdray.teachers.huggingface:HFKind"
    white_box = True
    pauses = True

    type: Literal["hf"]
    model: ModelSource
    """Hugging Face id, local folder, or a tiny model to build (`type: tiny`)."""
    revision: Annotated[str | None, OnResume()] = None
    """Commit or tag on the hub. A resume may set it to the commit that its checkpoint recorded."""
    batch_size: Positive = 16
    """Sequences per forward pass, which holds a row of logits for each of their tokens."""


@TEACHERS.add("capture")
class CaptureTeacherSettings(TeacherSettings):
    """Recorded answers of a teacher, replayed: no model is called, and new responses cannot be scored."""

    implementation = "kdray.capturing.teacher:CaptureKind"
    replays = True

    type: Literal["capture"]
    path: LocalPath
    """Folder of a capture, or a Parquet file of rollouts. A relative path counts from the directory in which the command was
    started; what is not there is looked for beside the recipe."""
    model: ModelSource | None = None
    """The teacher that must have given the answers: Hugging Face id, local folder, tiny model, or the name at an endpoint. A
    capture of a different teacher is rejected; None accepts any. `rollout.teacher_signal=hidden` loads the output head from
    it."""
    revision: str | None = None
    """Commit or tag of `model` on the hub."""

    @model_validator(mode="after")
    def _of_a_model(self) -> CaptureTeacherSettings:
        if self.revision is not None and self.model is None:
            raise ValueError(f"revision={self.revision} without `model`: of which model? set model, or remove revision")
        return self


TeacherSource = Annotated[SerializeAsAny[TeacherSettings], TEACHERS.member()]
"""A teacher of any kind; its other keys depend on `type`."""
