"""Formats of data files: columns chosen by detection and described, conversations, odd values, and files by their names."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdray.config import Config, parse_config
from kdray.data.dataset import Dataset, asked_text, load_dataset
from kdray.data.formats import Columns, Row, Table, read_rows
from kdray.errors import ConfigError, DataError
from kdray.models.resolve import task_tokenizer
from kdray.types import SampleRequest

USER, ASSISTANT = {"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}
SYSTEM = {"role": "system", "content": "be brief"}
TEMPLATE = (
    "{% if tools %}[tools]{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for call in m.tool_calls %}<{{ call.function.name }} {{ call.function.arguments | tojson }}>{% endfor %}<eos>"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{{ '(thinking)' if think }}{% endif %}"
)


def table(*records: dict[str, Any], turns: Any = "last", **columns: str) -> Table:
    return read_rows(((f"row {n}", record) for n, record in enumerate(records, 1)), Columns(**columns), "rows", turns)


def row(record: dict[str, Any], **columns: str) -> Row:
    (found,) = table(record, **columns).rows
    return found


def config_of(prompts: dict[str, Any], **data: Any) -> Config:
    tiny = {"type": "tiny"}
    models = {"student": {"model": tiny}, "teachers": {"t": {"model": tiny}}}
    return parse_config({"run": {"name": "r"}, "data": {"prompts": prompts, **data}, **models})


def load(prompts: dict[str, Any], template: str | None = TEMPLATE, handed: Any = None, **data: Any) -> Dataset:
    tokenizer = task_tokenizer()
    tokenizer.chat_template = template
    return load_dataset(config_of(prompts, **data), tokenizer, handed)


# ------------------------------------------------------------------------------------------------------------ formats


@pytest.mark.parametrize(
    ("record", "prompt", "answer"),
    [
        ({"messages": [SYSTEM, USER, ASSISTANT]}, [SYSTEM, USER], "2"),
        ({"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]}, [SYSTEM, USER, ASSISTANT, USER], "2"),
        ({"messages": [USER], "answer": "2"}, [USER], "2"),
        ({"messages": [USER, ASSISTANT, USER], "answer": "3"}, [USER, ASSISTANT, USER], "3"),
        ({"instruction": "add", "input": "1 and 1", "output": "2"}, "add\n\n1 and 1", "2"),
        ({"instruction": "add", "input": "", "output": "2"}, "add", "2"),
        ({"instruction": "add", "input": None, "output": "2"}, "add", "2"),
        ({"instruction": "add", "context": "1 and 1", "response": "2"}, "add\n\n1 and 1", "2"),
        ({"instruction": "add", "input": "1 and 1", "output": "2", "system": "be brief"}, None, "2"),
        ({"conversations": [{"from": "human", "value": "1+1="}, {"from": "gpt", "value": "2"}]}, [USER], "2"),
        (
            {"conversations": [{"from": "human", "value": "1+1="}, {"from": "gpt", "value": "2"}], "system": "be brief"},
            [SYSTEM, USER],
            "2",
        ),
        ({"prompt": "1+1=", "completion": "2"}, "1+1=", "2"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, [USER], "2"),
        ({"prompt": "1+1=", "completion": [ASSISTANT]}, [USER], "2"),
        ({"prompt": [USER], "completion": "2"}, [USER], "2"),
        ({"query": "1+1=", "response": "2"}, "1+1=", "2"),
        ({"problem": "1+1=", "solution": "2"}, "1+1=", "2"),
        ({"system_prompt": "", "question": "1+1=", "response": "2"}, "1+1=", "2"),
        ({"input": "1+1=", "output": "2"}, "1+1=", "2"),
        # The first message of a conversation, beside the conversation.
        ({"prompt": "1+1=", "messages": [USER, ASSISTANT]}, [USER], "2"),
        ({"prompt": "1+1=", "answer": "3", "messages": [USER, ASSISTANT]}, "1+1=", "3"),
    ],
)
def test_a_format_is_detected(record: dict[str, Any], prompt: Any, answer: str) -> None:
    if prompt is None:
        prompt = [SYSTEM, {"role": "user", "content": "add\n\n1 and 1"}]
    found = row(record)
    assert (found.prompt, found.answer) == (prompt, answer)


def test_the_choice_is_described() -> None:
    records = [{"instruction": "add", "input": f"{n} and 1", "output": "2", "id": n} for n in range(3)]
    assert table(*records).lines == [
        "3 rows, instructions with input: prompts from 'instruction' and 'input'; answers from 'output'; not used: id"
    ]
    (line,) = table({"messages": [USER, ASSISTANT], "source": "x", "tools": "[]"}).lines
    assert line == (
        "1 rows, chat messages: prompts from 'messages'; answers are the assistant's last turns; 'tools' goes to the chat "
        "template; not used: source"
    )
    (line,) = table({"question": "a", "choices": ["b", "c"]}).lines
    assert line == "1 rows, texts: prompts from 'question'; no answers; not used: choices"
    _, earlier = table({"messages": [USER, ASSISTANT, USER, ASSISTANT]}).lines
    assert earlier.startswith("1 rows have earlier turns of an assistant, which are context: data.turns=all")
    assert len(table({"messages": [USER, ASSISTANT, USER, ASSISTANT]}, turns="all").lines) == 1


def test_every_turn_is_a_prompt_of_its_own() -> None:
    silent = {"role": "assistant", "content": "no", "weight": 0}
    found = table({"messages": [SYSTEM, USER, ASSISTANT, USER, silent, USER, ASSISTANT, USER]}, turns="each")
    assert [len(each.prompt) for each in found.rows] == [2, 6, 8]
    assert [each.answer for each in found.rows] == ["2", "2", None]
    assert "; answers are the assistant's turns" in found.lines[0]
    assert found.lines[1] == "3 prompts from 1 rows: every turn of an assistant has a prompt of its own"


def test_a_column_beside_a_conversation_is_what_graders_read() -> None:
    found = row({"messages": [USER, {"role": "assistant", "content": "one and one is 2"}], "answer": 2})
    assert (found.prompt, found.answer) == ([USER], "2")
    assert found.reply == {"role": "assistant", "content": "one and one is 2"}


@pytest.mark.parametrize(("value", "text"), [(7, "7"), (0.5, "0.5"), (True, "true"), (float("nan"), None), (None, None)])
def test_answers_that_are_numbers_are_their_text(value: Any, text: str | None) -> None:
    found = table({"prompt": "a", "answer": value})
    assert found.rows[0].answer == text
    assert found.lines[1:] == (["1 answers are numbers, taken as their text"] if text else [])


def test_text_parts_are_joined_and_images_refused_by_name() -> None:
    parts = [{"type": "text", "text": "look"}, {"type": "text", "text": "here"}]
    assert row({"messages": [{"role": "user", "content": parts}]}).prompt == [{"role": "user", "content": "look\nhere"}]
    image = [*parts, {"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(DataError, match=r"row 1, 'messages', message 1: holds a part of type 'image_url'.* remove the row"):
        row({"messages": [{"role": "user", "content": image}]})


def test_null_keys_are_absent_and_arguments_of_tool_calls_are_objects() -> None:
    call = {"id": None, "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}
    plain = {"tool_calls": None, "name": None}
    found = row(
        {
            "messages": [
                USER | plain,
                {"role": "assistant", "content": None, "tool_calls": [call], "name": None},
                {"role": "tool", "content": "2"} | plain,
                ASSISTANT | plain,
            ]
        }
    )
    assert found.prompt == [
        USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}],
        },
        {"role": "tool", "content": "2"},
    ]
    assert found.answer == "2"


def test_function_calls_of_sharegpt_are_tool_calls() -> None:
    conversation = [
        {"from": "human", "value": "1+1="},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "2", "weight": 1},
    ]
    found = row({"conversations": conversation})
    assert [message["role"] for message in found.prompt] == ["user", "assistant", "tool"]
    assert found.prompt[1]["tool_calls"][0]["function"]["name"] == "add"  # type: ignore[index]


@pytest.mark.parametrize(
    ("record", "columns", "message"),
    [
        ({"conversations": [{"from": "alien", "value": "a"}]}, {}, "message 1: from='alien' is none of human, user"),
        ({"conversations": [{"from": "human", "value": "a"}, {"role": "x"}]}, {}, "message 2: expected .* `from` and `value`"),
        ({"conversations": [{"from": "human", "value": None}]}, {}, "found null as value"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, {}, "message 2: expected .* `role` and `content`"),
        ({"messages": [USER, ASSISTANT | {"tool_calls": "x"}]}, {}, "tool_calls must be a list"),
        (
            {"messages": [USER, ASSISTANT | {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            {},
            "arguments of tool call 'f' are not JSON",
        ),
        ({"messages": [ASSISTANT]}, {}, "nothing comes before the assistant's turn; add the message"),
        ({"prompt": "a", "answer": ["b"]}, {}, "must be text, a number or chat messages, found list"),
        ({"prompt": "a", "tools": 3}, {}, "'tools': tools are a list"),
        ({"prompt": "a", "chat_template_kwargs": "x"}, {}, "arguments of the chat template are an object"),
        ({"prompt": "a", "system": 3}, {}, "'system' must be text, found int 3"),
    ],
)
def test_odd_rows_are_refused(record: dict[str, Any], columns: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        row(record, **columns)


# -------------------------------------------------------------------------------------------------------------- files

ROWS = [{"question": f"{n}+1=", "answer": str(n + 1), "when": None} for n in range(6)]
LINES = "".join(json.dumps(each) + "\n" for each in ROWS).encode()


def write_csv(path: Path, delimiter: str) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer", "when"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


@pytest.mark.parametrize("kind", ["file", "jsonl", "parquet"])
@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.ndjson", "a.json", "lines.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.zst"],
)
def test_a_file_is_read_by_its_name(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write = {
        "a.json": lambda: path.write_text(json.dumps(ROWS, indent=1)),
        "a.csv": lambda: write_csv(path, ","),
        "a.tsv": lambda: write_csv(path, "\t"),
        "a.parquet": lambda: pq.write_table(pa.Table.from_pylist(ROWS), path),
        "a.jsonl.gz": lambda: path.write_bytes(gzip.compress(LINES)),
        "a.jsonl.bz2": lambda: path.write_bytes(bz2.compress(LINES)),
        "a.jsonl.zst": lambda: path.write_bytes(pa.Codec("zstd").compress(LINES, asbytes=True)),
    }
    write.get(name, lambda: path.write_bytes(LINES))()
    data = load({"type": kind, "path": str(path)}, None, heldout_size=2)
    assert [prompt.text for prompt in data.train] == [f"{n}+1=" for n in range(4)]
    assert [prompt.answer for prompt in data.heldout] == ["5", "6"]


def test_a_name_that_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "train.data"
    path.write_bytes(LINES)
    assert len(load({"type": "jsonl", "path": str(path)}, None, heldout_size=1).train) == 5
    with pytest.raises(DataError, match=r"train\.data: cannot tell its format; give a name that ends in one of \.jsonl"):
        load({"type": "file", "path": str(path)}, None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"prompt": "a"}, 3]', r"a\.json item 2: expected a JSON object, found int 3"),
        ("a.json", b'[{"prompt": "a"},\n {', r"a\.json: not valid JSON: .* line 2"),
        ("a.csv", b"prompt,answer\na,b\nc,d,e\n", r"a\.csv line 3: 1 values more than the header"),
        ("a.csv", b'prompt,answer\n"a,b\n', r"a\.csv line \d: not CSV in UTF-8"),
        ("a.csv", b"prompt,answer\n\xff,b\n", r"not CSV in UTF-8"),
        ("a.jsonl.gz", b"plain", r"a\.jsonl\.gz: cannot be decompressed"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-20], r"a\.jsonl\.gz"),
    ],
)
def test_damaged_files_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load({"type": "file", "path": str(tmp_path / name)}, None, heldout_size=1)


def test_csv_holds_conversations_as_json_and_keeps_texts_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["messages", "answer"])
        writer.writerows(
            [[json.dumps([{"role": "user", "content": "line\nline, two"}]), answer] for answer in ("007", "", "1.0")]
        )
    data = load({"type": "file", "path": str(path)}, heldout_size=1)
    assert [prompt.answer for prompt in [*data.train, *data.heldout]] == ["007", None, "1.0"]
    assert data.train[0].text == "[user]line\nline, two<eos>[assistant]"


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.jsonl").write_bytes(LINES)
    assert len(load({"type": "jsonl", "path": "~/mine.jsonl"}, None, heldout_size=1).train) == 5
    with pytest.raises(ConfigError, match=r"give the path without `~`"):
        load({"type": "jsonl", "path": "~nobody-of-that-name/mine.jsonl"}, None)


def test_only_the_needed_columns_of_parquet_are_read(tmp_path: Path) -> None:
    """A date beyond Python's beside the prompts does no harm, and is listed as not used."""
    far = pa.array([2**62] * 4, pa.timestamp("us"))
    with pytest.raises((OverflowError, ValueError)):
        far.to_pylist()
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b", "c", "d"], "when": far}), path)
    data = load({"type": "parquet", "path": str(path)}, None, heldout_size=1)
    assert data.lines[0].endswith("not used: when")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as Parquet"):
        load({"type": "parquet", "path": str(path), "prompt_column": "when"}, None, heldout_size=1)
    pq.write_table(pa.table({"text": ["a"], "when": far[:1]}), path)
    with pytest.raises(DataError, match=r"it has columns text, when; set data\.prompts\.prompt_column"):
        load({"type": "parquet", "path": str(path)}, None)
    pq.write_table(pa.table({"when": pa.array([datetime(2026, 1, 1)])}), path)
    with pytest.raises(DataError, match=r"it has columns when"):
        load({"type": "parquet", "path": str(path)}, None)


