"""Rows as prompts: the text after the chat template, its tokens, and the reference answer's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kdray.config import Config
from kdray.data.chat import ChatTemplate
from kdray.data.formats import Row
from kdray.data.messages import Messages
from kdray.data.references import render_reference
from kdray.errors import DataError
from kdray.types import Prompt

_BATCH = 1024


@dataclass(frozen=True)
class Encoded:
    """Prompts of a source."""

    kept: list[Prompt]
    """In the order of their rows."""
    dropped: list[Prompt]
    """Prompts that are too long, and left out."""


class Encoder:
    """Encoder of rows into prompts under the config's chat template and length limit."""

    def __init__(self, config: Config, tokenizer: Any, references: bool = False, any_length: bool = False) -> None:
        """Args: tokenizer: the student's, or that of a teacher that reads prompts in its own way; references: render reference
        answers through the chat template, too; any_length: ignore `data.max_prompt_tokens`.
        """
        self._data = config.data
        self._limit = None if any_length else config.data.max_prompt_tokens
        self._tokenizer = tokenizer
        self._references = references
        self.template = ChatTemplate(tokenizer, config.data.chat_template_kwargs)
        wanted = config.data.chat_template
        if wanted == "always" and not self.template.present:
            raise DataError(
                "data.chat_template=always, but the student tokenizer has none; use auto or never, or give one by "
                "data.chat_template_file"
            )
        self._wrap_text = wanted == "always" or (wanted == "auto" and self.template.present)

    def __call__(self, rows: Sequence[Row], first_id: int) -> Encoded:
        """Encode rows, which get consecutive ids. Text is never truncated. Raises: DataError."""
        kept: list[Prompt] = []
        longer: list[Prompt] = []
        for start in range(0, len(rows), _BATCH):
            part = rows[start : start + _BATCH]
            for index, (row, text, token_ids) in enumerate(zip(part, *self._tokenize(part), strict=True), start=start):
                if not token_ids:
                    raise DataError(f"{row.place}: the prompt has no tokens; remove the row")
                prompt = Prompt(
                    first_id + index,
                    np.asarray(token_ids, dtype=np.int32),
                    text,
                    row.answer,
                    row.domain,
                    row.prompt,
                    row.reply,
                    row.template_kwargs,
                )
                (longer if self._limit is not None and len(token_ids) > self._limit else kept).append(prompt)
        if longer and self._data.too_long == "refuse":
            longest = max(len(prompt.token_ids) for prompt in longer)
            first = longer[0]
            raise DataError(
                f"data.max_prompt_tokens={self._limit}: {len(longer)} of {len(rows)} prompts are longer: longest "
                f"{longest} tokens, first prompt {first.prompt_id} ({rows[first.prompt_id - first_id].place}); "
                f"set data.max_prompt_tokens={longest}, or data.too_long=drop to leave them out"
            )
        if self._references:
            kept = [self.with_reference(prompt, rows[prompt.prompt_id - first_id].place) for prompt in kept]
        return Encoded(kept, longer)

    def with_reference(self, prompt: Prompt, place: str) -> Prompt:
        """Add the reference under the chat template, if the prompt has one and went through the template."""
        messages = self._messages(prompt.question)
        if messages is None or not prompt.has_reference:
            return prompt
        all_turns = self._data.turns == "all"
        return replace(prompt, reference=render_reference(self.template, self._tokenizer, prompt, messages, all_turns, place))

    def _messages(self, question: str | Messages) -> Messages | None:
        """Messages for the chat template; None for a text that is not wrapped."""
        if not isinstance(question, str):
            return question
        return [{"role": "user", "content": question}] if self._wrap_text else None

    def _tokenize(self, rows: Sequence[Row]) -> tuple[list[str], list[list[int]]]:
        """Return the texts after the chat template, and their ids."""
        texts = [self._text(row) for row in rows]
        templated = [self._messages(row.prompt) is not None for row in rows]
        token_ids: list[list[int]] = [[] for _ in rows]
        for wrapped in (False, True):
            chosen = [index for index, flag in enumerate(templated) if flag == wrapped]
            if not chosen:
                continue
            # A chat template adds its own special tokens; raw text gets the tokenizer's default ones.
            encoded = self._tokenizer(
                [texts[index] for index in chosen], add_special_tokens=not wrapped, truncation=False, verbose=False
            )["input_ids"]
            for index, ids in zip(chosen, encoded, strict=True):
                token_ids[index] = ids if wrapped else self._without_eos(texts[index], ids)
        return texts, token_ids

    def _text(self, row: Row) -> str:
        messages = self._messages(row.prompt)
        if messages is None:
            assert isinstance(row.prompt, str)
            if row.template_kwargs:
                raise DataError(
                    f"{row.place}: has {', '.join(row.template_kwargs)} for a chat template, and its prompt is a text that "
                    "goes through none; set data.chat_template=always, or remove the column"
                )
            return row.prompt
        if not self.template.present:
            raise DataError(
                f"{row.place}: chat messages need a chat template, and the student tokenizer has none; give one by "
                "data.chat_template_file, use a student whose tokenizer has one, or give the prompts as text"
            )
        return self.template.render(messages, row.template_kwargs, row.place)

    def _without_eos(self, text: str, token_ids: list[int]) -> list[int]:
        """Remove an end-of-sequence token that the tokenizer appended; a response cannot follow an ended prompt."""
        eos = self._tokenizer.eos_token
        if token_ids and eos is not None and token_ids[-1] == self._tokenizer.eos_token_id and not text.endswith(eos):
            return token_ids[:-1]
        return token_ids
