"""Tokenizers that agree give the shared size; those that do not are refused with the ids that differ."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kdray.errors import VocabError
from kdray.models.resolve import task_tokenizer
from kdray.models.vocab import check_vocab, tokenizer_hash


def _tokenizer(tokens: list[str], eos: str = "<eos>") -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, unk_token="<unk>")


TOKENS = ["<unk>", "<eos>", "<end>", "a", "b", "c"]


def test_rows_padded_beyond_the_tokenizer_are_cut_to_the_fewer() -> None:
    tokenizer = _tokenizer(TOKENS)
    assert check_vocab(tokenizer, _tokenizer(TOKENS), 8, 16) == 8
    assert check_vocab(tokenizer, _tokenizer(TOKENS), 16, 6) == 6


def test_differing_ids_are_named_with_both_tokens_and_counted() -> None:
    student = _tokenizer(["<unk>", "<eos>", "<end>", "b", "a", "c", "d"])
    with pytest.raises(VocabError) as caught:
        check_vocab(_tokenizer(TOKENS), student, 8, 8)
    message = str(caught.value)
    assert "3 of 7 ids" in message
    assert "id 3 is 'a' to the teacher, 'b' to the student" in message
    assert "id 6 is no token to the teacher, 'd' to the student" in message
    assert "same tokenizer" in message


def test_only_the_first_differences_are_named() -> None:
    with pytest.raises(VocabError, match=r"95 of 99 ids.*and 90 more") as caught:
        check_vocab(task_tokenizer(), _tokenizer(["<pad>", "<eos>", "<unk>", "\n"]), 99, 99)
    assert len(str(caught.value)) < 800


def test_a_token_added_to_one_side_is_a_difference() -> None:
    student = _tokenizer(TOKENS)
    student.add_tokens(["<extra>"])
    with pytest.raises(VocabError, match="id 6 is no token to the teacher, '<extra>' to the student"):
        check_vocab(_tokenizer(TOKENS), student, 8, 8)


def test_different_ends_of_sequence_are_refused() -> None:
    with pytest.raises(VocabError, match=r"id 1 \('<eos>'\) to the teacher and id 2 \('<end>'\)"):
        check_vocab(_tokenizer(TOKENS), _tokenizer(TOKENS, eos="<end>"), 8, 8)


@pytest.mark.parametrize(("rows", "role"), [((5, 8), "teacher"), ((8, 5), "student")])
def test_fewer_rows_than_tokens_are_refused(rows: tuple[int, int], role: str) -> None:
    with pytest.raises(VocabError, match=f"the {role} model has 5 vocabulary rows, but its tokenizer needs 6"):
        check_vocab(_tokenizer(TOKENS), _tokenizer(TOKENS), *rows)


def test_the_hash_tells_tokenizers_apart_and_ignores_how_they_were_called() -> None:
    tokenizer = _tokenizer(TOKENS)
    first = tokenizer_hash(tokenizer)
    tokenizer("a b c", truncation=True, max_length=2)
    assert tokenizer_hash(tokenizer) == first == tokenizer_hash(_tokenizer(TOKENS))
    assert tokenizer_hash(_tokenizer(["<unk>", "<eos>", "<end>", "b", "a", "c"])) != first
    assert tokenizer_hash(_tokenizer(TOKENS, eos="<end>")) != first
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_hash(tokenizer) != first
