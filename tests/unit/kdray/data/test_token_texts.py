"""The text of each token: joined they are the whole, whatever a token holds of a character."""

from __future__ import annotations

import numpy as np

from kdray.data.token_texts import MOST_TOKENS, token_texts


def decode_bytes(ids: np.ndarray) -> str:
    return bytes(ids.tolist()).decode("utf-8", errors="replace")


def decode_words(ids: np.ndarray) -> str:
    """Words with a space between them; 0 is left out, as a special token is."""
    return " ".join(f"w{each}" for each in ids if each)


def test_a_character_of_several_tokens_belongs_to_the_last_of_them():
    ids = np.frombuffer("aé€b".encode(), np.uint8)
    assert token_texts(ids, decode_bytes) == ["a", "", "é", "", "", "€", "b"]


def test_a_space_belongs_to_the_word_after_it():
    assert token_texts(np.array([3, 4, 0, 5]), decode_words) == ["w3", " w4", "", " w5"]


def test_only_the_first_tokens_are_told_apart_and_few_are_decoded_at_once():
    longest = 0

    def decode(ids: np.ndarray) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode_words(ids)

    ids = np.arange(1, 2 * MOST_TOKENS)
    texts = token_texts(ids, decode)
    assert "".join(texts) == decode_words(ids[:MOST_TOKENS])
    assert longest <= 3


def test_nothing_has_no_texts():
    assert token_texts(np.array([], np.int32), decode_words) == []
