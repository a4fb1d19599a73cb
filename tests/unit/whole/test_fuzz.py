"""Mutated configs, data files, captures, weights and run folders: whatever they hold, the errors are ConfigError and DataError.

The same examples every time; `make fuzz` draws new ones, and twenty times as many.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cluster.cli import app
from kdray.capturing.format import MANIFEST, read_manifest, write_capture
from kdray.capturing.teacher import CapturedTeacher
from kdray.config import Config, TinyModel, load_config, parse_config
from kdray.data.dataset import load_dataset
from kdray.errors import ConfigError, DataError
from kdray.models.random_models import byte_tokenizer
from kdray.models.resolve import build_tiny_model, task_tokenizer
from kdray.models.safetensors_check import check_weights
from kdray.runs.verify import verify
from kdray.types import Prompt, Rollout

ROOT = Path(__file__).parents[3]
RECIPES = [path.read_text() for path in sorted((ROOT / "configs").glob("*.yaml"))]
MORE = int(os.environ.get("KDRAY_FUZZ", "1"))
"""How many times more examples than a test run has; above 1, new ones each time."""


def fuzz(examples: int) -> Any:
    return hypothesis_settings(
        max_examples=examples * MORE,
        derandomize=MORE == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


NUMBERS = (
    st.sampled_from([0, -1, 1, 2, 7, 10**4, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 0.5, -0.0, 1e-320, 1e308]) | st.floats()
)
WORDS = st.sampled_from(
    [
        "",
        " ",
        ".",
        "..",
        "/",
        "/dev/null",
        "~",
        "a/b",
        "null",
        "yes",
        "1e5",
        "2026-13-45",
        "x" * 5000,
        "$HOME",
        "{prompt}",
        "[",
        "(",
        "tiny",
        "jsonl",
        "capture",
        "openai",
        "self",
        "minillm",
        "http://[",
        "\u202e",
        "é",
        "\U0001f600",
        "\x7f",
        "{",
        "%s",
        "a\nb",
    ]
)
PLAIN = st.none() | st.booleans() | NUMBERS | WORDS | st.text(max_size=8)
NAMES = WORDS | st.text(max_size=4)
JUNK = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=6)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key and index of a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutate(draw: Callable[[Any], Any], tree: Any) -> Any:
    """One change somewhere: a key dropped, replaced, renamed, given a neighbour, or put into lists."""
    found = list(places(tree))
    if not found:
        return draw(JUNK)
    *parents, last = draw(st.sampled_from(found))
    node = tree
    for key in parents:
        node = node[key]
    how = draw(st.sampled_from(["drop", "replace", "replace", "retype", "rename", "add", "nest", "copy"]))
    if how == "drop":
        del node[last]
    elif how == "replace":
        node[last] = draw(JUNK)
    elif how == "retype":
        node[last] = draw(st.sampled_from([str, lambda v: [v], lambda v: {"type": v}, lambda v: {str(v): v}]))(node[last])
    elif how == "rename" and isinstance(node, dict):
        node[draw(WORDS | st.text(max_size=6))] = node.pop(last)
    elif how == "add" and isinstance(node, dict):
        node[draw(WORDS | st.sampled_from(["type", "model", "path", "alpha", "steps"]))] = draw(JUNK)
    elif how == "nest":
        for _ in range(draw(st.sampled_from([1, 3, 70, 100]))):
            node[last] = [node[last]]
    else:
        other = draw(st.sampled_from(found))
        value = tree
        for key in other:
            value = value[key] if isinstance(value, dict | list) and other[: len(parents) + 1] != (*parents, last) else value
        node[last] = json.loads(json.dumps(value, default=str))
    return tree


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """Some bytes changed, cut out, doubled or put in."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(changed)))
        length = draw(st.sampled_from([1, 1, 2, 8, 40]))
        how = draw(st.sampled_from(["set", "cut", "double", "put", "end"]))
        if how == "set" and at < len(changed):
            changed[at] = draw(st.integers(0, 255))
        elif how == "cut":
            del changed[at : at + length]
        elif how == "double":
            changed[at:at] = changed[at : at + length]
        elif how == "put":
            changed[at:at] = draw(
                st.binary(max_size=12)
                | st.sampled_from(
                    [
                        b"\n",
                        b"\t",
                        b": ",
                        b"- ",
                        b"&a ",
                        b"*a",
                        b"!!python/name:os.system ",
                        b"\xef\xbb\xbf",
                        b"\x00",
                        b"<<: ",
                        b"? ",
                        b"|\n",
                        b"%YAML 9\n",
                        b"---\n",
                    ]
                )
            )
        else:
            del changed[at:]
    return bytes(changed)


