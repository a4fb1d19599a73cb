"""Pronounceable nonsense words of four or five letters, such as `rilo` or `tamen`, from syllables."""

from __future__ import annotations

import numpy as np

CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"
ENDINGS = ("", "k", "l", "m", "n", "p", "r", "s", "t")

LAST_LETTERS = VOWELS + "".join(ENDINGS)
"""Letters that a word can end with."""

NUM_WORDS = (len(CONSONANTS) * len(VOWELS)) ** 2 * len(ENDINGS)
"""Number of distinct words: two syllables of consonant and vowel, and an ending."""


def nonsense_word(rng: np.random.Generator) -> str:
    """Draw one of the NUM_WORDS words uniformly."""
    number = int(rng.integers(NUM_WORDS))
    number, ending = divmod(number, len(ENDINGS))
    letters = ""
    for _ in range(2):
        number, vowel = divmod(number, len(VOWELS))
        number, consonant = divmod(number, len(CONSONANTS))
        letters += CONSONANTS[consonant] + VOWELS[vowel]
    return letters + ENDINGS[ending]