def test_a_dataset_that_is_a_program_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text("raise SystemExit")
    with pytest.raises(DataError, match=r"data\.prompts\.split=train: .*could not be loaded"):
        load({"type": "hub", "name": str(tmp_path / "set")}, None)


# ----------------------------------------------------------------------------------------------- split and duplicates


@pytest.mark.parametrize(("count", "held"), [(5, 1), (80, 16), (1279, 255), (1280, 256), (3000, 256)])
def test_the_default_split_shrinks_with_the_file(count: int, held: int) -> None:
    data = load({"type": "iterable"}, None, [str(n) for n in range(count)])
    assert (len(data.train), len(data.heldout)) == (count - held, held)
    said = f"held out: {held} of {count} prompts, a fifth, since data.heldout_size is not set"
    assert (said in data.lines) == (held < 256)


def test_a_conversation_is_not_split_between_training_and_held_out() -> None:
    talk = [USER, ASSISTANT] * 3
    data = load({"type": "iterable"}, handed=[{"messages": talk}] * 3, turns="each", heldout_size=2)
    assert [prompt.prompt_id for prompt in data.heldout] == [7, 8]
    assert [prompt.prompt_id for prompt in data.train] == [0, 1, 2, 3, 4, 5], "turn 6 begins the conversation that is held out"
    with pytest.raises(DataError, match="no whole conversation to train on"):
        load({"type": "iterable"}, handed=[{"messages": talk}], turns="each", heldout_size=1)


