"""Agreement of teacher and student on the meaning of token ids, without which no per-token divergence is defined."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from kdray.errors import VocabError

_REMEDY = (
    "distillation compares ids: choose student and teacher of one model family, give both the same tokenizer, or take a loss "
    "that compares texts: loss.type=uld, or loss.type=sequence with an endpoint"
)
_NAMED = 5


def check_vocab(teacher_tokenizer: Any, student_tokenizer: Any, teacher_rows: int, student_rows: int) -> int:
    """Number of ids that teacher and student share: the smaller row count of the two output matrices.

    Model families pad their matrices beyond the tokenizer, each to a different size; the rows that only one of them has are
    cut.
    Args: teacher_rows, student_rows: rows of the embedding (`vocab_size` of the model config).
    Raises: VocabError if ids name different tokens, if end-of-sequence differs, or if tokens have no row.
    """
    teacher, student = _tokens_by_id(teacher_tokenizer), _tokens_by_id(student_tokenizer)
    different = sorted(
        token_id for token_id in teacher.keys() | student.keys() if teacher.get(token_id) != student.get(token_id)
    )
    if different:
        named = "; ".join(
            f"id {token_id} is {_quote(teacher, token_id)} to the teacher, {_quote(student, token_id)} to the student"
            for token_id in different[:_NAMED]
        )
        more = f"; and {len(different) - _NAMED} more" if len(different) > _NAMED else ""
        raise VocabError(
            f"teacher and student tokenizers differ at {len(different)} of {len(teacher.keys() | student.keys())} ids: "
            f"{named}{more}; {_REMEDY}"
        )
    teacher_eos, student_eos = teacher_tokenizer.eos_token_id, student_tokenizer.eos_token_id
    if teacher_eos != student_eos:
        raise VocabError(
            f"end of sequence is id {teacher_eos} ({_quote(teacher, teacher_eos)}) to the teacher and id {student_eos} "
            f"({_quote(student, student_eos)}) to the student: one would go on where the other stops; set the same "
            "eos_token in both tokenizers (often a base model beside an instruct model)"
        )
    needed = max(teacher, default=-1) + 1
    for role, rows in (("teacher", teacher_rows), ("student", student_rows)):
        if rows < needed:
            raise VocabError(
                f"the {role} model has {rows} vocabulary rows, but its tokenizer needs {needed}; "
                "resize its embeddings, or use the tokenizer it was trained with"
            )
    return min(teacher_rows, student_rows)


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash (16 hex digits) of everything that determines tokenization: tokens, merges, special tokens and chat template."""
    content: dict[str, Any] = {
        "vocab": sorted(tokenizer.get_vocab().items()),
        "special": {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
        "chat_template": tokenizer.chat_template,
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Padding and truncation reflect the last call; they are not part of the tokenizer.
        content["backend"] = {
            key: value for key, value in json.loads(backend.to_str()).items() if key not in ("padding", "truncation")
        }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _tokens_by_id(tokenizer: Any) -> dict[int, str]:
    return {token_id: token for token, token_id in tokenizer.get_vocab().items()}


def _quote(tokens: dict[int, str], token_id: int | None) -> str:
    return repr(tokens[token_id]) if token_id in tokens else "no token"
