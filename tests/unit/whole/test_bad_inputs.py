"""Every wrong input ends with exit code 2 and a message that names the setting or file, what it holds, and what to do.

A table: configs, data, models and tokenizers, captures, checkpoints, environment, answers of an endpoint, and the other
commands' arguments. What needs Ray to be asked is asked of the function behind the command; the exit code is the command's own.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
import yaml
from typer.testing import CliRunner

from cluster.cli import app
from cluster.cli_base import exit_codes
from kdray.capturing.format import write_capture
from kdray.config import OpenAITeacherSettings, TinyModel, load_config
from kdray.models.resolve import build_tiny_model, task_tokenizer
from kdray.models.vocab import tokenizer_hash
from kdray.runs.checkpoints import commit
from kdray.runs.folder import RunFolder
from kdray.runs.storage import Storage
from kdray.teachers.openai import RemoteTeacher
from kdray.types import Rollout
from tests.unit.kdray.teachers.test_openai import serving, written


@dataclass
class Place:
    """A folder with a sound recipe in it, and ways to spoil it."""

    root: Path
    models: Path
    tree: dict[str, Any] = field(default_factory=dict)

    def set(self, **sections: Any) -> Place:
        """Merge into the recipe's sections."""
        for name, value in sections.items():
            self.tree[name] = self.tree.get(name, {}) | value if isinstance(value, dict) else value
        return self

    def validate(self, *overrides: str) -> list[str]:
        return ["validate", str(self.recipe()), *overrides]

    def recipe(self) -> Path:
        path = self.root / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.tree))
        return path

    def text(self, content: str | bytes) -> list[str]:
        """A recipe that is this text."""
        path = self.root / "recipe.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return ["validate", str(path)]

    def data(self, content: str | bytes, **prompts: Any) -> list[str]:
        """Prompts from a JSONL file with this content."""
        path = self.root / "bad.jsonl"
        path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
        self.tree["data"] |= {"prompts": {"type": "jsonl", "path": str(path)} | prompts}
        return self.validate()

    def parquet(self, content: bytes | pa.Table, **prompts: Any) -> list[str]:
        path = self.root / "bad.parquet"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            pq.write_table(content, path)
        self.tree["data"] |= {"prompts": {"type": "parquet", "path": str(path)} | prompts}
        return self.validate()

    def student(self, spoil: Callable[[Path], Any]) -> list[str]:
        """A copy of the student's folder, spoiled."""
        folder = Path(shutil.copytree(self.models / "student", self.root / "spoiled"))
        spoil(folder)
        return self.set(student={"model": str(folder)}).validate()

    def teacher(self, **teacher: Any) -> list[str]:
        return self.set(teachers={"main": teacher}).validate()

    def capture(
        self, spoil: Callable[[Path], Any] = lambda folder: None, tokenizer: str | None = None, **teacher: Any
    ) -> list[str]:
        """A capture of eight answers as the teacher, spoiled."""
        folder = self.root / "captured"
        ids = np.array([5, 1], np.int32)
        logprobs = np.full(2, -1.0, np.float32)
        rollouts = [
            Rollout(i, i, ids, ids, logprobs, None, np.zeros(2, np.int32), 1.0, "stop", "t", logprobs) for i in range(8)
        ]
        write_capture(folder, rollouts, None, tokenizer or tokenizer_hash(task_tokenizer()), 99)
        spoil(folder)
        self.set(rollout={"alpha": 1.0}, loss={"type": "sequence"})
        return self.teacher(type="capture", path=str(folder), **teacher)

    def started(self) -> RunFolder:
        """The folder of a run that this recipe started."""
        return RunFolder.create(load_config(self.recipe()))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    build_tiny_model(TinyModel(type="tiny", layers=1, width=32, max_positions=64), root / "student")
    build_tiny_model(TinyModel(type="tiny", layers=1, width=32, max_positions=64, vocab_rows=128), root / "teacher")
    lines = [json.dumps({"prompt": f"{index}+1=", "answer": str(index + 1)}) + "\n" for index in range(40)]
    (root / "prompts.jsonl").write_text("".join(lines))
    return root


@pytest.fixture
def place(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    prompts = {"type": "jsonl", "path": str(models / "prompts.jsonl")}
    tree = {
        "run": {"name": "x"},
        "data": {"prompts": prompts, "heldout_size": 8, "max_prompt_tokens": 32},
        "student": {"model": str(models / "student")},
        "teachers": {"main": {"model": str(models / "teacher")}},
        "rollout": {"max_new_tokens": 16},
    }
    return Place(tmp_path, models, tree)


def edit(name: str, **values: Any) -> Callable[[Path], None]:
    """Change keys of a JSON file in a folder."""

    def change(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))

    return change


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

Case = tuple[str, Callable[[Place], list[str]], tuple[str, ...]]

