"""Prompt sources, refusals that name the place, the held-out split, chat templates and the resumable order."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import processors

from kdray.config import Config, parse_config
from kdray.data.dataset import Dataset, PromptStream, encode_answer, load_dataset, question_encoder, response_encoder
from kdray.errors import ConfigError, DataError
from kdray.models.resolve import task_tokenizer
from kdray.types import Prompt

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def _config(prompts: dict[str, Any], **data: Any) -> Config:
    settings = {"prompts": prompts, "heldout_size": 2, **data}
    tiny = {"type": "tiny"}
    return parse_config(
        {"run": {"name": "r"}, "data": settings, "student": {"model": tiny}, "teachers": {"t": {"model": tiny}}}
    )


def _jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _questions(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"question": f"what is {i}?", "answer": f"it is {i}"} for i in range(start, start + count)]


def _load(prompts: dict[str, Any], tokenizer: Any = None, handed: Any = None, **data: Any) -> Dataset:
    return load_dataset(_config(prompts, **data), tokenizer or task_tokenizer(), handed)


def _texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


# ------------------------------------------------------------------------------------------------------- sources


def test_task_prompts_are_graded_and_held_out_apart() -> None:
    source = {"type": "task", "tasks": ["arithmetic"], "difficulty": 1, "size": 70}
    data = _load(source, heldout_size=30)
    assert (len(data.train), len(data.heldout), data.dropped) == (70, 30, 0)
    assert len({*_texts(data.train), *_texts(data.heldout)}) == 100
    assert sorted(prompt.prompt_id for prompt in data.train + data.heldout) == list(range(100))
    assert data.grade is not None
    prompt = data.train[0]
    assert prompt.answer is not None
    assert data.grade(prompt, f"{prompt.answer} ")
    assert not data.grade(prompt, "x")
    again = _load(source, heldout_size=30)
    assert _texts(again.train) == _texts(data.train)
    smaller = _load({**source, "size": 10}, heldout_size=30)
    assert _texts(smaller.heldout) == _texts(data.heldout), "what is measured depends on how much is trained on"
    with pytest.raises(DataError, match="100 different prompts"):
        _load(source, heldout_size=31)


def test_labelled_task_prompts_are_those_of_a_smaller_source_and_the_others_have_no_answer() -> None:
    source = {"type": "task", "tasks": ["arithmetic"], "difficulty": 2, "size": 12}
    few, many = _load(source), _load({**source, "size": 50, "labelled": 12})
    labelled = [prompt for prompt in many.train if prompt.has_reference]
    assert [(prompt.text, prompt.answer) for prompt in labelled] == [(prompt.text, prompt.answer) for prompt in few.train]
    assert len(many.train) == len(set(_texts(many.train))) == 50
    assert not set(_texts(many.train)) & set(_texts(many.heldout))
    assert all(prompt.answer is not None for prompt in many.heldout), "held-out prompts cannot be graded"
    with pytest.raises(ConfigError, match=r"labelled=51 is more than data\.prompts\.size=50; lower it"):
        _load({**source, "size": 50, "labelled": 51})


def test_jsonl_columns_ids_and_split(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "a.jsonl", _questions(5))
    data = _load({"type": "jsonl", "path": str(path)})
    assert _texts(data.train) == ["what is 0?", "what is 1?", "what is 2?"]
    assert [prompt.prompt_id for prompt in data.heldout] == [3, 4]
    assert data.heldout[1].answer == "it is 4"
    assert data.grade is None
    token_ids = data.train[0].token_ids
    assert token_ids.dtype == np.int32
    assert task_tokenizer().decode(token_ids) == "what is 0?"
    swapped = _load({"type": "jsonl", "path": str(path), "prompt_column": "answer", "answer_column": "question"})
    assert (swapped.train[0].text, swapped.train[0].answer) == ("it is 0", "what is 0?")


def test_a_heldout_file_gives_its_first_prompts_under_ids_of_their_own(tmp_path: Path) -> None:
    train, heldout = _jsonl(tmp_path / "a.jsonl", _questions(3)), _jsonl(tmp_path / "b.jsonl", _questions(4, 10))
    data = _load({"type": "jsonl", "path": str(train), "heldout_path": str(heldout)})
    assert len(data.train) == 3
    assert _texts(data.heldout) == ["what is 10?", "what is 11?"]
    assert [prompt.prompt_id for prompt in data.heldout] == [3, 4]
    (left_out,) = data.left_out
    assert (left_out.reason, left_out.count) == ("beyond_heldout_size", 2)
    assert _load({"type": "jsonl", "path": str(train), "heldout_path": str(heldout)}, heldout_size=4).left_out == ()


def test_turns_before_a_held_out_one_are_left_out_and_told(tmp_path: Path) -> None:
    turns = [{"role": role, "content": text} for text in "abc" for role in ("user", "assistant")]
    path = _jsonl(tmp_path / "a.jsonl", [{"messages": turns}] * 2)
    data = _load({"type": "jsonl", "path": str(path)}, _chat_tokenizer(), turns="each", heldout_size=1)
    (left_out,) = data.left_out
    assert len(data.train) + len(data.heldout) + left_out.count == 6
    assert (left_out.reason, left_out.count) == ("same_conversation", 2)
    assert left_out.words.endswith(f"(data.turns=each): {path} line 2")
    assert [kind for kind, _ in data.events()][-1] == "rows_dropped"


def test_a_folder_of_parquet_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name, start in (("b", 3), ("a", 0)):
        pq.write_table(pa.Table.from_pylist(_questions(3, start)), tmp_path / f"{name}.parquet")
    data = _load({"type": "parquet", "path": str(tmp_path)})
    assert _texts(data.train + data.heldout) == [f"what is {i}?" for i in range(6)]
    single = _load({"type": "parquet", "path": str(tmp_path / "b.parquet")})
    assert single.train[0].text == "what is 3?"
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as Parquet"):
        _load({"type": "parquet", "path": str(tmp_path)})
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"holds no \.parquet file"):
        _load({"type": "parquet", "path": str(tmp_path / "none")})


def test_hub_splits_and_what_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The `datasets` library reads a local folder by the same call as a dataset of the hub."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    _jsonl(folder / "train.jsonl", _questions(4))
    _jsonl(folder / "test.jsonl", _questions(3, 10))
    data = _load({"type": "hub", "name": str(folder)})
    assert (_texts(data.train), _texts(data.heldout)) == (
        ["what is 0?", "what is 1?"],
        ["what is 2?", "what is 3?"],
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    data = _load({"type": "hub", "name": "~/set", "heldout_split": "test"})
    assert len(data.train) == 4
    assert _texts(data.heldout) == ["what is 10?", "what is 11?"]
    with pytest.raises(DataError, match=r"heldout_split=validation: .*could not be loaded"):
        _load({"type": "hub", "name": str(folder), "heldout_split": "validation"})
    with pytest.raises(DataError, match=r"^data\.prompts\.name=/no/such/dataset: there is no such folder"):
        _load({"type": "hub", "name": "/no/such/dataset"})


def test_iterables_of_texts_and_rows() -> None:
    def handed() -> Iterator[Any]:
        yield from ["one", {"prompt": "two", "answer": "2"}, "three", "four"]

    data = _load({"type": "iterable"}, handed=handed())
    assert _texts(data.train + data.heldout) == ["one", "two", "three", "four"]
    rows = _load({"type": "iterable"}, handed=_questions(3))
    assert rows.train[0].answer == "it is 0"
    with pytest.raises(DataError, match=r"prompts\[1\]: expected a text or a dict, found int 7"):
        _load({"type": "iterable"}, handed=["a", 7])
    with pytest.raises(DataError, match="pass prompts="):
        _load({"type": "iterable"})
    with pytest.raises(DataError, match=r"set data\.prompts\.type=iterable"):
        _load({"type": "task"}, handed=["a"])


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt": \n', {}, r"line 2: not valid JSON: .* at column"),
        (b'{"prompt": "a"}\n\n["b"]\n', {}, r"line 3: expected a JSON object, found list"),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', {}, r"line 2: not UTF-8"),
        (b"", {}, r"empty, no prompts"),
        (b"\n \n", {}, r"empty, no prompts"),
        (b'{"text": "a", "label": 1}\n', {}, r"has columns text, label; set data\.prompts\.prompt_column"),
        (b'{"text": "a"}\n', {"prompt_column": "body"}, r"data\.prompts\.prompt_column=body: .* columns text"),
        (b'{"prompt": "a"}\n', {"answer_column": "gold"}, r"data\.prompts\.answer_column=gold: .* columns prompt"),
        (b'{"prompt": "a"}\n{"question": "b"}\n', {}, r"line 2: no 'prompt'"),
        (b'{"prompt": "a"}\n{"prompt": 3}\n', {}, r"line 2, 'prompt': .*found int 3"),
        (b'{"prompt": null}\n', {}, r"line 1, 'prompt': .*found null"),
        (b'{"prompt": "a"}\n{"prompt": " \\n"}\n', {}, r"line 2, 'prompt': the prompt is blank"),
        (b'{"prompt": "a", "answer": [3]}\n', {}, r"line 1: the answer in 'answer' must be text, a number or .*, found list"),
        (b'{"prompt": "a", "gold": null}\n', {"answer_column": "gold"}, r"line 1: no answer in 'gold'"),
        (b'{"messages": []}\n', {}, r"list of chat messages is empty"),
        (b'{"messages": [{"role": "user"}]}\n', {}, r"message 1: expected an object with texts `role` and `content`"),
        (b'{"messages": [{"role": "assistant", "content": "b"}]}\n', {}, r"nothing comes before the assistant's turn"),
    ],
)
def test_a_bad_file_is_refused_by_line_and_reason(
    content: bytes, settings: dict[str, str], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        _load({"type": "jsonl", "path": str(path), **settings})
    assert "p.jsonl" in str(caught.value)


def test_missing_files_are_named_with_their_setting(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.prompts\.path=.*none\.jsonl: no such file"):
        _load({"type": "jsonl", "path": str(tmp_path / "none.jsonl")})
    path = _jsonl(tmp_path / "a.jsonl", _questions(3))
    with pytest.raises(DataError, match=r"data\.prompts\.heldout_path=.*none\.jsonl: no such file"):
        _load({"type": "jsonl", "path": str(path), "heldout_path": str(tmp_path / "none.jsonl")})
    with pytest.raises(DataError, match="is a folder"):
        _load({"type": "jsonl", "path": str(tmp_path)})


def test_an_answer_may_be_missing_where_its_column_was_not_asked_for(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "b"}, {"prompt": "c"}, *[{"prompt": "d"}] * 2])
    data = _load({"type": "jsonl", "path": str(path)})
    assert [prompt.answer for prompt in data.train] == ["b", None]


def test_a_split_that_leaves_nothing_to_train_on_is_refused_with_numbers(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "a.jsonl", _questions(4))
    with pytest.raises(DataError, match=r"data\.heldout_size=4 of 4 prompts leaves none to train on"):
        _load({"type": "jsonl", "path": str(path)}, heldout_size=4)
    assert len(_load({"type": "jsonl", "path": str(path)}, heldout_size=3).train) == 1


def test_long_prompts_are_refused_or_dropped_and_never_cut(tmp_path: Path) -> None:
    texts = ["x" * n for n in (8, 20, 10, 30, 9, 8)]
    path = _jsonl(tmp_path / "a.jsonl", [{"prompt": text} for text in texts])
    source = {"type": "jsonl", "path": str(path)}
    with pytest.raises(DataError) as caught:
        _load(source, max_prompt_tokens=10)
    message = str(caught.value)
    assert "data.max_prompt_tokens=10: 2 of 6 prompts are longer" in message
    assert "longest 30 tokens" in message
    assert "first prompt 1 (" in message
    assert "a.jsonl line 2" in message
    assert "data.too_long=drop" in message
    data = _load(source, max_prompt_tokens=10, too_long="drop")
    assert data.dropped == 2
    (left_out,) = data.left_out
    assert (left_out.reason, left_out.count) == ("too_long", 2)
    assert left_out.words.endswith("more than data.max_prompt_tokens=10 tokens, the first: " + f"{path} line 2")
    assert [prompt.prompt_id for prompt in data.train + data.heldout] == [0, 2, 4, 5], "ids move when rows are dropped"
    assert all(len(prompt.token_ids) == len(prompt.text) for prompt in data.train + data.heldout)
    with pytest.raises(DataError, match=r"heldout_size=2 of 0 prompts \(6 more are too long\)"):
        _load(source, max_prompt_tokens=1, too_long="drop")
    other = _jsonl(tmp_path / "b.jsonl", [{"prompt": "x" * 50}])
    with pytest.raises(DataError, match="all 1 held-out prompts are longer"):
        _load({**source, "heldout_path": str(other)}, max_prompt_tokens=30, too_long="drop")


# ------------------------------------------------------------------------------------------- template and tokens


def _chat_tokenizer() -> Any:
    tokenizer = task_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}, {"role": "user", "content": "?"}]


@pytest.mark.parametrize(
    ("setting", "with_template", "text"),
    [
        ("auto", True, "[user]hello[assistant]"),
        ("auto", False, "hello"),
        ("never", True, "hello"),
        ("always", True, "[user]hello[assistant]"),
    ],
)
def test_when_a_text_is_wrapped(setting: str, with_template: bool, text: str) -> None:
    tokenizer = _chat_tokenizer() if with_template else task_tokenizer()
    data = _load({"type": "iterable"}, tokenizer, ["hello"] * 3, chat_template=setting)
    assert data.train[0].text == text
    assert tokenizer.decode(data.train[0].token_ids) == text


def test_messages_always_need_a_template() -> None:
    data = _load({"type": "iterable"}, _chat_tokenizer(), [{"messages": MESSAGES}] * 3, chat_template="never")
    assert data.train[0].text == "[user]hi[assistant]yo[user]?[assistant]"
    with pytest.raises(DataError, match=r"prompts\[0\]: chat messages need a chat template"):
        _load({"type": "iterable"}, task_tokenizer(), [{"messages": MESSAGES}] * 3)
    with pytest.raises(DataError, match=r"data\.chat_template=always"):
        _load({"type": "iterable"}, task_tokenizer(), ["a"] * 3, chat_template="always")
    system = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    with pytest.raises(DataError, match=r"prompts\[0\]: the student's chat template refuses .*no system role"):
        _load({"type": "iterable"}, _chat_tokenizer(), [{"messages": system}] * 3)


def _bracketing(tokenizer: Any) -> Any:
    """A tokenizer that opens every text with <pad>, as others do with <bos>, and closes it with <eos>."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A <eos>", special_tokens=[("<pad>", 0), ("<eos>", 1)]
    )
    return tokenizer


