"""Alignment of two tokenizations: real tokenizers, text that no two cut alike, and the laws of a partition."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kdray.alignment import Group, align, boundaries

TEXTS = ["the theatre of the absurd", "naïve café 对话 🙂 and more", "a", "  spaces   inside ", "🙂🙃🙂"]


def byte_level(size: int) -> Tokenizer:
    """Byte-level BPE trained on a few lines: tokens may end inside a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


SMALL, LARGE = byte_level(260), byte_level(330)


def ends(tokenizer: Tokenizer, text: str) -> list[int | None]:
    return boundaries(lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False), tokenizer.encode(text).ids)


def test_by_hand() -> None:
    # ab|c|def against a|bc|de|f
    assert align([2, 3, 6], [1, 3, 5, 6]) == [Group(0, 2, 0, 2), Group(2, 3, 2, 4)]
    assert align([1, 2], [1, 2]) == [Group(0, 1, 0, 1), Group(1, 2, 1, 2)]
    # A token that ends inside a character is no boundary; an empty one stays with what it follows.
    assert align([None, 1, 2], [1, 1, 2]) == [Group(0, 2, 0, 2), Group(2, 3, 2, 3)]
    assert align([], []) == []
    for first, second in (([1], []), ([2], [3]), ([1, None], [1])):
        with pytest.raises(ValueError, match="empty|different texts"):
            align(first, second)


@pytest.mark.parametrize("text", TEXTS)
def test_groups_of_real_tokenizers_cover_the_same_text(text: str) -> None:
    first, second = SMALL.encode(text).ids, LARGE.encode(text).ids
    groups = align(ends(SMALL, text), ends(LARGE, text))
    _check_partition(groups, len(first), len(second))
    for group in groups:
        left, right = SMALL.decode(first[group.first_start : group.first_end]), LARGE.decode(second[group[2] : group[3]])
        assert left == right
        assert left
    assert "".join(SMALL.decode(first[group[0] : group[1]]) for group in groups) == text


def test_a_token_may_end_inside_a_character() -> None:
    """Four bytes, four tokens: only the last one ends at a character."""
    assert ends(SMALL, "🙃")[-1] == 1
    assert None in ends(byte_level(257), "🙃")


@given(st.text(min_size=1, max_size=40))
def test_any_text_is_partitioned(text: str) -> None:
    groups = align(ends(SMALL, text), ends(LARGE, text))
    _check_partition(groups, len(SMALL.encode(text).ids), len(LARGE.encode(text).ids))


def _check_partition(groups: Sequence[Group], first: int, second: int) -> None:
    assert groups[0][0] == groups[0][2] == 0
    assert (groups[-1].first_end, groups[-1].second_end) == (first, second)
    for before, after in pairwise(groups):
        assert (before.first_end, before.second_end) == (after.first_start, after.second_start)
    assert all(group.first_end > group.first_start and group.second_end > group.second_start for group in groups)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=20), st.data())
def test_groups_are_the_smallest(sizes: list[int], data: st.DataObject) -> None:
    first = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    inner = data.draw(st.sets(st.integers(1, first[-1])))
    second = sorted(inner | {first[-1]})
    groups = align(first, second)
    _check_partition(groups, len(first), len(second))
    assert [first[group.first_end - 1] for group in groups] == sorted(set(first) & set(second))