CONFIGS: list[Case] = [
    ("a file that is not there", lambda p: ["validate", "nowhere.yaml"], ("nowhere.yaml", "no such config file")),
    ("a folder", lambda p: ["validate", "."], ("a folder, not a config file",)),
    ("nothing in it", lambda p: p.text(""), ("recipe.yaml", "expected sections")),
    ("a list", lambda p: p.text("- run\n"), ("recipe.yaml", "expected sections", "list")),
    ("a tab", lambda p: p.text("run:\n\tname: x\n"), ("recipe.yaml", "not valid YAML", "line 2")),
    ("an open bracket", lambda p: p.text("run: {name: x\n"), ("recipe.yaml", "not valid YAML")),
    ("bytes that are no text", lambda p: p.text(b"run: \xff\xfe\n"), ("recipe.yaml", "not valid YAML")),
    ("a control character", lambda p: p.text("run: {name: 'a\x01'}\n"), ("recipe.yaml", "not valid YAML")),
    ("code", lambda p: p.text("run: !!python/object/apply:os.system ['true']\n"), ("recipe.yaml", "python/object/apply")),
    ("code in an override", lambda p: p.validate("run.name=!!python/name:os.system"), ("run.name", "python/name")),
    ("aliases of aliases", lambda p: p.text(BOMB), ("recipe.yaml", "values, every alias counted")),
    ("brackets in brackets", lambda p: p.text("run: " + "[" * 5000), ("recipe.yaml", "nested")),
    (
        "a key twice",
        lambda p: p.text("run: {name: x}\ntraining: {steps: 1, steps: 2}\n"),
        ("recipe.yaml", "steps", "twice", "line 2"),
    ),
    ("a section twice", lambda p: p.text("run: {name: x}\nrun: {name: y}\n"), ("recipe.yaml", "run", "twice")),
    ("a key that is a list", lambda p: p.text("? [a]\n: 1\n"), ("recipe.yaml", "not valid YAML")),
    ("a section that is a number", lambda p: p.text("1: 2\n"), ("1=1", "strings")),
    ("no run", lambda p: p.text("student: {model: {type: tiny}}\n"), ("run: required", "teachers: required")),
    (
        "a misspelt key",
        lambda p: p.validate("training.learning_rat=1"),
        ("training.learning_rat", "did you mean `learning_rate`"),
    ),
    ("a misspelt section", lambda p: p.validate("trainings.steps=1"), ("trainings: unknown key", "`training`")),
    ("a text for a number", lambda p: p.validate("training.steps=many"), ("training.steps='many'", "integer")),
    ("a section for a number", lambda p: p.validate("training.steps={a: 1}"), ("training.steps", "integer")),
    ("a number for a section", lambda p: p.validate("rollout=3"), ("rollout", "3", "dictionary")),
    ("below zero", lambda p: p.validate("training.steps=-1"), ("training.steps=-1", "greater than 0")),
    ("above one", lambda p: p.validate("rollout.alpha=1.5"), ("rollout.alpha=1.5", "less than or equal to 1")),
    ("not a number", lambda p: p.validate("training.learning_rate=.nan"), ("training.learning_rate", "finite")),
    ("infinite", lambda p: p.validate("training.learning_rate=.inf"), ("training.learning_rate=inf", "finite")),
    (
        "a huge number",
        lambda p: p.validate("training.batch_size=" + "9" * 5000),
        ("training.batch_size=999", "no whole number"),
    ),
    (
        "a huge number in other digits",
        lambda p: p.validate("training.batch_size=0x" + "f" * 5000),
        (
            "training.batch_size=0xfff",
            "64 bits",
        ),
    ),
    ("a huge text", lambda p: p.validate("training.steps=" + "z" * 100_000), ("training.steps='zzz", "...: ")),
    ("a date that is none", lambda p: p.validate("run.name=2026-13-45"), ("run.name=2026-13-45", "month")),
    ("half a character", lambda p: p.validate('run.name="\\ud800"'), ("run.name=", "half of a character")),
    ("a section that holds itself", lambda p: p.text("run: &a\n  name: *a\n"), ("recipe.yaml", "alias of what it stands in")),
    ("keys below keys", lambda p: p.validate("training." + "a." * 5000 + "a=1"), ("override", "64 deep")),
    (
        "a list of thousands of mistakes",
        lambda p: p.validate("data.prompts={type: task, tasks: [" + "x, " * 3000 + "]}"),
        ("data.prompts.tasks", "2980 more"),
    ),
    (
        "a worker of one's own",
        lambda p: p.validate("teachers.main.engine_args={worker_cls: os.system}"),
        ("engine_args.worker_cls", "names code"),
    ),
    (
        "an executor of one's own",
        lambda p: p.validate("teachers.main.engine_args={distributed_executor_backend: a.B}"),
        ("distributed_executor_backend", "'mp' or 'uni'"),
    ),
    (
        "a configuration of logging, which calls functions by their names",
        lambda p: p.validate("teachers.main.engine_args={log_config_file: logging.json}"),
        ("teachers.main", "engine_args.log_config_file", "not free to set", "unsafe_engine_args"),
    ),
    (
        "a manager of caches of one's own",
        lambda p: p.validate(
            "teachers.main.engine_args={ec_manager_config: {encoder_cache_manager_cls: evil.Module}}",
        ),
        ("teachers.main", "engine_args.ec_manager_config", "names code"),
    ),
    (
        "a compiler of one's own",
        lambda p: p.validate("teachers.main.engine_args={compilation_config: {backend: evil.module}}"),
        ("engine_args.compilation_config.backend", "not free to set"),
    ),
    (
        "a worker of one's own, at one's own risk",
        lambda p: p.validate("teachers.main.unsafe_engine_args={worker_extension_cls: evil.Module}"),
        ("unsafe_engine_args.worker_extension_cls", "the worker extension needs it"),
    ),
    (
        "an engine's argument that vLLM does not have",
        lambda p: p.validate("rollout.pool.engine_args={enforce_eagr: true}"),
        ("rollout.pool", "engine_args.enforce_eagr", "not free to set"),
    ),
    (
        "a compiler of the student",
        lambda p: p.validate("training.deepspeed={compile: {backend: evil.module}}"),
        ("training.backend.options.compile", "not free to set"),
    ),
    (
        "code of a model's folder",
        lambda p: p.validate("teachers.main.engine_args={trust_remote_code: true}"),
        ("engine_args.trust_remote_code", "no code"),
    ),
    (
        "pickled weights",
        lambda p: p.validate("teachers.main.engine_args={load_format: pt}"),
        ("engine_args.load_format", "safetensors alone"),
    ),
    (
        "a key in a config",
        lambda p: p.validate("teachers.main.engine_args={hf_token: abc}"),
        ("engine_args.hf_token", "HF_TOKEN"),
    ),
    (
        "a key in an address",
        lambda p: p.teacher(type="openai", base_url="http://me:secret@host/v1", model="m"),
        ("base_url", "api_key_env"),
    ),
    ("no name", lambda p: p.validate("run.name="), ("run.name=None", "string")),
    ("a name that leaves the folder", lambda p: p.validate("run.name=../x"), ("run.name='../x'", "pattern")),
    ("an override without a value", lambda p: p.validate("training.steps"), ("'training.steps'", "section.key=value")),
    ("an override of nothing", lambda p: p.validate("=1"), ("'=1'", "section.key=value")),
    ("an override that is no YAML", lambda p: p.validate("run.name=[1"), ("run.name=[1", "not valid YAML")),
    ("an override below a value", lambda p: p.validate("run.name.first=1"), ("run.name.first=1", "run.name is a value")),
    ("an override with a key twice", lambda p: p.validate("rollout={alpha: 0, alpha: 1}"), ("rollout=", "alpha", "twice")),
    ("no teacher", lambda p: p.set(teachers=None).validate("teachers={}"), ("teachers", "at least 1")),
    ("a teacher with a bad name", lambda p: p.validate("teachers={A B: {model: m}}"), ("teachers", "pattern")),
    (
        "an unknown teacher",
        lambda p: p.teacher(type="oracle"),
        ("teachers.main", "oracle", "there are capture, hf, openai, peer, self, vllm"),
    ),
    ("an unknown loss", lambda p: p.validate("loss={type: magic}"), ("loss", "magic", "minillm")),
    ("a loss that alpha forbids", lambda p: p.validate("rollout.alpha=1"), ("rollout.alpha=1", "unbounded", "alpha below 1")),
    (
        "a batch that siblings do not fill",
        lambda p: p.validate("rollout.samples_per_prompt=3"),
        ("training.batch_size=", "multiple", "=3"),
    ),
    (
        "a filter that is no expression",
        lambda p: p.validate("rollout.filters.pattern=("),
        ("pattern='('", "regular expression"),
    ),
    (
        "a schedule of what cannot change",
        lambda p: p.validate("training.schedules={run.seed: {type: linear, to: 1.0}}"),
        ("training.schedules.run.seed", "rollout.alpha"),
    ),
    (
        "a tiny model of no whole heads",
        lambda p: p.validate("student.model={type: tiny, width: 33}"),
        ("width=33", "multiple of 32"),
    ),
]

