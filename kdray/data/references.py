"""Reference answers as tokens: the assistant's turns as the student would have written them, with a mask of the targets."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np

from kdray.data.chat import ChatTemplate
from kdray.data.messages import Messages, answers_in
from kdray.errors import DataError
from kdray.types import Prompt, Reference


def encode_answer(tokenizer: Any, prompt: Prompt) -> np.ndarray:
    """Encode the reference answer with its end last: the end of the turn under a chat template, else end-of-sequence.

    Returns: int32 [answer tokens], the target of supervised fine-tuning that follows the prompt's ids.
    Raises: DataError if the prompt has no answer or the tokenizer no end-of-sequence token.
    """
    return reference_of(tokenizer, prompt).answer_ids


def reference_of(tokenizer: Any, prompt: Prompt) -> Reference:
    """Return the prompt's reference; one without a chat template is encoded here. Raises: as `encode_answer`."""
    if prompt.reference is not None:
        return prompt.reference
    if prompt.answer is None:
        raise DataError(
            f"prompt {prompt.prompt_id} has no reference answer to train on; set data.prompts.answer_column, or "
            "training.sft.steps=0"
        )
    token_ids = [*tokenizer(prompt.answer, add_special_tokens=False, verbose=False)["input_ids"], _eos(tokenizer)]
    return Reference(prompt.token_ids, np.asarray(token_ids, dtype=np.int32), np.ones(len(token_ids), dtype=bool))


def render_reference(
    template: ChatTemplate, tokenizer: Any, prompt: Prompt, messages: Messages, all_turns: bool, place: str
) -> Reference:
    """Render a prompt's reference through its chat template.

    Args: messages: the prompt; all_turns: the assistant's turns in the prompt are targets, too.
    Raises: DataError if the assistant's tokens cannot be told exactly, or do not continue the prompt.
    """
    conversation = [*messages, prompt.reply or {"role": "assistant", "content": prompt.answer or ""}]
    last = len(messages)
    targets = [index for index in answers_in(conversation) if index < last] if all_turns else []
    text, spans = template.spans(conversation, [*targets, last], prompt.template_kwargs, place)
    start, end = spans[-1]
    if not all_turns and text[:start] != prompt.text:
        raise DataError(
            f"{place}: the chat template marks the answer after {text[:start][-40:]!r}, and a response follows "
            f"{prompt.text[-40:]!r}; give a template whose generation prompt begins the turn (data.chat_template_file)"
        )
    pieces, flags, at = [], [], 0
    for begin, stop in spans:
        pieces += [text[at:begin], text[begin:stop]]
        flags += [False, True]
        at = stop
    ids = encode_pieces(tokenizer, pieces)
    if not all_turns:
        # The tokens that responses follow.
        ids[0] = prompt.token_ids.tolist()
    if not template.ends_turn(text[start:end]):
        ids[-1] = [*ids[-1], _eos(tokenizer)]
    is_target = np.repeat(flags[1:], [len(piece) for piece in ids[1:]])
    token_ids = np.array([token for piece in ids[1:] for token in piece], dtype=np.int32)
    return Reference(np.array(ids[0], dtype=np.int32), token_ids, is_target.astype(bool))


def encode_pieces(tokenizer: Any, pieces: Sequence[str]) -> list[list[int]]:
    """Tokenize a text whose pieces must not share tokens; returns the ids of every piece.

    Pieces are tokenized apart, as a response is drawn after the tokens of its prompt alone. Tokenizers that would read another
    text then, since they put a space before every text, tokenize the whole, and apart only where a token would cross a border.
    """
    if _reads_apart(tokenizer) or not getattr(tokenizer, "is_fast", False):
        return [_ids(tokenizer, piece) for piece in pieces]
    return _within(tokenizer, pieces)


@lru_cache(maxsize=8)
def _reads_apart(tokenizer: Any) -> bool:
    """True if texts that are tokenized apart are read as the text that they make together."""
    return bool(tokenizer.decode([*_ids(tokenizer, "ab"), *_ids(tokenizer, "cd")]) == tokenizer.decode(_ids(tokenizer, "abcd")))


def _within(tokenizer: Any, pieces: Sequence[str]) -> list[list[int]]:
    """Ids of the pieces as parts of one text. A special token keeps the white space behind it that it swallows."""
    encoded = tokenizer("".join(pieces), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    text, ends = "".join(pieces), list(accumulate(map(len, pieces)))
    ids: list[list[int]] = [[] for _ in pieces]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    reached = 0
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        # Tokens tile the text, and some tokenizers leave white space out of their offsets.
        begin = min(start, reached)
        reached = max(reached, end)
        piece = min(bisect_right(ends, begin), len(pieces) - 1)
        overhang = text[ends[piece] : end]
        if overhang and not (token in special and not overhang.strip()):
            cut = piece + 1
            return [*_within(tokenizer, pieces[:cut]), *_within(tokenizer, pieces[cut:])]
        ids[piece].append(int(token))
    return ids


def _ids(tokenizer: Any, text: str) -> list[int]:
    return [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


def _eos(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError("the student tokenizer has no end-of-sequence token; set its eos_token")
    return int(tokenizer.eos_token_id)
