"""Alignment of two tokenizations of a text: the smallest groups of tokens on both sides that cover the same characters.

Source: aligning by text instead of by position follows GOLD (TRL's General Online Logit Distillation); groups lie between the
boundaries that both tokenizations share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

_CUT = "\N{REPLACEMENT CHARACTER}"


class Group(NamedTuple):
    """Tokens [first_start, first_end) of the first tokenization and [second_start, second_end) of the second, with the same
    text."""

    first_start: int
    first_end: int
    second_start: int
    second_end: int


def boundaries(decode: Callable[[Sequence[int]], str], token_ids: Sequence[int]) -> list[int | None]:
    """Character offset in the whole text at which each token ends, [tokens]; None if it ends inside a character.

    Decoding token by token is exact for what a model sampled, which may differ from how the tokenizer would split the text.
    Args: decode: ids -> text, special tokens kept.
    """
    whole = decode(token_ids)
    ends = _growing(decode, token_ids, whole)
    if ends and ends[-1] != len(whole):
        # For a decoder with more context than the window: decode every prefix separately, in quadratic time.
        ends = [
            len(text) if whole.startswith(text := decode(token_ids[:count])) else None for count in range(1, len(token_ids) + 1)
        ]
    return ends


def _growing(decode: Callable[[Sequence[int]], str], token_ids: Sequence[int], whole: str) -> list[int | None]:
    """Compute `boundaries` in linear time: each token is decoded after a few preceding tokens instead of all of them.

    The window starts with tokens that are already processed, so that a decoder which drops a text's leading space drops it with
    and without the new token alike.
    """
    ends: list[int | None] = []
    start, read, length = 0, 0, 0  # window start, end of its processed part, and that part's end in characters
    before = ""
    for count in range(1, len(token_ids) + 1):
        text = decode(token_ids[start:count])
        piece = text[len(before) :]
        # An incomplete character's bytes decode to a replacement character, which the whole text does not contain.
        if not text.startswith(before) or not whole.startswith(piece, length):
            ends.append(None)
            continue
        ends.append(length + len(piece))
        # The window advances only at whole characters: half of an invalid run of bytes would decode differently.
        if not piece or piece.endswith(_CUT):
            continue
        start, read, length = read, count, length + len(piece)
        before = decode(token_ids[start:read])
    return ends


def offset_boundaries(offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """`boundaries` from a fast tokenizer's offsets: a token that ends inside a character spans it all, as does the next."""
    starts = [start for start, _ in offsets[1:]]
    return [None if index < len(starts) and starts[index] < end else end for index, (_, end) in enumerate(offsets)]


def align(first: Sequence[int | None], second: Sequence[int | None]) -> list[Group]:
    """Smallest groups that end at a boundary of both tokenizations; they cover all tokens of both, in order, exactly once.

    A token without characters joins the group before it, or the first one.
    Args: boundaries of two tokenizations of the same text, see `boundaries`.
    Raises: ValueError if they do not end at the same character.
    """
    if not first or not second:
        if first or second:
            raise ValueError("one tokenization is empty and the other is not")
        return []
    if first[-1] is None or first[-1] != second[-1]:
        raise ValueError(f"the tokenizations end after {first[-1]} and {second[-1]} characters: they are of different texts")
    lasts = []
    for ends in (first, second):
        # The last token that ends at a boundary, so that empty tokens stay with the preceding one.
        lasts.append({end: index + 1 for index, end in enumerate(ends) if end is not None})
    groups = []
    start = (0, 0)
    for end in sorted((lasts[0].keys() & lasts[1].keys()) - {0} or {first[-1]}):
        stop = (lasts[0][end], lasts[1][end])
        groups.append(Group(start[0], stop[0], start[1], stop[1]))
        start = stop
    return groups