ROW = json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n"

DATA: list[Case] = [
    ("no file", lambda p: p.validate("data.prompts.path=gone.jsonl"), ("data.prompts.path=gone.jsonl", "no such file")),
    ("a folder", lambda p: p.validate("data.prompts.path=."), ("data.prompts.path=.", "folder", "name a file")),
    ("a path with a zero byte", lambda p: p.validate('data.prompts.path="a\\0b"'), ("data.prompts.path=", "zero byte")),
    (
        "a path without end",
        lambda p: p.validate("data.prompts.path=" + "x" * 9000),
        ("data.prompts.path=xxx", "too long", "name another file"),
    ),
    ("an empty file", lambda p: p.data(""), ("bad.jsonl", "empty")),
    ("blank lines", lambda p: p.data("\n \n"), ("bad.jsonl", "empty")),
    ("a cut line", lambda p: p.data(ROW + '{"prompt": "1'), ("bad.jsonl line 2", "not valid JSON", "one JSON object")),
    ("a list", lambda p: p.data('["prompt"]\n'), ("bad.jsonl line 1", "JSON object", "list")),
    ("one JSON array over lines", lambda p: p.data("[\n" + ROW + "]"), ("bad.jsonl line 1", "one JSON object")),
    (
        "a number with thousands of digits",
        lambda p: p.data('{"prompt": ' + "9" * 9000 + "}\n"),
        ("bad.jsonl line 1", "not valid JSON"),
    ),
    ("brackets in brackets", lambda p: p.data('{"prompt": ' + "[" * 100_000 + "\n"), ("bad.jsonl line 1", "nested")),
    (
        "bytes that are no text",
        lambda p: p.data(ROW.encode() + b'{"prompt": "\xff"}\n'),
        ("bad.jsonl line 2", "not UTF-8", "byte"),
    ),
    ("another encoding", lambda p: p.data(ROW.encode("utf-16")), ("bad.jsonl line 1", "not UTF-8")),
    (
        "half a character",
        lambda p: p.data('{"prompt": "a\\ud800b", "answer": "c"}\n'),
        ("bad.jsonl line 1, 'prompt'", "\\ud800", "character 2"),
    ),
    (
        "half a character in an answer",
        lambda p: p.data('{"prompt": "ab", "answer": "\\udfff"}\n'),
        ("bad.jsonl line 1, 'answer'", "\\udfff", "repair the row"),
    ),
    ("no prompt", lambda p: p.data('{"text": "1+1="}\n'), ("bad.jsonl line 1", "columns text", "data.prompts.prompt_column")),
    ("no prompt later", lambda p: p.data(ROW + '{"question": "1+1="}\n'), ("bad.jsonl line 2", "no 'prompt'", "question")),
    (
        "a column that is not there",
        lambda p: p.data(ROW, prompt_column="ask"),
        ("data.prompts.prompt_column=ask", "prompt, answer"),
    ),
    ("an answer column that is not there", lambda p: p.data(ROW, answer_column="reply"), ("data.prompts.answer_column=reply",)),
    (
        "a row without an answer",
        lambda p: p.data(ROW + '{"prompt": "a"}\n', answer_column="answer"),
        ("line 2", "no answer", "answer_column"),
    ),
    ("a domain column that is not there", lambda p: p.data(ROW, domain_column="about"), ("data.prompts.domain_column=about",)),
    ("null", lambda p: p.data('{"prompt": null}\n'), ("bad.jsonl line 1, 'prompt'", "null")),
    ("a number", lambda p: p.data('{"prompt": 3}\n'), ("bad.jsonl line 1, 'prompt'", "int 3")),
    ("blank", lambda p: p.data('{"prompt": "  "}\n'), ("bad.jsonl line 1, 'prompt'", "blank", "remove the row")),
    ("no messages", lambda p: p.data('{"messages": []}\n'), ("bad.jsonl line 1", "empty")),
    ("a message without a role", lambda p: p.data('{"messages": [{"content": "a"}]}\n'), ("message 1", "`role` and `content`")),
    (
        "an answer to nothing",
        lambda p: p.data('{"messages": [{"role": "assistant", "content": "a"}]}\n'),
        ("line 1", "nothing comes before the assistant's turn", "remove the row"),
    ),
    (
        "messages for a base model",
        lambda p: p.data('{"messages": [{"role": "user", "content": "a"}]}\n' * 20),
        ("chat template",),
    ),
    (
        "a list as the answer",
        lambda p: p.data('{"prompt": "a", "answer": [2]}\n'),
        ("line 1", "'answer'", "text", "list [2]"),
    ),
    ("all held out", lambda p: p.data(ROW * 8), ("data.heldout_size=8 of 8", "lower")),
    (
        "all too long",
        lambda p: p.set(data={"max_prompt_tokens": 1}).validate(),
        ("data.max_prompt_tokens=1", "40 of 40", "data.too_long=drop"),
    ),
    (
        "no held-out file",
        lambda p: p.data(ROW * 20, heldout_path="gone.jsonl"),
        ("data.prompts.heldout_path=gone.jsonl", "no such file"),
    ),
    ("garbage as Parquet", lambda p: p.parquet(b"PAR1 nonsense PAR1"), ("bad.parquet", "cannot be read as Parquet")),
    ("an empty file as Parquet", lambda p: p.parquet(b""), ("bad.parquet", "cannot be read as Parquet")),
    ("Parquet without a prompt", lambda p: p.parquet(pa.table({"n": [1, 2]})), ("bad.parquet row 1", "columns n")),
    ("Parquet with bytes", lambda p: p.parquet(pa.table({"prompt": [b"\xff"]})), ("bad.parquet row 1", "bytes")),
    (
        "a folder without Parquet",
        lambda p: p.validate("data.prompts={type: parquet, path: .}"),
        ("data.prompts.path=.", "no .parquet"),
    ),
]

