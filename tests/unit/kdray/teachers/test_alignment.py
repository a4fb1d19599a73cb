"""Alignment of two tokenizations: real tokenizers, text that no two cut alike, and the distributions of a partition."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kdray.teachers.alignment import Group, align, boundaries, offset_boundaries

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


def one_by_one(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[int | None]:
    """The definition: a token ends where the decoded prefix is one of the text."""
    texts = [tokenizer.decode(list(token_ids[:count]), skip_special_tokens=False) for count in range(1, len(token_ids) + 1)]
    return [len(text) if texts[-1].startswith(text) else None for text in texts]


def sentence_pieces() -> Tokenizer:
    """Words begin with a mark, unknown characters fall back to bytes, and decoding drops the first space of a text."""
    vocabulary = {
        token: index for index, token in enumerate(["<unk>", "▁", "a", "b", "▁a", *(f"<0x{n:02X}>" for n in range(256))])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


PIECES = sentence_pieces()


@pytest.mark.parametrize("tokenizer", [SMALL, PIECES], ids=["bytes", "pieces"])
@given(data=st.data())
def test_ends_are_those_of_decoding_every_prefix(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Any ids, invalid bytes and runs of spaces among them: a model draws what no tokenizer would write."""
    names = ("Ġ", "▁", "▁a", "a", "<0xE5>", "å", "¯", "¹")
    named: list[int] = [token_id for name in names if (token_id := tokenizer.token_to_id(name)) is not None]
    token_ids: list[int] = data.draw(
        st.lists(st.sampled_from(named) | st.integers(0, tokenizer.get_vocab_size() - 1), max_size=12)
    )
    assert boundaries(lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False), token_ids) == one_by_one(
        tokenizer, token_ids
    )


def test_a_run_of_invalid_bytes_is_read_as_in_the_whole_text() -> None:
    """Cut in the middle, its second half would decode to other characters than it does after the first."""
    ids = PIECES.get_vocab()
    run = [ids[f"<0x{byte}>"] for byte in ("EF", "BD", "BD", "BF", "AF", "EF")] + [ids["a"]]
    assert None in one_by_one(PIECES, run)
    assert boundaries(PIECES.decode, run) == one_by_one(PIECES, run)


def test_a_long_response_is_not_decoded_from_its_start_again_and_again() -> None:
    token_ids = LARGE.encode("the naïve 对话 " * 200).ids
    decoded = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return str(LARGE.decode(list(ids), skip_special_tokens=False))

    assert boundaries(decode, token_ids)[-1] == len("the naïve 对话 " * 200)
    assert decoded < 20 * len(token_ids)


@given(st.text(max_size=40))
def test_offsets_give_the_same_ends(text: str) -> None:
    encoded = CROSSING.encode(text)
    found = offset_boundaries(encoded.offsets)
    assert {end: index for index, end in enumerate(found) if end is not None} == {
        end: index for index, end in enumerate(one_by_one(CROSSING, encoded.ids)) if end is not None
    }


def crossing() -> Tokenizer:
    """Tokens that begin or end inside a character and hold another: `a` and the first byte of 对, its other two and `b`."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "å"), ("¯", "¹"), ("¯¹", "b")]
    vocabulary = {token: index for index, token in enumerate([*names, *("".join(merge) for merge in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


CROSSING = crossing()


def test_a_token_that_ends_inside_a_character_is_no_boundary_by_offsets_either() -> None:
    encoded = CROSSING.encode("a对b")
    assert encoded.tokens == ["aå", "¯¹b"]
    assert encoded.offsets == [(0, 2), (1, 3)], "both claim the character that they share"
    assert offset_boundaries(encoded.offsets) == [None, 3]
    # Against single letters the three characters are one group, not `a对` beside half of it.
    assert align([1, 2, 3], offset_boundaries(encoded.offsets)) == [Group(0, 3, 0, 2)]


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
