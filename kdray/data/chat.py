"""Chat templates: conversations as text, and the characters that the assistant wrote.

Where a template has generation marks (`{% generation %}`), they say what the assistant wrote. Otherwise a turn is what follows
the generation prompt after the messages before it; this is checked for every conversation, and refused where the template
renders messages otherwise once others follow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kdray.data.messages import Messages, text_of
from kdray.errors import DataError

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SHOWN = 40
_RESERVED = ("messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize")


class ChatTemplate:
    """Chat template of a tokenizer, with the arguments that a recipe gives it."""

    def __init__(self, tokenizer: Any, kwargs: Mapping[str, Any] | None = None) -> None:
        self.present = bool(getattr(tokenizer, "chat_template", None))
        self._tokenizer = tokenizer
        self._kwargs = dict(kwargs or {})
        self._special_tokens: list[str] | None = None

    def check_arguments(self) -> None:
        """Raises: DataError for an argument of the recipe that the template does not read."""
        for name in self._kwargs:
            setting = f"data.chat_template_kwargs.{name}"
            if name in _RESERVED:
                raise DataError(f"{setting}: given by the data; remove it")
            if self.present and not re.search(rf"\b{re.escape(name)}\b", self._source({})):
                raise DataError(f"{setting}: the student's chat template never reads it; correct the name, or remove it")

    @property
    def marked(self) -> bool:
        """True if the template marks what the assistant writes."""
        return self.present and _MARK.search(self._source({})) is not None

    def render(self, messages: Messages, more: Mapping[str, Any], place: str, generation_prompt: bool = True) -> str:
        """Text of the messages. Args: more: the row's arguments, which override the recipe's.

        Raises: DataError if the template refuses the messages.
        """
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=generation_prompt, **self._arguments(more)
                )
            )
        # A template is a program: it raises on messages that it does not support (a system message, two user turns), or fails.
        except Exception as error:
            raise _refused(place, error) from error

    def spans(
        self, messages: Messages, targets: Sequence[int], more: Mapping[str, Any], place: str
    ) -> tuple[str, list[tuple[int, int]]]:
        """Text of a conversation, and the characters (start, end) of the assistant in each target, end of turn included.

        Args: targets: indices of the assistant's messages, ascending.
        Raises: DataError if what the assistant wrote cannot be told exactly.
        """
        if self.marked:
            return self._marked_spans(messages, targets, more, place)
        text = self.render(messages, more, place, generation_prompt=False)
        spans = []
        for index in targets:
            before = self.render(messages[:index], more, place)
            last = index == len(messages) - 1
            until = text if last else self.render(messages[: index + 1], more, place, generation_prompt=False)
            if not text.startswith(before):
                raise _unstable(place, index, last, before, text)
            # Templates may close a conversation with more than its last turn, such as an end of sequence.
            same = _common(until, text)
            length = self._length(text[len(before) : same], text_of(messages[index]), whole=same == len(until))
            if not length:
                raise _unstable(place, index, last, until, text)
            spans.append((len(before), len(before) + length))
        return text, spans

    def ends_turn(self, text: str) -> bool:
        """True if a text ends with a special token, as a closed turn does."""
        return any(text.endswith(token) for token in self._special())

    def end_of_turn(self) -> int | None:
        """Id of the token that ends the assistant's turns; None if the template ends them with none, or cannot be told."""
        if not self.present:
            return None
        asked = [{"role": "user", "content": "a"}]
        try:
            text, ((start, end),) = self.spans([*asked, {"role": "assistant", "content": "b"}], [1], {}, "a probe")
        except DataError:
            # A template for other conversations, such as one that asks for tools: the data's own are checked.
            return None
        found = next((token for token in self._special() if text[start:end].endswith(token)), None)
        return None if found is None else int(self._tokenizer.convert_tokens_to_ids(found))

    def _marked_spans(
        self, messages: Messages, targets: Sequence[int], more: Mapping[str, Any], place: str
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        arguments = self._arguments(more)
        tools = arguments.pop("tools", None)
        try:
            (text,), (marks,) = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self._source(more),
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
                **arguments,
            )
        except Exception as error:
            raise _refused(place, error) from error
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if len(marks) != len(turns):
            raise DataError(
                f"{place}: the chat template marks {len(marks)} passages as generated, and the conversation has {len(turns)} "
                "turns of an assistant; correct its {% generation %} marks, or give another by data.chat_template_file"
            )
        by_turn = dict(zip(turns, marks, strict=True))
        return text, [tuple(by_turn[index]) for index in targets]

    def _length(self, turn: str, content: str, whole: bool) -> int:
        """Number of characters of a rendered turn up to its end, which is the special token behind its text; 0 if it has none.

        Args: whole: the turn is known to end where `turn` does, so that it need not have such a token: separators that follow
              are not the assistant's.
        """
        if content.strip():
            found = re.search(rf"{re.escape(content.strip())}\s*(?:{'|'.join(map(re.escape, self._special()))})", turn)
            if found is not None:
                return found.end()
        if not whole:
            return 0
        stripped = turn.rstrip()
        if self.ends_turn(stripped):
            return len(stripped)
        # White space belongs to the turn if the message itself ends with it.
        own = content[len(content.rstrip()) :]
        return len(stripped) + (len(own) if turn.startswith(own, len(stripped)) else 0)

    def _special(self) -> list[str]:
        """Special tokens, longest first."""
        if self._special_tokens is None:
            added = {str(token.content) for token in self._tokenizer.added_tokens_decoder.values() if token.special}
            self._special_tokens = sorted(added.union(map(str, self._tokenizer.all_special_tokens)), key=len, reverse=True)
        return self._special_tokens

    def _arguments(self, more: Mapping[str, Any]) -> dict[str, Any]:
        return {**self._kwargs, **more}

    def _source(self, more: Mapping[str, Any]) -> str:
        return str(self._tokenizer.get_chat_template(None, more.get("tools")))


def _common(one: str, other: str) -> int:
    """Number of characters at the beginning that two texts have in common."""
    shorter = min(len(one), len(other))
    return next((index for index in range(shorter) if one[index] != other[index]), shorter)


def _refused(place: str, error: Exception) -> DataError:
    what = str(error) or type(error).__name__
    return DataError(f"{place}: the student's chat template refuses these messages: {what}")


def _unstable(place: str, index: int, last: bool, part: str, text: str) -> DataError:
    at = _common(part, text)
    differs = f"{part[at : at + _SHOWN]!r} becomes {text[at : at + _SHOWN]!r}"
    if last:
        return DataError(
            f"{place}: the chat template does not continue its generation prompt with the assistant's turn: {differs}; set "
            "data.chat_template_kwargs so that it does, or give a template by data.chat_template_file, where needed with "
            "{% generation %} marks"
        )
    return DataError(
        f"{place}: the chat template renders message {index + 1} otherwise once others follow: {differs}; set data.turns=each, "
        "which renders every turn as the last one, or data.turns=last"
    )