MODELS: list[Case] = [
    ("no folder", lambda p: p.validate("student.model=/nowhere/at/all"), ("/nowhere/at/all", "no such folder", "org/name")),
    ("a file", lambda p: p.validate(f"student.model={p.recipe()}"), ("recipe.yaml", "is a file", "config.json")),
    ("a folder of something else", lambda p: p.validate(f"student.model={p.root}"), ("no config.json",)),
    ("a path without end", lambda p: p.validate("student.model=" + "x" * 9000), ("xxx", "too long", "name another folder")),
    ("a config that is no JSON", lambda p: p.student(write("config.json", "{")), ("spoiled", "config")),
    ("a config that is a list", lambda p: p.student(write("config.json", "[]")), ("spoiled", "config")),
    ("a config of an unknown kind", lambda p: p.student(edit("config.json", model_type="alien")), ("spoiled", "alien")),
    ("a config without a kind", lambda p: p.student(write("config.json", "{}")), ("spoiled", "model_type")),
    ("a vocabulary that is a text", lambda p: p.student(edit("config.json", vocab_size="many")), ("spoiled", "vocab_size")),
    ("no weights", lambda p: p.student(remove("model.safetensors")), ("spoiled", "*.safetensors", "save_pretrained")),
    (
        "cut weights",
        lambda p: p.student(lambda f: os.truncate(f / "model.safetensors", 100)),
        ("model.safetensors", "cut or damaged", "restore it"),
    ),
    ("weights that are none", lambda p: p.student(write("model.safetensors", b"\xff" * 64)), ("model.safetensors",)),
    (
        "weights with half a header",
        lambda p: p.student(write("model.safetensors", (40).to_bytes(8, "little") + b"{" * 40)),
        ("model.safetensors",),
    ),
    (
        "an index of shards that are not there",
        lambda p: p.student(
            lambda f: (
                (f / "model.safetensors").rename(f / "model-1.safetensors"),
                write("model.safetensors.index.json", json.dumps({"weight_map": {"a": "model-2.safetensors"}}))(f),
            )
        ),
        ("model-2.safetensors", "not there"),
    ),
    (
        "an index that leaves the folder",
        lambda p: p.student(write("model.safetensors.index.json", json.dumps({"weight_map": {"a": "../x.safetensors"}}))),
        ("../x.safetensors", "folder"),
    ),
    (
        "pickled weights",
        lambda p: p.student(lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin")),
        ("pytorch_model.bin", "*.safetensors", "save_pretrained"),
    ),
    (
        "its own code",
        lambda p: p.student(
            edit("config.json", model_type="odd", auto_map={"AutoConfig": "odd.Odd", "AutoModelForCausalLM": "odd.Model"})
        ),
        ("spoiled", "own code", "never run here", "whose architecture"),
    ),
    ("no tokenizer", lambda p: p.student(lambda f: [path.unlink() for path in f.glob("token*")]), ("spoiled", "tokenizer")),
    ("a tokenizer that is no JSON", lambda p: p.student(write("tokenizer.json", "{")), ("spoiled", "tokenizer")),
    ("a tokenizer that is garbage", lambda p: p.student(write("tokenizer.json", b"\xff\x00")), ("spoiled", "tokenizer")),
    (
        "a tokenizer without an end",
        lambda p: p.student(edit("tokenizer_config.json", eos_token=None)),
        ("end of sequence", "None", "set the same eos_token"),
    ),
    (
        "a tokenizer with its own code",
        lambda p: p.student(
            edit("tokenizer_config.json", tokenizer_class="Odd", auto_map={"AutoTokenizer": ["odd.Odd", None]})
        ),
        ("spoiled", "own code"),
    ),
    (
        "a generation config that is garbage",
        lambda p: p.student(write("generation_config.json", "{")),
        ("generation_config.json",),
    ),
    (
        "an end outside the vocabulary",
        lambda p: p.student(edit("generation_config.json", eos_token_id=[1, 700])),
        ("[700]", "99 ids"),
    ),
    (
        "quantised weights",
        lambda p: p.student(edit("config.json", quantization_config={"quant_method": "gptq", "bits": 4})),
        ("student.model", "quantised"),
    ),
    ("too few positions", lambda p: p.validate("rollout.max_new_tokens=60"), ("64 positions", "need 92", "lower")),
    ("a teacher that is not there", lambda p: p.teacher(model="/nowhere/at/all"), ("/nowhere/at/all", "no such folder")),
    ("a teacher of other ids", lambda p: p.teacher(model={"type": "tiny", "vocab_rows": 9}), ("vocab_rows=9", "99")),
    (
        "stages of pipelines",
        lambda p: p.teacher(model=str(p.models / "teacher"), engine_args={"pipeline_parallel_size": 2}),
        ("teachers.main", "pipeline_parallel_size", "tensor_parallel_size", "type openai"),
    ),
]

CAPTURES: list[Case] = [
    (
        "no folder",
        lambda p: p.set(rollout={"alpha": 1.0}, loss={"type": "sequence"}).teacher(type="capture", path="gone"),
        ("gone", "no such file or folder"),
    ),
    ("no manifest", lambda p: p.capture(remove("manifest.json")), ("captured", "manifest.json")),
    ("a manifest that is no JSON", lambda p: p.capture(write("manifest.json", "{")), ("manifest.json", "capture again")),
    ("a manifest that is a list", lambda p: p.capture(write("manifest.json", "[]")), ("manifest.json", "capture again")),
    ("a manifest of bytes", lambda p: p.capture(write("manifest.json", b"\xff\xfe\x00")), ("manifest.json", "capture again")),
    (
        "a manifest of wrong kinds",
        lambda p: p.capture(edit("manifest.json", vocab_size="99")),
        ("manifest.json", "whole numbers"),
    ),
    (
        "a manifest that names files",
        lambda p: p.capture(edit("manifest.json", shards=["../part.parquet", "/part.parquet"])),
        ("manifest.json", "shards"),
    ),
    ("another tokenizer", lambda p: p.capture(tokenizer="0123"), ("captured", "tokenizer")),
    (
        "no shards",
        lambda p: p.capture(lambda f: [shard.unlink() for shard in f.glob("*.parquet")]),
        ("captured", "no *.parquet"),
    ),
    (
        "garbage as a shard",
        lambda p: p.capture(write("part-0.parquet", b"PAR1")),
        ("part-0.parquet", "Parquet", "capture again"),
    ),
    (
        "a shard of something else",
        lambda p: p.capture(lambda f: pq.write_table(pa.table({"a": [1]}), f / "part-0.parquet")),
        ("part-0.parquet", "column", "absent"),
    ),
    (
        "a shard outside the folder",
        lambda p: p.capture(lambda f: (f / "part-0.parquet").symlink_to(f.parent / "elsewhere.parquet")),
        ("part-0.parquet",),
    ),
    ("lost rows", lambda p: p.capture(edit("manifest.json", rollouts=9)), ("captured", "9", "8")),
    ("another teacher", lambda p: p.capture(model=str(p.models / "teacher")), ("teachers.main.model",)),
    ("prompts it has not", lambda p: p.capture(), ("captured", "prompt")),
]


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        pytest.param(prepare, words, id=f"{table}: {name}")
        for table, cases in (("config", CONFIGS), ("data", DATA), ("model", MODELS), ("capture", CAPTURES))
        for name, prepare, words in cases
    ],
)
def test_validate_refuses(place: Place, prepare: Callable[[Place], list[str]], words: tuple[str, ...]) -> None:
    refused(CliRunner().invoke(app, prepare(place)), words)


