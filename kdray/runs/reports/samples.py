"""Samples of a run for its report: held-out answers side by side, and training samples; by token where they are stored so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from kdray.errors import DataError
from kdray.rollouts.arrow import old_writer
from kdray.runs.folder import RunFolder
from kdray.runs.reports.pages import show
from kdray.runs.results.comparison import OUTCOMES
from kdray.runs.results.draws import read_draws

_MAX_FILES = 6
_MAX_PER_FILE = 8
_FULL_SHADE = 2.0
"""Nats at a token from which on its shade is the strongest."""
_END = "[end]"
"""Shown for tokens after the text, such as the end of sequence."""


@dataclass(frozen=True)
class Piece:
    """Text of a token and its divergence."""

    text: str
    kl: float

    @property
    def shade(self) -> float:
        return round(min(max(self.kl, 0.0) / _FULL_SHADE, 1.0) * 0.7, 2)


@dataclass(frozen=True)
class Answer:
    """Response to a held-out prompt."""

    by: str
    text: str
    right: bool | None
    reverse_kl: str | None
    pieces: list[Piece]
    rest: str
    """Text after the tokens that are stored one by one."""

    @property
    def highest(self) -> Piece | None:
        return max(self.pieces, key=lambda piece: piece.kl, default=None)


@dataclass
class Question:
    """Held-out prompt with the answers to it: the teacher's first, then the student's in the order of a run."""

    prompt: str
    reference: str | None
    """The data's own answer; None if there is none, and in samples of versions that did not store it."""
    answers: list[Answer]


def heldout(folder: RunFolder) -> list[Question]:
    """Read the stored held-out prompts and all answers to each."""
    order = ("teacher", *(name for name in OUTCOMES if name != "teacher"))
    files = {name: folder.samples / f"heldout-{name}.parquet" for name in order}
    rows = {name: _read(path) for name, path in files.items() if path.exists()}
    graded = {name: _graded(folder.evaluations / f"{name}.parquet") for name in rows}
    questions: dict[int, Question] = {}
    for name, found in rows.items():
        for row in found:
            prompt_id = row["prompt_id"]
            question = questions.setdefault(prompt_id, Question(text_of(row, "prompt"), None, []))
            # A run that was begun by an earlier version and resumed has files without it beside others.
            question.reference = question.reference or row.get("reference")
            pieces, rest = _pieces(row)
            kl = None if row["reverse_kl"] is None else show(row["reverse_kl"])
            if name == "teacher":
                # At the teacher's own answers, the distance of a student says nothing about them.
                pieces, rest, kl = [], "", None
            answer = Answer(name, text_of(row, "response"), graded[name].get(prompt_id), kl, pieces, rest)
            question.answers.append(answer)
    return list(questions.values())


def training_samples(folder: Path) -> list[dict[str, Any]]:
    """Read a few files of training samples, evenly spaced from the first to the last."""
    files = sorted(folder.glob("step-*.parquet"))
    if len(files) > _MAX_FILES:
        spacing = (len(files) - 1) / (_MAX_FILES - 1)
        files = [files[round(index * spacing)] for index in range(_MAX_FILES)]
    rows: list[dict[str, Any]] = []
    for path in files:
        for row in _read(path)[:_MAX_PER_FILE]:
            pieces, rest = _pieces(row)
            texts = {column: text_of(row, column) for column in ("prompt", "response")}
            rows.append(_with_writer(row) | texts | {"reverse_kl": show(row["reverse_kl"]), "pieces": pieces, "rest": rest})
    return rows


def _graded(path: Path) -> dict[int, bool | None]:
    """Right or wrong, by prompt, of the first draw, which is the one whose text is stored."""
    return {draw.prompt_id: draw.exact_match for draw in read_draws(path) if draw.draw == 0} if path.is_file() else {}


def _pieces(row: Mapping[str, Any]) -> tuple[list[Piece], str]:
    """Tokens with a text of their own and the largest KL since the one before, and the text after them."""
    texts, kls = row.get("token_texts"), row.get("token_reverse_kl")
    if not texts or not kls:
        return [], ""
    pieces: list[Piece] = []
    largest = None
    for text, kl in zip(texts, kls, strict=True):
        if kl is not None:
            largest = kl if largest is None else max(largest, kl)
        if text:
            pieces.append(Piece(text, largest or 0.0))
            largest = None
    if largest is not None:
        pieces.append(Piece(_END, largest))
    return pieces, (row["response"] or "")[len("".join(texts)) :]


def _with_writer(row: dict[str, Any]) -> dict[str, Any]:
    """Add the name of the writer to a sample, which older versions did not store."""
    if row.get("writer") is not None:
        return row
    writer = old_writer(row["alpha"])
    return row | {"writer": writer, "alpha": 0.0 if writer == "data" else row["alpha"]}


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        return pq.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise DataError(f"{path}: not a readable Parquet file: {error}; remove it") from error


def text_of(row: Mapping[str, Any], column: str) -> str:
    """Return the text of a sample; if the run had no decoder, the ids of a response."""
    if row[column] is None:
        return str(row["token_ids"]) if column == "response" else "–"
    return row[column]
