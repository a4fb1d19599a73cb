"""A teacher with another tokenizer: what it is asked, where its rows stand, and which ids are the same."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kdray.config import ULDLoss
from kdray.errors import ConfigError
from kdray.losses import LossBatch, loss_function
from kdray.losses.uld import UNMATCHED
from kdray.models.resolve import task_tokenizer
from kdray.rollouts.batching import rollouts_to_batch
from kdray.teachers.alignment import align, boundaries
from kdray.teachers.cross_tokenizer import CrossTokenizerScorer, vocabulary_map
from kdray.types import WRITERS, Rollout, written_by

LINES = ["last letters of the words", "the coin is still heads up", "naïve 对话"]


def byte_level(size: int, eos: str, lines: Sequence[str] = LINES) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=[eos], show_progress=False)
    tokenizer.train_from_iterator([*lines] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


CHARACTERS, SMALL, LARGE = task_tokenizer(), byte_level(270, "<end>"), byte_level(330, "</s>")


class Bigram:
    """An exact teacher over its own ids: the next one depends on the last alone."""

    name = "other"

    def __init__(self, size: int, seed: int = 0, top_k: int = 5) -> None:
        self.rows = np.log(np.random.default_rng(seed).dirichlet(np.full(size, 0.3), size=size) + 1e-12)
        self.top_k = top_k
        self.asked: list[Rollout] = []

    async def score(self, rollouts: Sequence[Rollout], top_k: bool = True) -> AsyncGenerator[list[Rollout]]:
        for rollout in rollouts:
            self.asked.append(rollout)
            rows = self.rows[[int(rollout.prompt_ids[-1]), *rollout.token_ids[:-1]]]
            ids = np.argsort(-rows, axis=1)[:, : self.top_k].astype(np.int32)
            logprobs = np.take_along_axis(rows, ids.astype(np.int64), axis=1)
            yield [
                replace(
                    rollout,
                    teacher=self.name,
                    support_ids=ids,
                    support_logprobs=logprobs.astype(np.float32),
                    # All of its ids leave nothing.
                    tail_logprobs=(
                        np.full(len(rows), -np.inf, np.float32)
                        if ids.shape[1] == rows.shape[1]
                        else np.log(1 - np.exp(logprobs).sum(1)).astype(np.float32)
                    ),
                    teacher_logprobs=rows[np.arange(len(rows)), rollout.token_ids].astype(np.float32),
                )
            ]


def rollout(tokenizer: Any, text: str, stop: bool = True, sample_id: int = 0, ids: list[int] | None = None) -> Rollout:
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"] if ids is None else ids
    tokens = np.array([*tokens, *([tokenizer.eos_token_id] if stop else [])], np.int32)
    blank = np.zeros(len(tokens), np.float32)
    versions = np.full(len(tokens), 4, np.int32)
    prompt = np.array([3, 5], np.int32)
    return Rollout(sample_id, 7, prompt, tokens, blank, blank, versions, 0.0, "stop" if stop else "length")


def scorer(student: Any, teacher: Any, inner: Bigram, max_tokens: int = 100) -> CrossTokenizerScorer:
    return CrossTokenizerScorer(inner, student, teacher, {7: np.array([9, 8, 2], np.int32)}, len(teacher), max_tokens)


async def score(one: CrossTokenizerScorer, *rollouts: Rollout) -> list[Rollout]:
    return sorted([r async for part in one.score(rollouts) for r in part], key=lambda r: r.sample_id)


def test_a_token_is_the_students_first_one_of_its_text() -> None:
    mapped = vocabulary_map(SMALL, LARGE, len(LARGE))
    small, large = SMALL.get_vocab(), LARGE.get_vocab()
    for token, token_id in large.items():
        if token == "</s>":
            assert mapped[token_id] == SMALL.eos_token_id
        elif token in small and token != "<end>":
            assert mapped[token_id] == small[token]
        elif "\N{REPLACEMENT CHARACTER}" not in (text := LARGE.decode([token_id])):
            assert mapped[token_id] == SMALL(text, add_special_tokens=False)["input_ids"][0]
    assert (vocabulary_map(CHARACTERS, CHARACTERS, len(CHARACTERS)) == np.arange(len(CHARACTERS))).all()
    # A space is written otherwise inside byte-level tokens, and is the same text.
    letters = vocabulary_map(CHARACTERS, LARGE, len(LARGE))
    assert letters[large["Ġ"]] == CHARACTERS.get_vocab()[" "]
    assert letters[large["Ġthe"]] == CHARACTERS.get_vocab()[" "]
    piece = max((token for token in large if token.isascii() and token.isalpha()), key=len)
    assert len(piece) > 1
    assert letters[large[piece]] == CHARACTERS.get_vocab()[piece[0]]
    # Bytes of characters that the student has not.
    assert letters[large["å"]] == UNMATCHED


def sentence_pieces(spaced: bool) -> Any:
    """Words begin with a mark, a sequence with its own token, unknown characters fall back to bytes; `spaced`: a space is put
    before every text."""
    tokens = ["<unk>", "</s>", "<s>", "▁", "a", "b", "▁a", "å", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True))
    mark = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), mark]) if spaced else mark
    read = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*read, decoders.Strip(" ", 1, 0)] if spaced else read)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("spaced", [False, True])
def test_sentence_pieces_and_bytes_are_told_from_letters(spaced: bool) -> None:
    pieces = sentence_pieces(spaced)
    teacher = byte_level(280, "<end>", ["abab aba"])
    teacher.add_special_tokens({"additional_special_tokens": ["<|a|>"]})
    mapped, ids, names = vocabulary_map(pieces, teacher, len(teacher)), teacher.get_vocab(), pieces.convert_ids_to_tokens

    def student(token: str) -> str:
        return str(names(int(mapped[ids[token]])))

    assert student("a") == "a", "not the one with a space before it, nor the byte that only stands in for it"
    assert student("b") == "b"
    assert student("Ġ") == "▁"
    assert student("Ċ") == "<0x0A>", "the only token that writes a line break"
    assert student("Ġaba") == "▁a"
    # Without a space before it a text is not what such a tokenizer writes; better no counterpart than a wrong one.
    assert mapped[ids["ab"]] == UNMATCHED if spaced else student("ab") == "a"
    assert mapped[ids["å"]] == UNMATCHED, "the byte that is named so is not the letter"
    assert mapped[ids["<|a|>"]] == UNMATCHED, "the name of a special token is not written"
    assert vocabulary_map(teacher, pieces, len(pieces))[pieces.convert_tokens_to_ids("<0xE5>")] == UNMATCHED


def test_a_text_that_the_student_would_change_has_no_counterpart() -> None:
    """Its first letter alone would look right."""
    student, teacher = merges([]), byte_level(280, "<end>", ["aB aB"])
    student.backend_tokenizer.normalizer = normalizers.Lowercase()
    mapped, ids = vocabulary_map(student, teacher, len(teacher)), teacher.get_vocab()
    assert mapped[ids["a"]] == student.get_vocab()["a"]
    assert mapped[ids["aB"]] == UNMATCHED


def test_a_teacher_without_an_end_is_refused() -> None:
    endless = byte_level(270, "<end>")
    endless.eos_token = None
    with pytest.raises(ConfigError, match="end-of-sequence"):
        scorer(CHARACTERS, endless, Bigram(len(endless)))


async def test_the_same_tokenizer_gives_the_teachers_own_columns() -> None:
    inner = Bigram(len(CHARACTERS))
    given = rollout(CHARACTERS, "abc de")
    given = replace(given, writer=written_by("data", len(given.token_ids)))
    (found,) = await score(scorer(CHARACTERS, CHARACTERS, inner), given)
    (asked,) = inner.asked
    assert asked.token_ids.tolist() == found.token_ids.tolist()
    assert asked.prompt_ids.tolist() == [9, 8, 2]
    assert asked.student_versions.tolist() == [4] * 7
    assert asked.writer.tolist() == [WRITERS.index("data")] * 7
    assert asked.writer.dtype == given.writer.dtype
    assert asked.mixture_logprobs is None, "those are of the student's tokens"
    assert asked.student_logprobs is None
    (plain,) = [part async for part in inner.score([asked])]
    for name in ("support_ids", "support_logprobs", "tail_logprobs", "teacher_logprobs"):
        np.testing.assert_allclose(getattr(found, name), getattr(plain[0], name))
    assert found.teacher == "other"
    assert found.prompt_ids.tolist() == [3, 5]


@pytest.mark.parametrize("stop", [True, False])
async def test_rows_stand_where_groups_begin(stop: bool) -> None:
    """Characters against pieces: a piece's row is that of its first character, and its log p is the whole piece's."""
    inner = Bigram(len(LARGE))
    text = "the coin is heads"
    (found,) = await score(scorer(CHARACTERS, LARGE, inner), rollout(CHARACTERS, text, stop))
    encoded = LARGE(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in encoded["offset_mapping"]] + ([len(text)] if stop else [])
    teacher_ids = encoded["input_ids"] + ([LARGE.eos_token_id] if stop else [])
    assert len(teacher_ids) < len(text)
    assert inner.asked[0].token_ids.tolist() == teacher_ids
    assert found.support_ids is not None
    assert found.support_logprobs is not None
    assert found.teacher_logprobs is not None
    assert np.flatnonzero((found.support_ids != -1).any(1)).tolist() == starts
    mapped = vocabulary_map(CHARACTERS, LARGE, len(LARGE))
    before = [2, *teacher_ids[:-1]]
    for start, last, token in zip(starts, before, teacher_ids, strict=True):
        masses: dict[int, float] = {}
        for token_id in np.argsort(-inner.rows[last])[:5]:
            masses[mapped[token_id]] = masses.get(mapped[token_id], 0.0) + np.exp(inner.rows[last][token_id])
        ids = found.support_ids[start]
        ranked = np.sort(inner.rows[last])[::-1][:5]
        np.testing.assert_allclose(found.support_logprobs[start], ranked, rtol=1e-5, err_msg="the teacher's own, unmerged")
        for token_id, mass in masses.items():
            got = np.exp(found.support_logprobs[start][ids == token_id].astype(float)).sum()
            assert got == pytest.approx(mass, rel=1e-5)
        assert found.teacher_logprobs[start] == pytest.approx(inner.rows[last][token], rel=1e-6)
    others = np.setdiff1d(np.arange(len(found.token_ids)), starts)
    assert (found.teacher_logprobs[others] == 0).all()
    assert (found.support_logprobs[others] == -np.inf).all()


async def test_a_response_cut_inside_a_character_is_scored_up_to_it() -> None:
    ids = SMALL("naïve 对", add_special_tokens=False)["input_ids"][:-1]
    inner = Bigram(len(LARGE))
    (found,) = await score(scorer(SMALL, LARGE, inner), rollout(SMALL, "", stop=False, ids=ids))
    assert LARGE.decode(inner.asked[0].token_ids) == "naïve "
    assert found.support_ids is not None
    assert (found.support_ids[-1] == -1).all()
    assert (found.support_ids[0] != -1).any()


async def test_what_the_teacher_cannot_read_has_no_rows_and_the_rest_is_scored() -> None:
    inner = Bigram(len(LARGE))
    one = scorer(CHARACTERS, LARGE, inner, max_tokens=8)
    short, long = await score(
        one, rollout(CHARACTERS, "the"), rollout(CHARACTERS, "the coin is still heads up" * 3, sample_id=1)
    )
    assert [asked.sample_id for asked in inner.asked] == [0]
    assert long.support_ids is not None
    assert long.teacher_logprobs is not None
    assert short.support_ids is not None
    assert long.support_ids.tolist() == [[-1]] * len(long.token_ids), "no wider than it has to be"
    assert (long.teacher_logprobs == 0).all()
    assert (short.support_ids != -1).any()


async def test_a_response_of_which_the_teacher_reads_nothing_has_no_rows() -> None:
    """A teacher whose tokenizer strips spaces, and a response of nothing else that was cut: it has no token at all."""
    stripping = byte_level(270, "<end>")
    stripping.backend_tokenizer.normalizer = normalizers.Strip()
    assert stripping("   ", add_special_tokens=False)["input_ids"] == []
    inner = Bigram(len(stripping))
    (found,) = await score(scorer(CHARACTERS, stripping, inner), rollout(CHARACTERS, "   ", stop=False))
    assert not inner.asked
    assert found.support_ids is not None
    assert (found.support_ids == -1).all()


async def test_an_empty_response_is_its_end() -> None:
    inner = Bigram(len(LARGE))
    (found,) = await score(scorer(CHARACTERS, LARGE, inner), rollout(CHARACTERS, ""))
    assert inner.asked[0].token_ids.tolist() == [LARGE.eos_token_id]
    assert found.teacher_logprobs is not None
    assert found.teacher_logprobs[0] == pytest.approx(inner.rows[2][LARGE.eos_token_id], rel=1e-6)


async def test_without_the_matched_term_the_loss_is_the_papers() -> None:
    """Universal Logit Distillation written from the paper: both rows sorted, the shorter one padded, sum of |differences|."""
    inner = Bigram(len(LARGE), top_k=len(LARGE))
    text = "the coin is heads"
    (found,) = await score(scorer(CHARACTERS, LARGE, inner), rollout(CHARACTERS, text))
    batch = LossBatch.from_train_batch(rollouts_to_batch([found], 1), len(CHARACTERS))
    logits = torch.randn(
        *batch.token_ids.shape, len(CHARACTERS), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    settings = ULDLoss(type="uld", sorted_weight=1.0, matched_weight=0.0)
    encoded = LARGE(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in encoded["offset_mapping"]] + [len(text)]
    mapped = vocabulary_map(CHARACTERS, LARGE, len(LARGE))
    assert len(set(mapped[mapped >= 0].tolist())) < (mapped >= 0).sum(), "some of the teacher's tokens begin alike"
    expected = 0.0
    for start, last in zip(starts, [2, *encoded["input_ids"]], strict=True):
        p = np.sort(np.exp(inner.rows[last]))[::-1]
        q = np.sort(torch.softmax(logits[0, 2 + start], -1).numpy())[::-1]
        length = max(len(p), len(q))
        expected += np.abs(np.pad(p, (0, length - len(p))) - np.pad(q, (0, length - len(q)))).sum()
    assert loss_function(settings)(logits, batch, settings).total.item() == pytest.approx(expected, rel=1e-5)


def merges(pairs: Sequence[tuple[str, str]]) -> Any:
    """Four letters, the given pieces of them, and a full stop that ends a text."""
    vocabulary = {token: index for index, token in enumerate([*".abcd", *("".join(pair) for pair in pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(pairs)))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=".")


class Student:
    """A bigram table over its own ids, trained on what it draws: nothing but the loss tells it of the teacher."""

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self.tokenizer = tokenizer
        self.table = torch.zeros(len(tokenizer), len(tokenizer), requires_grad=True)
        self.optimizer = torch.optim.Adam([self.table], lr=0.1)
        self.draws = np.random.default_rng(seed)

    def sample(self, count: int) -> list[Rollout]:
        distribution = self.table.detach().double().softmax(-1).numpy()
        found = []
        for sample_id in range(count):
            ids = [0]
            while len(ids) == 1 or (ids[-1] != self.tokenizer.eos_token_id and len(ids) <= 12):
                ids.append(int(self.draws.choice(len(distribution), p=distribution[ids[-1]])))
            tokens = np.array(ids[1:], np.int32)
            logprobs = np.log(distribution[ids[:-1], ids[1:]]).astype(np.float32)
            reason = "stop" if ids[-1] == self.tokenizer.eos_token_id else "length"
            versions = np.zeros(len(tokens), np.int32)
            found.append(Rollout(sample_id, 7, np.zeros(1, np.int32), tokens, logprobs, logprobs, versions, 0.0, reason))
        return found

    def learn(self, rollouts: list[Rollout], settings: ULDLoss) -> None:
        batch = rollouts_to_batch(rollouts, 1)
        logits = self.table[torch.from_numpy(np.roll(batch.token_ids, 1, axis=1)).long()]
        loss = loss_function(settings)(logits, LossBatch.from_train_batch(batch, len(self.table)), settings).total
        self.optimizer.zero_grad()
        (loss / batch.num_target_tokens).backward()
        self.optimizer.step()


async def compare(one: CrossTokenizerScorer, student: Student, inner: Bigram, teacher: Any) -> tuple[float, float]:
    """Of 120 fresh texts: log q - log p, nats a character; share of groups where both would go on alike."""
    rollouts = student.sample(120)
    inner.asked.clear()
    await score(one, *rollouts)
    distribution, gap, alike, groups = student.table.detach().numpy(), 0.0, 0, 0
    for own, asked in zip(rollouts, inner.asked, strict=True):
        assert own.student_logprobs is not None
        read = [int(asked.prompt_ids[-1]), *asked.token_ids.tolist()]
        written = [0, *own.token_ids.tolist()]
        gap += own.student_logprobs.sum() - inner.rows[read[:-1], read[1:]].sum()
        ends = [boundaries(student.tokenizer.decode, written[1:]), boundaries(teacher.decode, read[1:])]
        for group in align(*ends):
            first = student.tokenizer.decode([int(distribution[written[group.first_start]].argmax())])
            alike += teacher.decode([int(inner.rows[read[group.second_start]].argmax())]).startswith(first)
            groups += 1
    return gap / sum(len(student.tokenizer.decode(rollout.token_ids)) for rollout in rollouts), alike / groups


RICH = merges([("a", "b"), ("b", "c"), ("c", "d"), ("d", "a"), ("ab", "c")])


@pytest.mark.parametrize("pairs", [[], [("a", "b"), ("c", "d")]], ids=["letters", "other pieces"])
async def test_a_student_moves_towards_a_teacher_of_other_pieces(pairs: list[tuple[str, str]]) -> None:
    """Its own texts become likely to the teacher, and it goes on as the teacher would.

    With ids matched by equal text alone, the distance does not fall: pieces that the student lacks are worth nothing then.
    """
    tokenizer, settings = merges(pairs), ULDLoss(type="uld")
    gaps = []
    for seed in range(3):
        inner, student = Bigram(len(RICH), seed, top_k=8), Student(tokenizer, seed + 1)
        one = CrossTokenizerScorer(inner, tokenizer, RICH, {7: np.zeros(1, np.int32)}, len(RICH), 100)
        before = await compare(one, student, inner, RICH)
        for _ in range(50):
            student.learn(await score(one, *student.sample(16)), settings)
        after = await compare(one, student, inner, RICH)
        assert after[1] > before[1] + 0.5, seed
        gaps.append((before[0], after[0]))
    before_mean, after_mean = np.mean(gaps, axis=0)
    assert after_mean < 0.8 * before_mean


async def test_a_groups_log_p_is_the_sum_over_all_of_the_teachers_tokens() -> None:
    """A teacher of letters against a student of pieces: several of its tokens make one of the student's."""
    inner = Bigram(len(CHARACTERS))
    (found,) = await score(scorer(LARGE, CHARACTERS, inner), rollout(LARGE, "the coin is heads"))
    (asked,) = inner.asked
    assert len(asked.token_ids) > len(found.token_ids)
    rows = inner.rows[[2, *asked.token_ids[:-1]]]
    assert found.support_logprobs is not None
    assert found.tail_logprobs is not None
    starts, ends = np.flatnonzero((found.support_logprobs > -np.inf).any(1)), boundaries(LARGE.decode, found.token_ids.tolist())
    assert len(starts) == len(found.token_ids), "every token of the student's begins a group"
    assert found.support_ids is not None
    mapped = vocabulary_map(LARGE, CHARACTERS, len(CHARACTERS))
    for start in starts:
        # The row of the group's first letter, not of a later one.
        row = rows[0 if start == 0 else ends[start - 1]]
        order = np.argsort(-row)[:5]
        assert found.support_ids[start].tolist() == mapped[order].tolist()
        np.testing.assert_allclose(found.support_logprobs[start], row[order], rtol=1e-5)
        # The tail is the rest of that row, too.
        assert np.exp(found.tail_logprobs[start]) == pytest.approx(1 - np.exp(row[order]).sum(), rel=1e-4)
    assert found.teacher_logprobs is not None
    assert found.teacher_logprobs.sum() == pytest.approx(rows[np.arange(len(rows)), asked.token_ids].sum(), rel=1e-5)