def refused(result: Any, words: tuple[str, ...], exit_code: int = 2) -> None:
    assert "Traceback" not in result.stderr, result.stderr
    assert result.exit_code == exit_code, result.output
    for word in words:
        assert word in result.stderr
    assert not result.stdout.strip() or exit_code != 2


def test_the_recipe_is_sound_where_nothing_is_spoiled(place: Place) -> None:
    result = CliRunner().invoke(app, place.validate())
    assert result.exit_code == 0, result.output


# --------------------------------------------------------------------------------------------- other commands, files, answers


def finished(place: Place) -> RunFolder:
    """A run folder with a student."""
    folder = place.started()
    storage = Storage.local(folder.path)
    commit(storage, "student", {}, [storage.put_tree(place.models / "student", "student")])
    return folder


def full(place: Place) -> Path:
    (place.root / "full").mkdir()
    (place.root / "full" / "mine").touch()
    return place.root / "full"


COMMANDS: list[Case] = [
    ("verify: no run", lambda p: ["verify", str(p.root)], ("not a run folder", "runs/<name>")),
    ("report: no run", lambda p: ["report", str(p.root)], ("not a run folder", "runs/<name>")),
    (
        "report: lines that are none",
        lambda p: ["report", str(lines_of(p, "metrics.jsonl", "{"))],
        ("metrics.jsonl:1", "not valid JSON"),
    ),
    (
        "report: a summary that is none",
        lambda p: ["report", str(lines_of(p, "summary.json", "["))],
        ("summary.json", "not valid JSON"),
    ),
    ("eval: no run", lambda p: ["eval", str(p.root)], ("not a run folder",)),
    ("eval: a run without a student", lambda p: ["eval", str(p.started().path)], ("has no student yet", "--resume")),
    ("eval: a student that is not there", lambda p: ["eval", str(p.recipe()), "--student", "gone"], ("gone",)),
    ("export: no run", lambda p: ["export", str(p.root), "--to", "out"], ("not a run folder",)),
    ("export: no student", lambda p: ["export", str(p.started().path), "--to", "out"], ("has no student yet", "--resume")),
    (
        "export: a full folder",
        lambda p: ["export", str(finished(p).path), "--to", str(full(p))],
        ("--to", "not an empty folder", "nothing is overwritten"),
    ),
    (
        "export: into itself",
        lambda p: ["export", str(finished(p).path), "--to", str(p.root / "runs/x/student/out")],
        ("--to", "inside the student"),
    ),
    (
        "export: groups of nothing",
        lambda p: ["export", str(finished(p).path), "--to", "out", "--group-size", "8"],
        ("--group-size 8", "--quantize int4"),
    ),
    (
        "export: an unknown format",
        lambda p: ["export", str(finished(p).path), "--to", "out", "--quantize", "int3"],
        ("int3", "int4"),
    ),
    (
        "export: groups that do not fit",
        lambda p: ["export", str(finished(p).path), "--to", "out", "--quantize", "int4", "--group-size", "7"],
        ("7",),
    ),
    (
        "capture: a teacher without answers of its own",
        lambda p: p.capture() and ["capture", str(p.recipe())],
        ("teachers.main",),
    ),
    (
        "run: no cluster at an address",
        lambda p: ["run", str(p.recipe()), "cluster.address=127.0.0.1:1"],
        ("127.0.0.1:1", "does not answer"),
    ),
    (
        "run: an address that is none",
        lambda p: ["run", str(p.recipe()), "cluster.address=ray://[x"],
        ("cluster.address=ray://[x",),
    ),
    ("run: nothing to train on", lambda p: ["run", *p.data("")[1:]], ("bad.jsonl", "empty")),
]


