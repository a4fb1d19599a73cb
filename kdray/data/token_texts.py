"""Text of each token of a response, for samples that are shown token by token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

MOST_TOKENS = 512
"""Tokens of a sample that are stored one by one, so that the files stay small and are written fast."""


def token_texts(token_ids: np.ndarray, decode: Callable[[np.ndarray], str]) -> list[str]:
    """Text that each of the first tokens adds; joined, they are the text of all of them.

    A token that ends within a character adds nothing, and the one that completes the character adds it; so does a token that
    `decode` leaves out. Only a few tokens are decoded at a time: a token's text may depend on the one before, by a space.
    """
    ids = token_ids[:MOST_TOKENS]
    texts = []
    before, read = 0, 0
    for end in range(1, len(ids) + 1):
        known = decode(ids[before:read])
        text = decode(ids[before:end])
        if text.endswith("�") or len(text) <= len(known):
            # Nothing yet: the next token is decoded together with this one.
            texts.append("")
            continue
        texts.append(text[len(known) :])
        before, read = read, end
    return texts
