"""Scoring by a teacher with another tokenizer: the rollout's text is retokenized, and rows are matched group by group.

The row before a group predicts the group's first token on both sides; positions inside a group of several tokens depend on the
tokenization and get no row. A teacher's token is mapped to the student's first token of the same text.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np

from kdray.errors import ConfigError
from kdray.interfaces import Scorer
from kdray.losses.uld import UNMATCHED
from kdray.rollouts.columns import unscored
from kdray.teachers.alignment import Group, align, boundaries, offset_boundaries
from kdray.types import Rollout

_CUT = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""Name of a byte token in tokenizers with byte fallback."""


def vocabulary_map(student_tokenizer: Any, teacher_tokenizer: Any, teacher_size: int) -> np.ndarray:
    """Map every teacher id to a student id: [teacher_size] int32, UNMATCHED if the student cannot produce the token's text.

    The student's id is its token of the same text, or the first of the tokens that make up the text: if the teacher continues
    with "the", a character-level student continues with "t". End of sequence is a single token for both, whatever its text; the
    names of other special tokens are not text.
    """
    student, teacher = _ids_by_text(student_tokenizer), _ids_by_text(teacher_tokenizer)
    pieces = {token_id: text for text, ids in student.items() for token_id in ids}
    special = {token_id for token_id, token in teacher_tokenizer.added_tokens_decoder.items() if token.special}
    # Some tokenizers prepend a space to every text: those get the text without its own space.
    letter = student_tokenizer("a", add_special_tokens=False)["input_ids"]
    spaced = bool(letter) and str(pieces[letter[0]]).startswith(" ")
    mapped = np.full(teacher_size, UNMATCHED, dtype=np.int32)
    longer: list[tuple[str, int]] = []
    for text, ids in teacher.items():
        inside = [token_id for token_id in ids if token_id < teacher_size]
        if len(student.get(text, ())) == 1:
            mapped[inside] = student[text][0]
        elif isinstance(text, str) and text:
            longer += [(text, token_id) for token_id in inside if token_id not in special]
    texts = [text.removeprefix(" ") if spaced else text for text, _ in longer]
    written = student_tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    for (text, token_id), given, ids in zip(longer, texts, written, strict=True):
        # Not if the student's tokenizer changes the text, or reads it as unknown.
        if not ids or _decode(student_tokenizer, ids) != given:
            continue
        piece = pieces[ids[0]]
        # Nor if it starts with a space that is not in the text.
        if isinstance(piece, bytes) or text.startswith(piece):
            mapped[token_id] = ids[0]
    # A token with the same text as the other side's end-of-sequence is not an end of sequence.
    mapped[mapped == student_tokenizer.eos_token_id] = UNMATCHED
    mapped[teacher_tokenizer.eos_token_id] = student_tokenizer.eos_token_id
    return mapped


def _ids_by_text(tokenizer: Any) -> dict[str | bytes, list[int]]:
    """Group ids by the text of their token, or by the token's name, as bytes, if it has no text of its own."""
    texts: dict[str, str] = {}
    for token in tokenizer.get_vocab():
        # SentencePiece marks the space before a word; converting a single piece to text would strip it.
        text = token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
        if text == token:
            text = tokenizer.convert_tokens_to_string([token])
        texts[token] = text
    # A character that has its own token is not written with its byte token.
    written = {text for token, text in texts.items() if not _BYTE.fullmatch(token)}
    found: dict[str | bytes, list[int]] = {}
    for token, token_id in tokenizer.get_vocab().items():
        text = texts[token]
        # Bytes that are not a character can only be matched by the token's name, which may equal another token's text.
        is_text = _CUT not in text and not (_BYTE.fullmatch(token) and text in written)
        found.setdefault(text if is_text else token.encode(), []).append(token_id)
    return found


def _decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