def lines_of(place: Place, name: str, content: str) -> Path:
    folder = place.started()
    (folder.path / name).write_text(content + "\n")
    return folder.path


@pytest.mark.parametrize(("prepare", "words"), [pytest.param(*case[1:], id=case[0]) for case in COMMANDS])
def test_a_command_refuses(place: Place, prepare: Callable[[Place], list[str]], words: tuple[str, ...]) -> None:
    refused(CliRunner().invoke(app, prepare(place)), words)


def test_a_cluster_of_the_environment_that_does_not_answer(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    result = CliRunner().invoke(app, ["run", str(place.recipe())])
    refused(result, ("RAY_ADDRESS=127.0.0.1:1 does not answer", "correct RAY_ADDRESS"))
    assert "cluster.address" not in result.stderr, "nobody set it"
    result = CliRunner().invoke(app, ["run", str(place.recipe()), "cluster.address=127.0.0.1:2"])
    refused(result, ("cluster.address=127.0.0.1:2 does not answer", "correct cluster.address"))
    assert "RAY_ADDRESS" not in result.stderr, "the setting goes before it"


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_key_that_is_not_in_the_environment(place: Place, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is not None:
        monkeypatch.setenv("MY_KEY", value)
    place.set(rollout={"alpha": 1.0}, loss={"type": "sequence"})
    arguments = place.teacher(type="openai", base_url="http://127.0.0.1:1/v1", model="m", api_key_env="MY_KEY")
    refused(CliRunner().invoke(app, arguments), ("teachers.main.api_key_env=MY_KEY", "not set", "export it"))


def through(work: Callable[[], Any]) -> Any:
    """What a command that does `work` ends with."""
    command = typer.Typer()

    @command.command()
    def run() -> None:
        with exit_codes():
            work()

    return CliRunner().invoke(command, [])


def resumed(place: Place, **sections: Any) -> RunFolder:
    return RunFolder.create(load_config(place.set(**sections).recipe()), resume=True)


def as_a_file(place: Place) -> RunFolder:
    (place.root / "runs").write_text("mine")
    return place.started()


def other_settings(place: Place) -> RunFolder:
    place.started()
    return resumed(place, rollout={"alpha": 0.5})


def without_config(place: Place) -> RunFolder:
    (place.root / "runs" / "x" / "photos").mkdir(parents=True)
    return place.started()


def torn_config(place: Place) -> RunFolder:
    place.started().config.write_text("run: {name")
    return resumed(place)


def checkpoint(place: Place, step: int, **progress: Any) -> None:
    storage, key = Storage.local(place.started().path), f"checkpoints/step-{step:06d}"
    written = {"weights": storage.write(f"{key}/weights", b"weights")}
    commit(storage, key, {"step": step, "horizon": 100, "stage": "distill"} | progress, [written])


def fewer_steps(place: Place) -> Any:
    checkpoint(place.set(training={"steps": 100}), 80)
    return checkpoint_of(place.set(training={"steps": 50}))


def another_horizon(place: Place) -> Any:
    checkpoint(place.set(training={"steps": 100, "schedule": "cosine"}), 80)
    return checkpoint_of(place.set(training={"steps": 200, "schedule": "cosine"}))


def fewer_supervised_steps(place: Place) -> Any:
    checkpoint(place.set(training={"sft": {"steps": 40}}), 0, stage="sft", phase_step=30, sft_steps=40)
    return checkpoint_of(place.set(training={"sft": {"steps": 20}}))


def supervised_steps_of_the_past(place: Place) -> Any:
    checkpoint(place.set(training={"sft": {"steps": 40}}), 10, sft_steps=40)
    return checkpoint_of(place.set(training={"sft": {"steps": 50}}))


def finetuning(place: Place, steps: int, schedule: str = "constant", stage: str = "finetune", done: int = 6) -> Any:
    """Resumed with `steps` where some of 20 are done, after 80 steps of distillation."""
    of_run = {"steps": 80, "schedule": schedule}
    started = place.set(training=of_run | {"finetune": {"steps": 20}})
    checkpoint(started, 81 + done, stage=stage, horizon=80, steps=80, sft_steps=0, finetune_steps=20)
    return checkpoint_of(place.set(training=of_run | {"finetune": {"steps": steps}}))


def checkpoint_of(place: Place) -> Any:
    from cluster.launch import _checkpoint_to_resume

    return _checkpoint_to_resume(load_config(place.recipe()), None)


FILES: list[tuple[str, Callable[[Place], Any], tuple[str, ...]]] = [
    (
        "a run of that name",
        lambda p: (p.started().append_metrics({"step": 1}), p.started()),
        ("runs/x", "already holds a run", "--resume", "run.name"),
    ),
    ("a folder of something else", without_config, ("runs/x", "not a run folder", "run.output")),
    ("nothing to resume", resumed, ("runs/x", "no run to resume", "--resume")),
    ("other settings than those to resume", other_settings, ("rollout.alpha: 0.2 there, 0.5 now", "Give it those")),
    ("a stored config that is torn", torn_config, ("runs/x/config.yaml", "not valid YAML")),
    ("an output that is a file", as_a_file, ("run.output=runs", "cannot be written")),
    (
        "an output without end",
        lambda p: RunFolder.create(load_config(p.recipe(), ["run.output=" + "x" * 9000])),
        ("run.output=xxx", "cannot be written"),
    ),
    ("fewer steps than the checkpoint has", fewer_steps, ("training.steps=50", "80 steps already", "at least")),
    (
        "fewer supervised steps than are done",
        fewer_supervised_steps,
        ("training.sft.steps=20", "30 steps already", "set training.sft.steps to at least"),
    ),
    (
        "other supervised steps than there were",
        supervised_steps_of_the_past,
        ("training.sft.steps=50", "40 steps of that phase"),
    ),
    ("less fine-tuning than is done", lambda p: finetuning(p, 5), ("training.finetune.steps=5", "6 steps already")),
    (
        "no fine-tuning where it has begun",
        lambda p: finetuning(p, 0, "cosine", done=0),
        ("training.finetune.steps=0", "1 ends it soonest"),
    ),
    (
        "fine-tuning on another curve from its start",
        lambda p: finetuning(p, 10, "cosine", done=0),
        ("training.finetune.steps=10", "end it now by 1"),
    ),
    (
        "fine-tuning on another curve",
        lambda p: finetuning(p, 10, "cosine"),
        ("training.finetune.steps=10", "laid out for 20 steps", "end it now by 6"),
    ),
    (
        "other fine-tuning than there was",
        lambda p: finetuning(p, 10, stage="control"),
        ("training.finetune.steps=10", "20 steps of that phase"),
    ),
    ("another horizon than the schedule's", another_horizon, ("training.steps=200", "cosine", "100 steps")),
    (
        "a seed's teachers file that is none",
        lambda p: ((folder := p.started()).path / "teachers.json").write_text("[") and folder.read_teachers(),
        ("teachers.json", "not valid JSON", "remove the file"),
    ),
]


@pytest.mark.parametrize(
    ("steps", "schedule"), [(6, "constant"), (6, "cosine"), (10, "constant"), (20, "cosine"), (30, "constant")]
)
def test_fine_tuning_that_fails_may_be_ended_early(place: Place, steps: int, schedule: str) -> None:
    found, _ = finetuning(place, steps, schedule)
    assert found.step == 87


@pytest.mark.parametrize(("work", "words"), [pytest.param(*case[1:], id=case[0]) for case in FILES])
def test_a_run_folder_or_checkpoint_that_does_not_fit(
    place: Place, work: Callable[[Place], Any], words: tuple[str, ...]
) -> None:
    refused(through(lambda: work(place)), words)


def test_the_step_that_is_named_ends_fine_tuning_soonest(place: Place) -> None:
    assert finetuning(place, 1, "cosine", done=0)


ANSWERS: list[tuple[str, tuple[int, dict[str, str], Any], dict[str, Any], tuple[str, ...]]] = [
    ("a key that it does not know", (401, {}, {"error": {"message": "bad key"}}), {}, ("api_key_env", "401")),
    ("no access", (403, {}, {"error": {"message": "no"}}), {}, ("403",)),
    ("no such model", (404, {}, {"error": {"message": "no model m"}}), {}, ("no model m", "model=m")),
    ("a request that it refuses", (400, {}, {"error": {"message": "max_tokens"}}), {}, ("max_tokens",)),
    ("too many requests", (429, {}, {"error": {"message": "slow down"}}), {}, ("429", "requests_per_minute")),
    ("an error of its own", (500, {}, b"oops"), {}, ("500",)),
    ("a page", (200, {"content-type": "text/html"}, b"<html>hello</html>"), {}, ("base_url", "OpenAI")),
    ("JSON that is cut", (200, {}, b'{"choices": ['), {}, ("base_url",)),
    ("nothing", (200, {}, b""), {}, ("base_url",)),
    ("null", (200, {}, None), {}, ("base_url",)),
    ("a list", (200, {}, []), {}, ("base_url",)),
    ("no choice", (200, {}, {"choices": []}), {}, ("without a choice",)),
    ("choices that are a text", (200, {}, {"choices": "yes"}), {}, ("without a choice",)),
    ("no ids", written("a"), {"chat": False, "token_ids": True}, ("token_ids=true", "set token_ids=false")),
    (
        "ids beyond the vocabulary",
        written("a", prompt_token_ids=[10**6]),
        {"chat": False, "token_ids": True},
        ("gave id 1000000", "token_ids=false"),
    ),
    (
        "ids of another tokenizer",
        written("a", prompt_token_ids=[3]),
        {"chat": False, "token_ids": True},
        ("[3]", "token_ids=false"),
    ),
    ("ids that are texts", written("a", prompt_token_ids=["a"]), {"chat": False, "token_ids": True}, ("names no ids",)),
]


def asked(port: int, **settings: Any) -> None:
    """What a start asks of an endpoint."""

    async def check() -> None:
        given = {"type": "openai", "base_url": f"http://127.0.0.1:{port}/v1", "model": "m", "api_key_env": None, "retries": 0}
        teacher = RemoteTeacher(
            "far", OpenAITeacherSettings(**(given | settings)), task_tokenizer(), lambda request: "what?", 99, (1,)
        )
        try:
            await teacher.check()
        finally:
            await teacher.close()

    asyncio.run(check())


@pytest.mark.parametrize(("answer", "settings", "words"), [pytest.param(*case[1:], id=case[0]) for case in ANSWERS])
def test_an_endpoint_that_answers_wrongly(
    answer: tuple[int, dict[str, str], Any], settings: dict[str, Any], words: tuple[str, ...]
) -> None:
    with serving(lambda number, body: answer) as server:
        refused(through(lambda: asked(server.port, **settings)), ("teachers.far", *words))


def test_an_endpoint_that_is_not_there() -> None:
    refused(through(lambda: asked(1)), ("teachers.far", "127.0.0.1:1", "base_url"))


def test_the_table_is_long_enough() -> None:
    assert sum(map(len, (CONFIGS, DATA, MODELS, CAPTURES, COMMANDS, FILES, ANSWERS))) > 150