def test_duplicates_are_counted_and_kept() -> None:
    data = load({"type": "iterable"}, None, ["a", "b", "a", "a", "c", "b"], heldout_size=1)
    assert len(data.train) == 5
    assert data.lines[-2:] == (
        "duplicates: 2 of 5 training prompts repeat another (3 are different)",
        "duplicates: 1 of 1 held-out prompts are also trained on",
    )


# ---------------------------------------------------------------------------------------- system prompt and arguments


def test_a_system_prompt_stands_before_prompts_that_have_none() -> None:
    rows = [{"messages": [USER]}, {"messages": [USER, ASSISTANT]}, {"messages": [SYSTEM, USER]}]
    data = load({"type": "iterable"}, handed=rows, system_prompt="think", heldout_size=1)
    assert [prompt.text for prompt in data.train] == ["[system]think<eos>[user]1+1=<eos>[assistant]"] * 2
    assert data.heldout[0].text == "[system]be brief<eos>[user]1+1=<eos>[assistant]"
    with pytest.raises(DataError, match=r"chat messages need a chat template.*data\.chat_template_file"):
        load({"type": "iterable"}, None, ["a", "b"], system_prompt="think", heldout_size=1)
    with pytest.raises(ConfigError, match="system_prompt needs a chat template"):
        load({"type": "iterable"}, None, ["a", "b"], system_prompt="think", chat_template="never")


