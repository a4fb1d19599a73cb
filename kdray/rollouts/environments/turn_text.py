"""Turns as text, and replies as tokens: the student's tokenizer, as environments need it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kdray.errors import ConfigError, ResponseError


@dataclass(frozen=True)
class TurnText:
    """The student's tokenizer, with the ids after which an environment is asked."""

    tokenizer: Any
    vocab_size: int
    """Ids that teacher and student share; a reply holds no others."""
    pause_ids: tuple[int, ...]
    """Ids whose text holds a pausing character, ascending; special tokens are none of them."""

    @classmethod
    def of(cls, tokenizer: Any, vocab_size: int, pauses: str, setting: str) -> TurnText:
        """Args: pauses: of the environment. Raises: ConfigError naming `setting` if the vocabulary has no such character."""
        if not pauses or not pauses.isascii():
            # Other characters may be split over several tokens, none of which holds one.
            raise ConfigError(f"{setting}: the environment pauses at {pauses!r}; it has to name ASCII characters")
        ids = [token_id for token_id in range(min(vocab_size, len(tokenizer))) if token_id not in tokenizer.all_special_ids]
        texts = tokenizer.batch_decode([[token_id] for token_id in ids], clean_up_tokenization_spaces=False)
        for character in pauses:
            if not any(character in text for text in texts):
                raise ConfigError(
                    f"{setting}: the environment is asked after {character!r}, and no token of the student's tokenizer holds "
                    "it; use another environment, or a student with another tokenizer"
                )
        return cls(tokenizer, vocab_size, tuple(i for i, text in zip(ids, texts, strict=True) if set(pauses) & set(text)))

    def decode(self, token_ids: list[int]) -> str:
        """Text of the model's tokens, special ones left out."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def encode(self, text: str) -> np.ndarray:
        """Tokens of a reply, int32. Text that looks like a special token stays text. Raises: ResponseError for unknown ones."""
        if not text:
            return np.empty(0, dtype=np.int32)
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        unknown = [i for i in ids if i >= self.vocab_size or i == self.tokenizer.unk_token_id]
        if unknown:
            raise ResponseError(f"its reply {text!r:.100} has characters that the student's tokenizer does not know")
        return np.array(ids, dtype=np.int32)
