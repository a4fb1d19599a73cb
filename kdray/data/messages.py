"""Chat messages of any spelling as objects with `role` and `content`, as chat templates read them."""

from __future__ import annotations

import json
from typing import Any

from kdray.data.sources import check_text, kind
from kdray.errors import DataError

Message = dict[str, Any]
Messages = list[Message]

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
"""Roles of ShareGPT's `from`, by the names that data sets use."""


def as_messages(value: list[Any], where: str) -> tuple[Messages, str]:
    """Convert a list of messages with `role`/`content` or `from`/`value`; return them and a name of the form.

    Null keys are removed, text parts joined, and the JSON text of a tool call's arguments parsed, as templates expect.
    Raises: DataError naming the message.
    """
    shared = any(isinstance(message, dict) and message.get("from") is not None for message in value)
    convert = _from_sharegpt if shared else _from_openai
    messages = [convert(message, f"{where}, message {index}") for index, message in enumerate(value, start=1)]
    return messages, "ShareGPT conversations" if shared else "chat messages"


def text_of(message: Message) -> str:
    """Text of a message; empty if it holds tool calls alone."""
    return str(message["content"])


def answers_in(messages: Messages) -> list[int]:
    """Indices of the assistant's turns that may be learned: not the first message, not those of weight 0."""
    return [
        index
        for index, message in enumerate(messages)
        if index and message["role"] == "assistant" and message.get("weight") != 0
    ]


def without_nulls(value: Any) -> Any:
    """Remove the keys of objects whose value is null, at any depth: tables fill the columns of absent keys with nulls."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def _from_openai(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise _no_message(where)
    known = without_nulls(message)
    calls = known.get("tool_calls")
    content = known.get("content", "" if calls else None)
    if isinstance(content, list):
        content = _joined(content, where)
    if not isinstance(content, str):
        raise _no_message(where)
    check_text(known["role"] + content, where)
    if calls is not None:
        known["tool_calls"] = [_with_arguments(call, where) for call in _calls(calls, where)]
    return known | {"content": content}


def _from_sharegpt(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("from"), str):
        raise DataError(f"{where}: expected an object with texts `from` and `value`, as the others have")
    speaker, value = message["from"], message.get("value")
    if speaker not in _ROLES:
        raise DataError(f"{where}: from={speaker!r} is none of {', '.join(_ROLES)}; rename it, or remove the row")
    if not isinstance(value, str):
        raise DataError(f"{where}: expected an object with texts `from` and `value`, found {kind(value)} as value")
    check_text(value, where)
    weight = {} if message.get("weight") is None else {"weight": message["weight"]}
    call = _function_call(value) if speaker == "function_call" else None
    if call is not None:
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]} | weight
    return {"role": _ROLES[speaker], "content": value} | weight


def _function_call(value: str) -> dict[str, Any] | None:
    """A function call written as JSON; None for any other text."""
    try:
        call = json.loads(value)
    except ValueError:
        return None
    return call if isinstance(call, dict) and {"name", "arguments"} <= call.keys() else None


def _no_message(where: str) -> DataError:
    return DataError(f"{where}: expected an object with texts `role` and `content`")


def _joined(parts: list[Any], where: str) -> str:
    """Join the text parts of a message by line feeds. Raises: DataError for a part that is no text, by its type."""
    texts = []
    for part in parts:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        other = part.get("type", "text") if isinstance(part, dict) else "text"
        if other != "text" or not isinstance(text, str):
            raise DataError(f"{where}: holds a part of type {other!r}, and kdray trains on text alone; remove the row")
        texts.append(text)
    return "\n".join(texts)


def _calls(calls: Any, where: str) -> list[Any]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError(f"{where}: tool_calls must be a list of objects, found {kind(calls)}")
    return calls


def _with_arguments(call: dict[str, Any], where: str) -> dict[str, Any]:
    """Parse the arguments of a tool call: OpenAI writes them as a JSON text, chat templates read an object."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError as error:
        raise DataError(f"{where}: the arguments of tool call {function.get('name')!r} are not JSON: {error}") from error
    return {**call, "function": {**function, "arguments": arguments}}
