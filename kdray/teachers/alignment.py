"""Where two tokenizations of one text meet: the smallest groups of tokens on both sides that cover the same characters.

Source: aligning by text instead of by position is GOLD's idea (TRL's General Online Logit Distillation); the groups are those
between the boundaries that both tokenizations have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

_CUT = "\N{REPLACEMENT CHARACTER}"


class Group(NamedTuple):
    """Tokens [first_start, first_end) of the first tokenization and [second_start, second_end) of the second: the same text."""

    first_start: int
    first_end: int
    second_start: int
    second_end: int


def boundaries(decode: Callable[[Sequence[int]], str], token_ids: Sequence[int]) -> list[int | None]:
    """After how many characters of the whole text each token ends, [tokens]; None where it ends inside a character.

    Decoding token after token is exact for what a model drew, which need not be how the tokenizer would cut the text.
    Args: decode: ids -> text, special tokens kept.
    """
    whole = decode(token_ids)
    ends = _growing(decode, token_ids, whole)
    if ends and ends[-1] != len(whole):
        # A decoder that looks further back than the window: every prefix by itself, in quadratic time.
        ends = [
            len(text) if whole.startswith(text := decode(token_ids[:count])) else None for count in range(1, len(token_ids) + 1)
        ]
    return ends


def _growing(decode: Callable[[Sequence[int]], str], token_ids: Sequence[int], whole: str) -> list[int | None]:
    """`boundaries` in linear time: each token is decoded after the few before it instead of after all.

    The window begins with tokens that are accounted for, so that a decoder which drops the first space of a text drops it with
    and without the new token alike.
    """
    ends: list[int | None] = []
    start, read, length = 0, 0, 0  # the window, what of it is accounted for, and how many characters that makes
    before = ""
    for count in range(1, len(token_ids) + 1):
        text = decode(token_ids[start:count])
        piece = text[len(before) :]
        # The bytes of a character that are not all there yet decode to a replacement, which the whole text has not.
        if not text.startswith(before) or not whole.startswith(piece, length):
            ends.append(None)
            continue
        ends.append(length + len(piece))
        # The window moves on from whole characters alone: half of an invalid run of bytes would decode to something else.
        if not piece or piece.endswith(_CUT):
            continue
        start, read, length = read, count, length + len(piece)
        before = decode(token_ids[start:read])
    return ends


def offset_boundaries(offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """`boundaries` by a fast tokenizer's offsets: a token that ends inside a character claims all of it, as does the next."""
    starts = [start for start, _ in offsets[1:]]
    return [None if index < len(starts) and starts[index] < end else end for index, (_, end) in enumerate(offsets)]


def align(first: Sequence[int | None], second: Sequence[int | None]) -> list[Group]:
    """The smallest groups that end at a boundary of both; they cover all tokens of both, in order, once.

    A token without characters joins the group before it, or the first one.
    Args: boundaries of two tokenizations of one text, see `boundaries`.
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
        # The last token that ends at a boundary, so that empty tokens stay with what they follow.
        lasts.append({end: index + 1 for index, end in enumerate(ends) if end is not None})
    groups = []
    start = (0, 0)
    for end in sorted((lasts[0].keys() & lasts[1].keys()) - {0} or {first[-1]}):
        stop = (lasts[0][end], lasts[1][end])
        groups.append(Group(start[0], stop[0], start[1], stop[1]))
        start = stop
    return groups
