"""Differences between endpoints that call themselves OpenAI-compatible: parameters that one refuses, and forms of an answer.

A parameter that is refused by name is left out, or sent under its other name, in this request and in all later ones. Only what
changes no distribution is left out: a seed, and a temperature or top_p of 1, the value that an endpoint takes by itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_NO_MASS = -9999.0
"""JSON value of a logprob of minus infinity."""
_TAIL_FLOOR = 1e-7
"""Smallest mass of a tail: what float32 logprobs leave of 1 below this is rounding error."""
_REFUSALS = (400, 422)
_RENAMED = {"max_tokens": "max_completion_tokens"}
_OPTIONAL: dict[str, float | None] = {"seed": None, "top_p": 1.0, "temperature": 1.0}
"""Parameters that may be left out, and the value that an endpoint takes then; None where any may be."""


class Dialect:
    """Parameters that one endpoint understands, learned from its refusals."""

    def __init__(self) -> None:
        self._names: dict[str, str | None] = {}
        """Parameter -> the name that it is sent under; None if it is left out."""

    def spoken(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of a request as the endpoint takes them."""
        named = ((self._names.get(name, name), value) for name, value in arguments.items())
        return {name: value for name, value in named if name is not None}

    def learn(self, status: int, refusal: str, arguments: Mapping[str, Any], sent: Mapping[str, Any]) -> str | None:
        """Learn from a refusal what to send otherwise. Args: arguments: of the request; sent: what was sent for them.

        Returns: what is different from now on, in words; empty if another request has learned it meanwhile; None if nothing is.
        """
        if status not in _REFUSALS:
            return None
        for name, other in _RENAMED.items():
            if name in sent and _names(refusal, other):
                return self._change(name, other, f"`{name}` is sent as `{other}`")
        for name, default in _OPTIONAL.items():
            if name in sent and _names(refusal, name) and default in (None, arguments[name]):
                lost = "; its responses cannot be drawn again" if default is None else ""
                return self._change(name, None, f"`{name}` is left out{lost}")
        return None

    def _change(self, name: str, other: str | None, words: str) -> str:
        if name in self._names:
            return ""
        self._names[name] = other
        return words


def _names(text: str, parameter: str) -> bool:
    return re.search(rf"(?<![\w]){re.escape(parameter)}(?![\w])", text) is not None


def text_of(message: Any, thinking: bool) -> str | None:
    """Text of a chat message, whose content may be a list of parts; None if it has none, as a refusal or a thought alone.

    Args: thinking: put the model's thoughts before the text, between `<think>` and `</think>`.
    Raises: ValueError that names a part that is neither text nor a thought.
    """
    content = getattr(message, "content", None)
    parts = content if isinstance(content, list) else [] if content is None else [{"type": "text", "text": content}]
    texts = [_text(part, "text") for part in parts if _is(part, "text")]
    if strange := [part for part in parts if not any(_is(part, kind) for kind in ("text", "thinking", "refusal"))]:
        kind = strange[0].get("type") if isinstance(strange[0], dict) else type(strange[0]).__name__
        raise ValueError(f"the answer holds a part of type {kind!r}, which is no text")
    if not texts:
        return None
    if not thinking:
        return "".join(texts)
    thoughts = [_text(part, "thinking") for part in parts if _is(part, "thinking")]
    # Servers that split the thoughts off name their field in one of these ways.
    thoughts += [each for name in ("reasoning_content", "reasoning") if isinstance(each := getattr(message, name, None), str)][
        :1
    ]
    return (f"<think>\n{''.join(thoughts).strip()}\n</think>\n\n" if thoughts else "") + "".join(texts)


def _is(part: Any, kind: str) -> bool:
    return isinstance(part, dict) and part.get("type") == kind


def _text(part: Any, key: str) -> str:
    """Text of a part, under `key`; a thought may again be a list of text parts. Raises: ValueError if it is neither."""
    found = part.get(key)
    if isinstance(found, list):
        return "".join(_text(each, "text") for each in found if isinstance(each, dict))
    if not isinstance(found, str):
        raise ValueError(f"the answer holds a part of type {part['type']!r} without text")
    return found


def token_id_of(token: str) -> int:
    """Id of a token that is named by it. Raises: ValueError if it is not."""
    prefix, colon, number = token.partition(":")
    if prefix != "token_id" or not colon:
        raise ValueError(f"{token!r} is no id")
    return int(number)


def support(logprobs: Sequence[float], tops: Sequence[dict[int, float]], width: int, vocab_size: int) -> dict[str, Any]:
    """Columns of T tokens from log p at each and the rows of top logprobs, with or without its token.

    The likeliest ids come first, then a token below them. Rows of the endpoint's head that the student does not have count as
    tail. A tail is the rest of 1, which is unknown below `_TAIL_FLOOR`; -inf if no id is outside.
    Args: width: slots of the support: the top logprobs requested, and one more where tokens are added to them.
    """
    support_ids = np.full((len(tops), width), -1, dtype=np.int32)
    support_logprobs = np.full((len(tops), width), -np.inf)
    tail_logprobs = np.full(len(tops), -np.inf)
    for row, top in enumerate(tops):
        ranked = sorted(((logprob, token_id) for token_id, logprob in top.items() if token_id < vocab_size), reverse=True)
        for slot, (logprob, token_id) in enumerate(ranked[:width]):
            support_ids[row, slot] = token_id
            support_logprobs[row, slot] = logprob if logprob > _NO_MASS else -np.inf
        if min(len(ranked), width) < vocab_size:
            mass = float(np.exp(support_logprobs[row]).sum())
            tail_logprobs[row] = math.log1p(-min(mass, 1.0 - _TAIL_FLOOR))
    at_tokens = np.array([logprob if logprob > _NO_MASS else -np.inf for logprob in logprobs])
    return {
        "teacher_logprobs": at_tokens.astype(np.float32),
        "support_ids": support_ids,
        "support_logprobs": support_logprobs.astype(np.float32),
        "tail_logprobs": tail_logprobs.astype(np.float32),
    }