def test_arguments_of_the_template_and_of_a_row() -> None:
    given: list[dict[str, bool] | None] = [None, {"think": False}, None]
    rows = [{"prompt": "a", "chat_template_kwargs": kwargs} for kwargs in given]
    data = load({"type": "iterable"}, handed=rows, chat_template_kwargs={"think": True}, heldout_size=1)
    assert [prompt.text for prompt in data.train] == ["[user]a<eos>[assistant](thinking)", "[user]a<eos>[assistant]"]
    with pytest.raises(DataError, match=r"data\.chat_template_kwargs\.thinkng: .* never reads it"):
        load({"type": "iterable"}, handed=rows, chat_template_kwargs={"thinkng": True}, heldout_size=1)
    with pytest.raises(DataError, match=r"data\.chat_template_kwargs\.messages: given by the data"):
        load({"type": "iterable"}, handed=rows, chat_template_kwargs={"messages": []}, heldout_size=1)
    with pytest.raises(DataError, match=r"prompts\[1\]: has think for a chat template, and its prompt is a text"):
        load({"type": "iterable"}, None, rows, heldout_size=1)


def test_tools_and_their_calls_render_through_the_template() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]}
    record = {"messages": [USER, call, {"role": "tool", "content": "2"}, ASSISTANT], "tools": json.dumps([{"name": "add"}])}
    data = load({"type": "iterable"}, handed=[record] * 2, heldout_size=1)
    assert data.train[0].text == (
        '[tools][{"name": "add"}][user]1+1=<eos>[assistant]<add {"a": 1}><eos>[tool]2<eos>[assistant]'
    )


def test_weights_of_turns_are_not_sent_to_endpoints() -> None:
    talk = [USER, ASSISTANT | {"weight": 0}, USER]
    data = load({"type": "iterable"}, handed=[{"messages": talk}] * 2, heldout_size=1)
    request = SampleRequest(0, 0, data.train[0].token_ids, 1.0, 0, 4)
    tokenizer = task_tokenizer()
    tokenizer.chat_template = TEMPLATE
    assert asked_text(config_of({"type": "iterable"}), tokenizer, data.train, chat=True)(request) == [USER, ASSISTANT, USER]