class CrossTokenizerScorer:
    """A Scorer (`kdray.interfaces`) around a teacher whose token ids differ from the student's."""

    def __init__(
        self,
        inner: Scorer,
        student_tokenizer: Any,
        teacher_tokenizer: Any,
        prompts: Mapping[int, np.ndarray],
        teacher_size: int,
        max_tokens: int,
    ) -> None:
        """Args: prompts: the teacher's ids of every prompt, by prompt id; teacher_size: ids that its rows cover;
              max_tokens: longest sequence that it can read.
        Raises: ConfigError if the teacher's tokenizer gives no character offsets of tokens, or has no end-of-sequence token.
        """
        if not getattr(teacher_tokenizer, "is_fast", False):
            raise ConfigError("loss.type=uld: the teacher's tokenizer has no fast version, which alone tells where tokens end")
        if teacher_tokenizer.eos_token_id is None:
            raise ConfigError("loss.type=uld: the teacher's tokenizer has no end-of-sequence token; set its eos_token")
        self.name = inner.name
        self.mapped = vocabulary_map(student_tokenizer, teacher_tokenizer, teacher_size)
        self._inner = inner
        self._student = student_tokenizer
        self._teacher = teacher_tokenizer
        self._prompts = prompts
        self._max_tokens = max_tokens

    async def score(self, rollouts: Sequence[Rollout], top_k: bool = True) -> AsyncGenerator[list[Rollout]]:
        """See `kdray.interfaces.Scorer`. The support is the teacher's, its ids mapped to the student's: UNMATCHED if it cannot
        produce the token, and one id for all tokens that it begins in the same way.

        A response gets no rows if it has no complete character, or if the teacher cannot read it to its end.
        """
        by_id = {rollout.sample_id: rollout for rollout in rollouts}
        groups: dict[int, list[Group]] = {}
        questions, without = [], []
        for rollout in rollouts:
            question = self._question(rollout, groups)
            if question is None:
                without.append(self._answer(rollout, None, []))
            else:
                questions.append(question)
        if without:
            yield without
        if questions:
            async with aclosing(self._inner.score(questions, top_k)) as stream:
                async for scored in stream:
                    yield [self._answer(by_id[one.sample_id], one, groups[one.sample_id]) for one in scored]

    def _question(self, rollout: Rollout, groups: dict[int, list[Group]]) -> Rollout | None:
        """Translate the rollout to the teacher's ids; the alignment is added to `groups`."""
        ids = rollout.token_ids.tolist()
        stopped = rollout.finish_reason == "stop"
        written = ids[:-1] if stopped else ids
        while written and not stopped and self._text(written).endswith(_CUT):
            # Truncated by max_new_tokens inside a character.
            written.pop()
        ends = boundaries(self._text, written)
        text = self._text(written)
        encoded = self._teacher(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        teacher_ids = list(encoded["input_ids"])
        teacher_ends = offset_boundaries(encoded["offset_mapping"])
        if stopped:
            # End of sequence is treated as an additional character, common to both.
            ends.append(len(text) + 1)
            teacher_ids.append(self._teacher.eos_token_id)
            teacher_ends.append(len(text) + 1)
        prompt_ids = self._prompts[rollout.prompt_id]
        if not ends or not teacher_ids or len(prompt_ids) + len(teacher_ids) > self._max_tokens:
            return None
        if teacher_ends[-1] != ends[-1]:
            # The teacher's tokenizer drops characters at the end, such as spaces.
            return None
        groups[rollout.sample_id] = align(ends, teacher_ends)
        tokens = np.array(teacher_ids, dtype=np.int32)
        return replace(
            unscored(rollout),
            prompt_ids=prompt_ids,
            token_ids=tokens,
            mixture_logprobs=None,
            student_logprobs=None,
            student_versions=np.full(len(tokens), rollout.oldest_version, dtype=np.int32),
            writer=np.full(len(tokens), rollout.writer[0]),
        )

    def _answer(self, rollout: Rollout, scored: Rollout | None, groups: Sequence[Group]) -> Rollout:
        """The student's rollout with the teacher's rows at the starts of groups."""
        length = len(rollout.token_ids)
        width = 1 if scored is None or scored.support_ids is None else scored.support_ids.shape[1]
        ids = np.full((length, width), -1, dtype=np.int32)
        logprobs = np.full((length, width), -np.inf, dtype=np.float32)
        tails, tokens = np.zeros(length, dtype=np.float32), np.zeros(length, dtype=np.float32)
        if scored is not None:
            assert scored.support_ids is not None
            assert scored.support_logprobs is not None
            assert scored.tail_logprobs is not None
            assert scored.teacher_logprobs is not None
            for group in groups:
                row = scored.support_ids[group.second_start]
                ids[group.first_start] = np.where(row >= 0, self.mapped[row.clip(min=0)], -1)
                logprobs[group.first_start] = scored.support_logprobs[group.second_start]
                tails[group.first_start] = scored.tail_logprobs[group.second_start]
                # log p of the group's text, by the chain rule over the teacher's tokens.
                tokens[group.first_start] = scored.teacher_logprobs[group.second_start : group.second_end].sum()
        return replace(
            rollout,
            teacher=self.name,
            support_ids=ids,
            support_logprobs=logprobs,
            tail_logprobs=tails,
            teacher_logprobs=tokens,
        )

    def _text(self, token_ids: Sequence[int]) -> str:
        return _decode(self._student, token_ids)