@st.composite
def recipe_files(draw: Any) -> bytes:
    text = draw(st.sampled_from(RECIPES))
    kind = draw(st.sampled_from(["tree", "tree", "tree", "bytes", "lines"]))
    if kind == "tree":
        tree = yaml.safe_load(text)
        for _ in range(draw(st.integers(1, 3))):
            tree = mutate(draw, tree)
        return yaml.safe_dump(tree, allow_unicode=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if kind == "lines":
        lines = text.splitlines(keepends=True)
        at, to = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(lines)))
        lines.insert(to, draw(st.sampled_from(["", "  ", "    "])) + lines[at].lstrip())
        return "".join(lines).encode()
    return draw(damaged(text.encode()))


def refusal(work: Callable[[], Any], words: str = "") -> str | None:
    """The message with which `work` refuses its input, which names `words` and is bounded; None where it does not."""
    message = None
    try:
        work()
    except (ConfigError, DataError) as error:
        message = str(error)
    assert message is None or (message and len(message) < 20_000 and words in message), message
    return message


@fuzz(500)
@given(content=recipe_files() | st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")))
def test_a_config_is_loaded_or_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_bytes(content)
    if refusal(lambda: load_config(path)) is None:
        # What passed can be written, and read again as the same.
        config = load_config(path)
        path.write_text(config.dump(), encoding="utf-8")
        assert load_config(path) == config


KEYS = st.lists(
    st.sampled_from(["run", "name", "training", "steps", "teachers", "rollout", "filters", "data", "prompts", "", "x", "type"]),
    max_size=5,
)


@fuzz(150)
@given(
    key=KEYS.map(".".join) | st.text(max_size=10),
    value=JUNK.map(lambda junk: yaml.safe_dump(junk).strip()) | st.text(max_size=20),
)
def test_an_override_is_applied_or_refused(key: str, value: str) -> None:
    refusal(lambda: load_config(ROOT / "configs" / "quickstart.yaml", [f"{key}={value}"]))


# ------------------------------------------------------------------------------------------------------------- data

MESSAGE = st.dictionaries(
    st.sampled_from(["role", "content", "from", "value", "tool_calls", "weight"]),
    st.sampled_from(
        ["user", "assistant", "human", "gpt", "a", "", None, 0, [], [{"type": "text", "text": "a"}], [{"function": {}}]]
    ),
    max_size=4,
)
TALK = st.lists(MESSAGE | JUNK, max_size=4)
ROW = st.fixed_dictionaries(
    {},
    optional={
        name: PLAIN | st.text(max_size=6) | st.just("1+1=") | st.just([{"role": "user", "content": "a"}]) | TALK | JUNK
        for name in (
            *("prompt", "question", "messages", "conversations", "instruction", "input", "answer", "output", "completion"),
            *("system", "tools", "chat_template_kwargs", "domain"),
        )
    },
)
ODD_LINES = [
    b"",
    b" ",
    b"\xef\xbb\xbf{}",
    b"null",
    b"NaN",
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a\\u0000b"}',
    b'{"prompt": ' + b"[" * 3000,
    b'{"prompt": ' + b"9" * 5000 + b"}",
    b'{"prompt": "a", "prompt": 1}',
    b'{"prompt": "' + b"x" * 3000 + b'"}',
]
LINES = (
    ROW.map(lambda row: json.dumps(row).encode())
    | st.just(b'{"prompt": "1+1=", "answer": "2"}')
    | st.builds(lambda row, at: json.dumps(row).encode()[: at + 1], ROW, st.integers(0, 40))
    | st.binary(max_size=20)
    | st.sampled_from(ODD_LINES)
)


def data_config(path: Path, kind: str, **more: Any) -> Config:
    return parse_config(
        {
            "run": {"name": "x"},
            "data": {"prompts": {"type": kind, "path": str(path), **more}, "heldout_size": 1, "max_prompt_tokens": 64},
            "student": {"model": {"type": "tiny"}},
            "teachers": {"t": {"model": {"type": "tiny"}}},
        }
    )


TOKENIZER = task_tokenizer()
CHAT_TOKENIZER = byte_tokenizer()


def read(path: Path, kind: str, **more: Any) -> None:
    def load() -> None:
        dataset = load_dataset(data_config(path, kind, **more), TOKENIZER)
        assert all(len(prompt.token_ids) for prompt in [*dataset.train, *dataset.heldout])

    refusal(load)


@fuzz(300)
@given(
    lines=st.lists(LINES, max_size=6),
    end=st.sampled_from([b"\n", b"", b"\r\n", b"\x00"]),
    more=st.sampled_from([{}, {"prompt_column": "question"}, {"answer_column": "answer"}, {"domain_column": "domain"}]),
)
def test_lines_are_read_or_refused(
    lines: list[bytes], end: bytes, more: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_bytes(b"\n".join(lines) + end)
    read(path, "jsonl", **more)


@fuzz(150)
@given(
    ending=st.sampled_from(["json", "csv", "tsv", "jsonl.gz"]),
    content=st.lists(ROW, max_size=4).map(lambda rows: json.dumps(rows).encode())
    | st.binary(max_size=40)
    | st.sampled_from(
        [b"prompt,answer\n1+1=,2\n2+2=,4\n", b'prompt\n"a', b"prompt,prompt\na,b\n", b"\xef\xbb\xbf[", b"[1", b"\x1f\x8b"]
    ),
    turns=st.sampled_from(["last", "all", "each"]),
)
def test_other_files_are_read_or_refused(
    ending: str, content: bytes, turns: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / f"other.{ending}"
    path.write_bytes(content)
    config = data_config(path, "file")
    config = config.model_copy(update={"data": config.data.model_copy(update={"turns": turns})})
    refusal(lambda: load_dataset(config, CHAT_TOKENIZER, references=True))


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


GOOD_PARQUET = parquet(pa.table({"prompt": ["1+1=", "2+2=", "3+3="], "answer": ["2", "4", "6"]}))
COLUMN = st.sampled_from(
    [
        pa.array(["a", None]),
        pa.array([1, 2]),
        pa.array([b"\xff", b"a"]),
        pa.array([["a"], []]),
        pa.array([[{"role": "user", "content": "a"}], [{"role": None, "content": "b"}]]),
        pa.array(["a", "b"]).dictionary_encode(),
        pa.array([0.5, float("nan")]),
        pa.nulls(2),
        pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xff")).take(pa.array([0, 0])),
    ]
)
TABLES = st.dictionaries(st.sampled_from(["prompt", "answer", "messages", "x"]), COLUMN, max_size=3).map(
    lambda columns: parquet(pa.table(columns))
)


@fuzz(150)
@given(content=damaged(GOOD_PARQUET) | TABLES | st.binary(max_size=30))
def test_parquet_is_read_or_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "some.parquet"
    path.write_bytes(content)
    read(path, "parquet")


# ------------------------------------------------------------------------------------- captures, weights, run folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a capture."""
    root = tmp_path_factory.mktemp("sound")
    build_tiny_model(TinyModel(type="tiny", layers=1, width=32, max_positions=64), root / "model")
    ids, logprobs = np.array([5, 1], np.int32), np.full(2, -1.0, np.float32)
    rollouts = [Rollout(i, i, ids, ids, logprobs, None, np.zeros(2, np.int32), 1.0, "stop", "t", logprobs) for i in range(4)]
    write_capture(root / "capture", rollouts, None, "0123", 99)
    return root


def json_files(value: Any) -> st.SearchStrategy[bytes]:
    """Damaged forms of a JSON file."""

    @st.composite
    def changed(draw: Any) -> bytes:
        return json.dumps(mutate(draw, json.loads(json.dumps(value)))).encode()

    return changed() | damaged(json.dumps(value).encode())


MANIFEST_VALUE = {
    "fingerprint": None,
    "tokenizer": "0123",
    "vocab_size": 99,
    "rollouts": 4,
    "asked_with": {},
    "asked": 0,
    "complete": True,
}


@fuzz(150)
@given(content=json_files(MANIFEST_VALUE))
def test_a_manifest_is_read_or_refused(content: bytes, folders: Path) -> None:
    folder = folders / "other"
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST).write_bytes(content)
    refusal(lambda: read_manifest(folder), MANIFEST)


@fuzz(60)
@given(data=st.data())
def test_a_damaged_shard_is_read_or_refused(data: st.DataObject, folders: Path) -> None:
    folder = folders / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folders / "capture", folder)
    (shard,) = folder.glob("*.parquet")
    shard.write_bytes(data.draw(damaged(shard.read_bytes())))
    refusal(lambda: CapturedTeacher("t", folder, [Prompt(0, np.array([5, 1], np.int32))], 99, "0123"), str(folder))


@fuzz(100)
@given(data=st.data())
def test_damaged_weights_are_passed_or_refused(data: st.DataObject, folders: Path) -> None:
    folder = folders / "weights"
    folder.mkdir(exist_ok=True)
    content = (folders / "model" / "model.safetensors").read_bytes()
    head = 8 + int.from_bytes(content[:8], "little")
    (folder / "model.safetensors").write_bytes(data.draw(damaged(content[:head])) + content[head:])
    refusal(lambda: check_weights(folder), "model.safetensors")


LEDGER_LINE = {
    "step": 1,
    "sample_ids": [0, 1],
    "dropped": {"finished": [1]},
    "prompt_ids": [3, 4],
    "tokens": 3,
    "oldest": 0,
    "newest": 0,
    "scored_by": "t",
    "trained_tokens": 3,
}


@fuzz(150)
@given(
    name=st.sampled_from(
        ["ledger.jsonl", "metrics.jsonl", "events.jsonl", "summary.json", "checkpoints/step-000001/COMMITTED.json"]
    ),
    content=json_files(LEDGER_LINE)
    | json_files({"step": 1, "kind": "finished", "totals": {"prompts_consumed": 1}, "staleness_max": 0.0}),
)
def test_a_run_folder_is_judged_whatever_it_holds(name: str, content: bytes, folders: Path) -> None:
    run = folders / "run"
    (run / "checkpoints" / "step-000001").mkdir(parents=True, exist_ok=True)
    sound = {
        "ledger.jsonl": LEDGER_LINE,
        "metrics.jsonl": {"step": 1},
        "events.jsonl": {"kind": "finished"},
        "summary.json": {},
    }
    for each, value in (sound | {"checkpoints/step-000001/COMMITTED.json": {"step": 1}}).items():
        (run / each).write_text(json.dumps(value) + "\n")
    tree = {"data": {"prompts": {"type": "iterable"}}, "student": {"model": "a/b"}, "teachers": {"t": {"model": "a/b"}}}
    (run / "config.yaml").write_text(parse_config({"run": {"name": "x"}, **tree}).dump())
    (run / name).write_bytes(content + b"\n")
    verify(run)


# ------------------------------------------------------------------------------------------------------ the command


@fuzz(60)
@given(data=st.data())
def test_validate_ends_with_0_or_2(data: st.DataObject, folders: Path) -> None:
    rows = folders / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(20)))
    model = str(folders / "model")
    tree: Any = {
        "run": {"name": "x", "seed": 1},
        "data": {"prompts": {"type": "jsonl", "path": str(rows)}, "heldout_size": 4, "max_prompt_tokens": 32},
        "student": {"model": model},
        "teachers": {"main": {"model": model}},
        "rollout": {"max_new_tokens": 16, "alpha": 0.2, "filters": {"pattern": "a"}},
        "training": {"batch_size": 16, "micro_batch_size": 8, "sft": {"steps": 1}},
        "loss": {"type": "minillm"},
    }
    for _ in range(data.draw(st.integers(1, 2))):
        tree = mutate(data.draw, tree)
    path = folders / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8", errors="replace")
    result = CliRunner().invoke(app, ["validate", str(path)])
    assert result.exit_code in (0, 2), result.stderr
    assert "Traceback" not in result.stderr