def test_raw_text_keeps_the_opening_token_but_never_an_end_of_sequence() -> None:
    data = _load({"type": "iterable"}, _bracketing(task_tokenizer()), ["ab"] * 3)
    assert data.train[0].token_ids.tolist() == [0, *task_tokenizer()("ab")["input_ids"]]


def test_templated_text_gets_no_second_set_of_special_tokens() -> None:
    tokenizer = _bracketing(_chat_tokenizer())
    data = _load({"type": "iterable"}, tokenizer, ["ab"] * 3)
    assert tokenizer.decode(data.train[0].token_ids) == "[user]ab[assistant]"


def test_answers_end_with_end_of_sequence_and_have_no_other_special_token() -> None:
    tokenizer = _bracketing(task_tokenizer())
    prompt = Prompt(7, np.array([5], np.int32), "a", "yes")
    encoded = encode_answer(tokenizer, prompt)
    assert encoded.dtype == np.int32
    assert tokenizer.decode(encoded) == "yes<eos>"
    with pytest.raises(DataError, match="prompt 7 has no reference answer"):
        encode_answer(tokenizer, Prompt(7, prompt.token_ids))


# --------------------------------------------------------------------------------------------------------- order


def _prompts(count: int) -> list[Prompt]:
    return [Prompt(index, np.array([index], np.int32)) for index in range(count)]


