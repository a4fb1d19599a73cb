"""Loss masks of conversations under the structures of real chat templates, token by token; system messages, thinking, refusals.

The templates are short ones of ours that put messages together as the named families do. The expected pieces are written out by
hand: (text, whether the assistant wrote it). No piece of the expectation comes from the code under test.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kdray.config import parse_config
from kdray.data.chat import ChatTemplate
from kdray.data.dataset import Dataset, encode_answer, load_dataset
from kdray.data.references import encode_pieces
from kdray.errors import DataError
from kdray.types import Prompt

SPECIAL = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>", "[INST]", "[/INST]", "<bos>", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|U|>", "<|A|>",
    "<|end_of_sentence|>", "<|START|>", "<|USER|>", "<|CHATBOT|>", "<|SYSTEM|>", "<|END|>",
]  # fmt: skip
TEXT = (
    "The assistant answers the question of the user in a few words.\n\nuser\nWhat is two plus two?\nassistant\nIt is four.\n\n"
    "<think>\n\n</think>\n\nUser: hello there\nAssistant: hi, how are you today?\n system: be brief and kind\n\n\n"
) * 20


@pytest.fixture(scope="module")
def backend() -> str:
    """A byte-level BPE, trained on a few kB, that has merged line feeds and leading spaces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return str(tokenizer.to_str())