def test_every_epoch_is_another_permutation() -> None:
    stream = PromptStream(_prompts(50), seed=3)
    epochs = [[stream.at(epoch * 50 + i).prompt_id for i in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(50))
    assert Counter(tuple(epoch) for epoch in epochs).most_common(1)[0][1] == 1


def test_a_position_alone_decides_the_prompt() -> None:
    stream = PromptStream(_prompts(20), seed=3)
    forward = [stream.at(position).prompt_id for position in range(100)]
    resumed = PromptStream(_prompts(20), seed=3)
    order = np.random.default_rng(0).permutation(100)
    assert [resumed.at(int(position)).prompt_id for position in order] == [forward[position] for position in order]
    assert [PromptStream(_prompts(20), seed=4).at(position).prompt_id for position in range(100)] != forward


def test_a_stream_refuses_what_has_no_prompt() -> None:
    with pytest.raises(DataError, match="no training prompts"):
        PromptStream([], seed=0)
    with pytest.raises(ValueError, match="position=-1"):
        PromptStream(_prompts(2), seed=0).at(-1)


# ----------------------------------------------------------------------------------------- several tasks, a prefix


def test_transfer_tasks_are_held_out_alone_and_weights_are_shares_of_training() -> None:
    source = {
        "type": "task",
        "tasks": ["arithmetic", "last_letters"],
        "weights": {"arithmetic": 3, "last_letters": 1},
        "transfer_tasks": ["coin_flip"],
        "size": 80,
    }
    data = _load(source, heldout_size=30)
    assert Counter(prompt.domain for prompt in data.train) == {"arithmetic": 60, "last_letters": 20}
    assert Counter(prompt.domain for prompt in data.heldout) == {"arithmetic": 10, "last_letters": 10, "coin_flip": 10}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"weights": {"coin_flip": 1}}, "data.prompts.weights names coin_flip, but there are last_letters"),
        ({"weights": {"last_letters": 0}}, "data.prompts.weights: all are 0"),
        ({"transfer_tasks": ["last_letters"]}, "transfer_tasks: last_letters would be trained on"),
    ],
)
def test_shares_that_make_no_sense_are_refused(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _config({"type": "task", **source})


def test_a_prefix_stands_before_every_question(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "user", "content": "q"}]
    rows = [{"prompt": "a"}, {"prompt": messages}, {"prompt": "b"}]
    tokenizer = _chat_tokenizer()
    source = {"type": "jsonl", "path": str(_jsonl(tmp_path / "p.jsonl", rows))}
    data = _load(source, tokenizer, heldout_size=1, chat_template="never", prefix="[label] ")
    assert _texts(data.train) == ["[label] a", "[user]hi[user][label] q[assistant]"]
    assert _texts(data.heldout) == ["[label] b"]
    assert data.train[0].token_ids.tolist() == tokenizer("[label] a")["input_ids"]


def test_a_question_is_encoded_as_a_prompt_is_at_any_length() -> None:
    config = _config({"type": "task"}, max_prompt_tokens=4, chat_template="always")
    prompt = question_encoder(config, _chat_tokenizer())("what is this?")
    assert prompt.text == "[user]what is this?[assistant]"
    assert prompt.token_ids.tolist() == _chat_tokenizer()(prompt.text)["input_ids"]


def test_a_response_that_looks_like_a_special_token_does_not_end_there() -> None:
    tokenizer = task_tokenizer()
    token_ids = response_encoder(tokenizer)("a<eos>b")
    assert token_ids.count(tokenizer.eos_token_id) == 1
    assert token_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(token_ids[:-1]) == "a<eos>b"