def tokenizer_of(backend: str, template: str | None, eos: str) -> Any:
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend), eos_token=eos, bos_token="<s>")
    made.chat_template = template
    return made


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nbe kind<|im_end|>\n{% endif %}" + CHATML
LLAMA3 = (
    "<|begin_of_text|>"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "<s>{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}{% else %}"
    "{% set system = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}[INST] "
    "{% if loop.first and system %}{{ system }}\n\n{% endif %}{{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }}</s>{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "<bos>{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
DEEPSEEK = (
    "<s>{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}<|U|>{{ m.content }}"
    "{% else %}<|A|>{{ m.content.split('</think>')[-1] }}<|end_of_sentence|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|A|>{% if thinking %}<think>\n{% endif %}{% endif %}"
)
COMMAND_R = (
    "<s>{% for m in messages %}<|START|>{% if m.role == 'assistant' %}<|CHATBOT|>{% elif m.role == 'user' %}<|USER|>{% else %}"
    "<|SYSTEM|>{% endif %}{{ m.content | trim }}<|END|>{% endfor %}"
    "{% if add_generation_prompt %}<|START|><|CHATBOT|>{% endif %}"
)
QWEN3 = (
    "{% set last = namespace(user=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > last.user %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n"
    "</think>\n\n{% endif %}{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)

SYSTEM = {"role": "system", "content": "be brief"}
TALK = [
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "hi, how are you?"},
    {"role": "user", "content": "two plus two?"},
    {"role": "assistant", "content": "It is four."},
]
Pieces = list[tuple[str, bool]]


def chatml(*turns: tuple[str, str]) -> Pieces:
    pieces: Pieces = []
    for role, content in turns:
        wrote = role == "assistant"
        pieces += [(f"<|im_start|>{role}\n", False), (f"{content}<|im_end|>", wrote), ("\n", False)]
    return pieces


TURNS = [(message["role"], message["content"]) for message in TALK]
H, F = "hi, how are you?", "It is four."

CASES: list[tuple[str, str, str, list[dict[str, str]], Pieces]] = [
    ("ChatML", CHATML, "<|im_end|>", TALK, chatml(*TURNS)),
    ("ChatML with a system message", CHATML, "<|im_end|>", [SYSTEM, *TALK], chatml(("system", "be brief"), *TURNS)),
    ("ChatML of a base model", CHATML, "<|endoftext|>", TALK, chatml(*TURNS)),
    ("ChatML with a default system message", DEFAULT_SYSTEM, "<|im_end|>", TALK, chatml(("system", "be kind"), *TURNS)),
    ("ChatML with generation marks", MARKED, "<|im_end|>", TALK, chatml(*TURNS)),
    (
        "Llama 3",
        LLAMA3,
        "<|eot_id|>",
        [SYSTEM, *TALK],
        [
            ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nbe brief<|eot_id|>", False),
            ("<|start_header_id|>user<|end_header_id|>\n\nhello there<|eot_id|>", False),
            ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
            (f"{H}<|eot_id|>", True),
            ("<|start_header_id|>user<|end_header_id|>\n\ntwo plus two?<|eot_id|>", False),
            ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
            (f"{F}<|eot_id|>", True),
        ],
    ),
    (
        "Mistral",
        MISTRAL,
        "</s>",
        TALK,
        [
            ("<s>[INST] hello there [/INST]", False),
            (f" {H}</s>", True),
            ("[INST] two plus two? [/INST]", False),
            (f" {F}</s>", True),
        ],
    ),
    (
        "Mistral with a system message",
        MISTRAL,
        "</s>",
        [SYSTEM, *TALK],
        [
            ("<s>[INST] be brief\n\nhello there [/INST]", False),
            (f" {H}</s>", True),
            ("[INST] two plus two? [/INST]", False),
            (f" {F}</s>", True),
        ],
    ),
    (
        "Gemma",
        GEMMA,
        "</s>",
        TALK,
        [
            ("<bos><start_of_turn>user\nhello there<end_of_turn>\n<start_of_turn>model\n", False),
            (f"{H}<end_of_turn>", True),
            ("\n<start_of_turn>user\ntwo plus two?<end_of_turn>\n<start_of_turn>model\n", False),
            (f"{F}<end_of_turn>", True),
        ],
    ),
    (
        "Phi, which closes a conversation with an end of sequence",
        PHI,
        "<|endoftext|>",
        [SYSTEM, *TALK],
        [
            ("<|system|>\nbe brief<|end|>\n<|user|>\nhello there<|end|>\n<|assistant|>\n", False),
            (f"{H}<|end|>", True),
            ("\n<|user|>\ntwo plus two?<|end|>\n<|assistant|>\n", False),
            (f"{F}<|end|>", True),
        ],
    ),
    (
        "Zephyr, whose roles are plain text",
        ZEPHYR,
        "</s>",
        [SYSTEM, *TALK],
        [
            ("<|system|>\nbe brief</s>\n<|user|>\nhello there</s>\n<|assistant|>\n", False),
            (f"{H}</s>", True),
            ("\n<|user|>\ntwo plus two?</s>\n<|assistant|>\n", False),
            (f"{F}</s>", True),
        ],
    ),
    (
        "DeepSeek",
        DEEPSEEK,
        "<|end_of_sentence|>",
        [SYSTEM, *TALK],
        [
            ("<s>be brief<|U|>hello there<|A|>", False),
            (f"{H}<|end_of_sentence|>", True),
            ("<|U|>two plus two?<|A|>", False),
            (f"{F}<|end_of_sentence|>", True),
        ],
    ),
    (
        "Command R",
        COMMAND_R,
        "<|END|>",
        [SYSTEM, *TALK],
        [
            ("<s><|START|><|SYSTEM|>be brief<|END|><|START|><|USER|>hello there<|END|><|START|><|CHATBOT|>", False),
            (f"{H}<|END|>", True),
            ("<|START|><|USER|>two plus two?<|END|><|START|><|CHATBOT|>", False),
            (f"{F}<|END|>", True),
        ],
    ),
    (
        "no special token at all",
        PLAIN,
        "</s>",
        TALK,
        [
            ("User: hello there\nAssistant: ", False),
            (H, True),
            ("\nUser: two plus two?\nAssistant: ", False),
            # Where the template does not end a turn, the last one gets the end of sequence.
            (f"{F}</s>", True),
        ],
    ),
]


def load(tokenizer: Any, messages: list[dict[str, Any]], **data: Any) -> Dataset:
    tiny = {"type": "tiny"}
    config = parse_config(
        {
            "run": {"name": "r"},
            "data": {"prompts": {"type": "iterable"}, "heldout_size": 1, **data},
            "student": {"model": tiny},
            "teachers": {"t": {"model": tiny}},
        }
    )
    return load_dataset(config, tokenizer, [{"messages": messages}] * 3, references=True)


def expected(tokenizer: Any, pieces: Pieces) -> list[tuple[int, bool]]:
    """(id, whether it counts) of every token up to the last one that counts; context that meets context is one text."""
    joined: Pieces = []
    for text, wrote in pieces:
        if joined and joined[-1][1] == wrote:
            joined[-1] = (joined[-1][0] + text, wrote)
        else:
            joined.append((text, wrote))
    while not joined[-1][1]:
        joined.pop()
    return [(token, wrote) for text, wrote in joined for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def counted(prompt: Prompt) -> list[tuple[int, bool]]:
    assert prompt.reference is not None
    context = [(int(token), False) for token in prompt.reference.prompt_ids]
    return context + [
        (int(token), bool(flag)) for token, flag in zip(prompt.reference.token_ids, prompt.reference.is_target, strict=True)
    ]


@pytest.mark.parametrize(("template", "eos", "messages", "pieces"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_the_tokens_that_count_are_exactly_the_assistants(
    backend: str, template: str, eos: str, messages: list[dict[str, str]], pieces: Pieces
) -> None:
    tokenizer = tokenizer_of(backend, template, eos)
    whole = load(tokenizer, messages, turns="all").train[0]
    assert counted(whole) == expected(tokenizer, pieces)
    # The last turn alone: the same row, with the earlier turns as context.
    last = load(tokenizer, messages).train[0]
    final = max(index for index, (_, wrote) in enumerate(pieces) if wrote)
    alone = [(text, wrote and index == final) for index, (text, wrote) in enumerate(pieces)]
    assert counted(last) == expected(tokenizer, alone)
    assert last.reference is not None
    assert last.reference.prompt_ids.tolist() == last.token_ids.tolist(), "a response follows other tokens than the answer"
    assert encode_answer(tokenizer, last).tolist() == encode_answer(tokenizer, whole).tolist()
    assert tokenizer.decode(encode_answer(tokenizer, last)) == pieces[final][0]
    # Every turn as a prompt of its own gives the same prompts as a conversation that ends there.
    each = load(tokenizer, messages, turns="each").train
    shorter = load(tokenizer, messages[:-2]).train[0]
    assert counted(each[0]) == counted(shorter)
    assert counted(each[1]) == counted(last)


def test_a_row_in_the_order_of_its_ids_is_the_rendered_text(backend: str) -> None:
    tokenizer = tokenizer_of(backend, CHATML, "<|im_end|>")
    prompt = load(tokenizer, TALK, turns="all").train[0]
    ids = [token for token, _ in counted(prompt)]
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode(ids) + "\n" == text
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"][:-1]


def test_a_weight_of_zero_makes_a_turn_context(backend: str) -> None:
    tokenizer = tokenizer_of(backend, CHATML, "<|im_end|>")
    silent = [TALK[0], TALK[1] | {"weight": 0}, *TALK[2:]]
    pieces = [(text, wrote and H not in text) for text, wrote in chatml(*TURNS)]
    assert counted(load(tokenizer, silent, turns="all").train[0]) == expected(tokenizer, pieces)


# --------------------------------------------------------------------------------------------------------- thinking

THOUGHT = [*TALK[:3], TALK[3] | {"reasoning_content": "two and two"}]


def test_thinking_blocks_of_the_last_turn_count_and_are_not_trained_where_history_drops_them(backend: str) -> None:
    tokenizer = tokenizer_of(backend, QWEN3, "<|im_end|>")
    last = load(tokenizer, THOUGHT).train[0]
    final = f"<think>\ntwo and two\n</think>\n\n{F}<|im_end|>"
    start = "<|im_start|>assistant\n"
    before: Pieces = [*chatml(*[(role, text) for role, text in TURNS[:3]]), (start, False)]
    before = [(text, False) for text, _ in before]
    assert counted(last) == expected(tokenizer, [*before, (final, True)])
    assert last.answer == F, "graders would read the thought"
    each = load(tokenizer, THOUGHT, turns="each").train
    first: Pieces = [
        ("<|im_start|>user\nhello there<|im_end|>\n" + start, False),
        (f"<think>\n\n</think>\n\n{H}<|im_end|>", True),
    ]
    assert counted(each[0]) == expected(tokenizer, first)
    with pytest.raises(DataError, match=r"prompts\[0\]: the chat template renders message 2 otherwise .* set data\.turns=each"):
        load(tokenizer, THOUGHT, turns="all")


def test_thinking_switched_off_is_part_of_the_prompt(backend: str) -> None:
    tokenizer = tokenizer_of(backend, QWEN3, "<|im_end|>")
    prompt = load(tokenizer, TALK[:2], chat_template_kwargs={"enable_thinking": False}).train[0]
    text = "<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert prompt.text == text
    assert counted(prompt) == expected(tokenizer, [(text, False), (f"{H}<|im_end|>", True)])


def test_a_template_that_opens_a_thought_which_the_answer_does_not_continue_is_refused(backend: str) -> None:
    tokenizer = tokenizer_of(backend, DEEPSEEK, "<|end_of_sentence|>")
    with pytest.raises(DataError, match=r"does not continue its generation prompt .*'<think>\\n' becomes 'hi, how"):
        load(tokenizer, TALK[:2], chat_template_kwargs={"thinking": True})
    # Where nothing trains on the answer, the prompt is what counts.
    config_only = load_without_references(tokenizer, TALK[:2], chat_template_kwargs={"thinking": True})
    assert config_only.train[0].text.endswith("<|A|><think>\n")


def load_without_references(tokenizer: Any, messages: list[dict[str, Any]], **data: Any) -> Dataset:
    tiny = {"type": "tiny"}
    data = {"prompts": {"type": "iterable"}, "heldout_size": 1, **data}
    tree = {"run": {"name": "r"}, "data": data, "student": {"model": tiny}, "teachers": {"t": {"model": tiny}}}
    return load_dataset(parse_config(tree), tokenizer, [{"messages": messages}] * 3)


def test_what_a_template_refuses_is_said_with_its_words(backend: str) -> None:
    with pytest.raises(DataError, match=r"prompts\[0\]: the student's chat template refuses .*System role not supported"):
        load(tokenizer_of(backend, GEMMA, "</s>"), [SYSTEM, *TALK])
    # A template that iterates over what is not there fails with an error of Python's.
    iterating = "{% for m in messages %}{% for p in m.content.parts %}{{ p }}{% endfor %}{{ m.content + 1 }}{% endfor %}"
    with pytest.raises(DataError, match=r"prompts\[0\]: the student's chat template refuses these messages"):
        load(tokenizer_of(backend, iterating, "</s>"), TALK)


def test_marks_that_do_not_fit_the_turns_are_refused(backend: str) -> None:
    once = MARKED.replace("{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' and loop.last %}")
    with pytest.raises(DataError, match="marks 1 passages as generated, and the conversation has 2 turns"):
        load(tokenizer_of(backend, once, "<|im_end|>"), TALK, turns="all")


# ----------------------------------------------------------------------------------------------- borders, ends of turns


def test_a_token_never_crosses_into_a_turn(backend: str) -> None:
    """Two line feeds are one token; where the second is the answer's, they are two."""
    tokenizer = tokenizer_of(backend, CHATML, "<|im_end|>")
    (both,) = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    talk = [TALK[0], {"role": "assistant", "content": "\nIt is four."}]
    prompt = load(tokenizer, talk).train[0]
    assert both not in [token for token, _ in counted(prompt)]
    assert counted(prompt) == expected(
        tokenizer,
        [("<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\n", False), ("\nIt is four.<|im_end|>", True)],
    )


@pytest.mark.parametrize(
    "pieces",
    [["a b", "\n", "\n c"], ["", "hi", ""], ["hi ", "there"], ["user\n", "\n\nIt", " is four.</s>"], ["é", "à"], ["x"]],
)
def test_pieces_share_no_token(backend: str, pieces: list[str]) -> None:
    tokenizer = tokenizer_of(backend, None, "</s>")
    ids = encode_pieces(tokenizer, pieces)
    assert [tokenizer.decode(part) for part in ids] == pieces
    assert ids == [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]


def spaced() -> Any:
    """A tokenizer that puts a space before every text, as those of Llama 2 and Mistral do."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    made.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    special = ["<unk>", "<s>", "</s>"]
    made.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize(
    "pieces", [["user ", "hello there"], ["the assist", "ant answers", " a question"], ["<s>", "hi</s>", " user", " hi"]]
)
def test_a_tokenizer_that_adds_spaces_reads_the_text_as_a_whole(pieces: list[str]) -> None:
    tokenizer = spaced()
    ids = encode_pieces(tokenizer, pieces)
    assert all(ids)
    joint = tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]
    joined = [token for part in ids for token in part]
    crossing = len(joint) != len(joined)
    assert joined == joint or crossing
    texts = [tokenizer.backend_tokenizer.decode(part, skip_special_tokens=False).strip() for part in ids]
    assert texts == [piece.strip() for piece in pieces]


@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, "<|im_end|>"), (GEMMA, "<end_of_turn>"), (PHI, "<|end|>"), (MARKED, "<|im_end|>"), (PLAIN, None), (None, None)],
)
def test_the_token_that_ends_a_turn(backend: str, template: str | None, end: str | None) -> None:
    tokenizer = tokenizer_of(backend, template, "</s>")
    found = ChatTemplate(tokenizer).end_of_turn()
    assert found == (None if end is None else tokenizer.convert_tokens_to_ids(end))


def test_a_tool_call_is_a_turn_and_its_result_is_context(backend: str) -> None:
    template = CHATML.replace(
        "{{ m.content }}", "{{ m.content }}{% for call in m.tool_calls %}call {{ call.function.name }}{% endfor %}"
    )
    tokenizer = tokenizer_of(backend, template, "<|im_end|>")
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
    talk = [TALK[0], call, {"role": "tool", "content": "four"}, TALK[3]]
    turns = [TURNS[0], ("assistant", "call add"), ("tool", "four"), TURNS[3]]
    prompt = load(tokenizer, talk, turns="all").train[0]
    assert counted(prompt) == expected(tokenizer, chatml(*turns))
    each = load(tokenizer, talk, turns="each").train[0]
    assert each.answer is None, "there is no text to hold a response against"
    assert each.has_reference
    assert tokenizer.decode(encode_answer(tokenizer, each)) == "call add<|im_end|>"
    assert replace(each, reply=None).has_reference is False
