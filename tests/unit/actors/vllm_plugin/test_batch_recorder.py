"""A batch's draws and records, against the plain computation, and what they ask of the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from actors.vllm_plugin import batch_recorder
from actors.vllm_plugin.batch_recorder import BatchRecorder, Chunk, Request
from actors.vllm_plugin.record_table import FLOATS, INTS, Slab
from actors.vllm_plugin.row_statistics import Rows, RowStatistics
from tests.support import plain_recorder as plain
from tests.support.plain_recorder import ByteMeter, NoTransfers, random_rows

torch.set_num_threads(1)
CPU, META = torch.device("cpu"), torch.device("meta")
TOP = (6, 3)
VOCAB = 60


def recorder(device: torch.device = CPU, keeps_records: bool = True, top: tuple[int, int] = TOP) -> BatchRecorder:
    return BatchRecorder(RowStatistics(*top, record_hidden=False), device, keeps_records)


def sampling(key: str, seed: int = 0, alpha: float = 0.4) -> Request:
    return Request(key, False, [], alpha, seed)


def begin(found: BatchRecorder, requests: dict[int, Request]) -> None:
    for request in requests.values():
        found.admit(request.key)
    found.set_batch(requests)


def column(slab: Slab, name: str) -> np.ndarray:
    layout, values = (FLOATS, slab.floats) if name in FLOATS.names else (INTS, slab.ints)
    place = layout.names.index(name)
    return values[:, place] if place < len(layout.single) else values[:, len(layout.single) :]


def check(slab: Slab, expected: list[plain.Columns]) -> None:
    for name in expected[0]:
        want = torch.cat([each[name] for each in expected]).squeeze(-1).numpy()
        assert np.allclose(column(slab, name), want, rtol=2e-6, atol=2e-6), name


@pytest.mark.parametrize("rows_of", [lambda index: index, lambda index: 2 * index + 1], ids=["in place", "scattered"])
def test_every_step_draws_and_records_as_the_plain_computation(rows_of: Callable[[int], int]) -> None:
    """Seeds of 64 bits, own alphas, own positions; rows of other requests in between stay as they are."""
    rng = np.random.default_rng(0)
    requests = {
        rows_of(index): sampling(str(index), int(rng.integers(0, 2**64, dtype=np.uint64)), [0.0, 0.3, 1.0][index % 3])
        for index in range(9)
    }
    tokens: dict[int, list[int]] = {row: [] for row in requests}
    requests = {row: replace(request, drawn=tokens[row]) for row, request in requests.items()}
    found = recorder()
    begin(found, requests)
    expected: dict[str, list[plain.Columns]] = {request.key: [] for request in requests.values()}
    size = rows_of(8) + 2
    for step in range(12):
        rows = random_rows(size, VOCAB, seed=step)
        assert rows.teacher is not None
        logits = rows.teacher.clone()
        found.advance()
        found.sample(logits, rows, student_version=step)
        for row, request in requests.items():
            own = Rows(*(None if each is None else each[row : row + 1] for each in rows))
            alpha = torch.tensor([[request.alpha]])
            token = plain.drawn(own, alpha, [request.seed], [step])
            assert logits[row].argmax() == token
            expected[request.key].append(plain.columns(own, token, alpha, TOP))
            tokens[row].append(int(token))
        others = [row for row in range(size) if row not in requests]
        assert torch.equal(logits[others], rows.teacher[others])
    slabs = found.take([(request.key, 12) for request in requests.values()])
    for slab, request in zip(slabs, requests.values(), strict=True):
        check(slab, expected[request.key])
        assert column(slab, "student_versions").tolist() == list(range(12))
    assert not found.cells


@pytest.mark.parametrize("ran", [True, False], ids=["beside others", "alone"])
def test_requests_of_the_student_alone_read_nothing_of_the_teacher(ran: bool) -> None:
    """Beside requests that need the teacher, it computes rows for them from keys and values that it never wrote."""
    found = BatchRecorder(RowStatistics(*TOP, record_hidden=True), CPU, True)
    alone = [replace(sampling(str(row), seed=row, alpha=0.0), student_only=True) for row in range(4)]
    begin(found, {row: alone[row] if row % 2 == 0 or not ran else sampling(f"mixed {row}", seed=row) for row in range(4)})
    assert found.student_only_rows == (2 if ran else 4)
    rows = random_rows(4, VOCAB, seed=3)
    assert rows.teacher is not None
    assert rows.hidden is not None
    logits = torch.full((4, VOCAB), -1.0)
    broken = rows._replace(teacher=rows.teacher.clone(), hidden=rows.hidden.clone())
    for part in (broken.teacher, broken.hidden):
        assert part is not None
        part[::2] = torch.nan
    found.sample(logits, broken if ran else Rows(None, rows.student, None), 7)
    for row in (0, 2):
        own = Rows(None, None if rows.student is None else rows.student[row : row + 1], None)
        token = plain.drawn(own, torch.zeros(1, 1), [row], [0])
        assert logits[row].argmax() == token
        (slab,) = found.take([(str(row), 1)])
        assert column(slab, "student_logprobs") == column(slab, "mixture_logprobs") == own.student[0, token].numpy()
        assert np.isnan(column(slab, "teacher_logprobs")).all()
        assert (slab.hidden.shape, column(slab, "support_ids").shape) == ((1, 0), (1, 0))
    if ran:
        (mixed,) = found.take([("mixed 1", 1)])
        own = Rows(*(None if each is None else each[1:2] for each in rows))
        alpha = torch.tensor([[0.4]])
        check(mixed, [plain.columns(own, plain.drawn(own, alpha, [1], [0]), alpha, TOP)])


def test_a_position_evaluated_again_replaces_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """As partial prefills do. Surplus positions are cut off, missing ones are refused by name."""
    tokens: list[int] = []
    request = replace(sampling("a"), drawn=tokens)
    found = recorder()
    begin(found, {0: request})
    for seed in (1, 2):
        rows = random_rows(1, VOCAB, seed)
        found.sample(torch.zeros(1, VOCAB), rows, 0)
    tokens.append(0)
    found.advance()
    found.sample(torch.zeros(1, VOCAB), random_rows(1, VOCAB, 3), 0)
    (slab,) = found.take([("a", 1)])
    alpha = torch.tensor([[request.alpha]])
    second = random_rows(1, VOCAB, 2)
    check(slab, [plain.columns(second, plain.drawn(second, alpha, [0], [0]), alpha, TOP)])
    found.admit("b")
    with pytest.raises(KeyError, match=r"request b: positions \[0, 1\] of 2 were never recorded"):
        found.take([("b", 2)])


def test_a_request_that_returns_keeps_its_records() -> None:
    found = recorder()
    begin(found, {0: sampling("a")})
    found.sample(torch.zeros(1, VOCAB), random_rows(1, VOCAB, 1), 0)
    begin(found, {3: sampling("a")})
    assert found.readmitted == 1
    assert found.held_positions() == 1
    found.drop(["a"])
    assert found.held_positions() == 0


def test_kept_keys_and_values_make_a_token_as_old_as_they_are() -> None:
    """Beside requests whose keys and values are the present student's; an update that no request has seen makes none newer."""
    found = recorder()
    begin(found, {0: sampling("new"), 1: replace(sampling("old"), kv_version=3), 2: replace(sampling("newer"), kv_version=8)})
    found.sample(torch.zeros(3, VOCAB), random_rows(3, VOCAB, 1), student_version=5)
    versions = [column(slab, "student_versions").item() for slab in found.take([("new", 1), ("old", 1), ("newer", 1)])]
    assert versions == [5, 3, 5]


def test_tokens_of_requests_that_return_are_counted() -> None:
    found = recorder()
    for tokens in (4, 9, 11):
        found.admit("a", tokens)
    assert (found.readmitted, found.recomputed_tokens) == (2, 20)


def test_a_large_batch_is_measured_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(23, VOCAB, seed=8)
    requests = {row: sampling(str(row), seed=row) for row in range(23)}
    results = []
    for limit in (256, 5):
        monkeypatch.setattr(batch_recorder, "CHUNK_ROWS", limit)
        found = recorder()
        begin(found, requests)
        logits = torch.full((23, VOCAB), -1.0)
        found.sample(logits, rows, 0)
        results.append((logits, found.checksum(), found.take([(str(row), 1) for row in range(23)])))
    (one, checksum, slabs), (other, same, chunked) = results
    assert torch.equal(one, other)
    assert checksum == same
    for slab, part in zip(slabs, chunked, strict=True):
        assert np.array_equal(slab.floats, part.floats)


# ----------------------------------------------------------------------------------------------------- the device's view


class Kept:
    """Readback that leaves everything on the device."""

    def __init__(self) -> None:
        self.sent: list[Sequence[torch.Tensor]] = []

    def send(self, tensors: Sequence[torch.Tensor]) -> Any:
        self.sent.append(tensors)


@pytest.mark.parametrize("shift", [0, 1], ids=["in place", "scattered"])
@pytest.mark.parametrize("keeps_records", [True, False])
def test_a_decode_step_transfers_nothing_and_reads_the_rows_few_times(shift: int, keeps_records: bool) -> None:
    """On tensors without values, of a real size: any value that Python asked for would raise."""
    rows, vocab = 256, 152_064
    found = recorder(META, keeps_records, top=(32, 16))
    kept = Kept()
    found.readback = kept  # type: ignore[assignment]
    begin(found, {row + shift: sampling(str(row), seed=2**63 + row) for row in range(rows)})
    full = [torch.empty(rows + shift, vocab, device=META) for _ in range(3)]
    with NoTransfers(), ByteMeter(rows, vocab) as meter:
        found.sample(full[0], Rows(full[1], full[2], None), 0)
    # Scattered rows are gathered first: two arrays read and written.
    assert meter.passes < (21 if keeps_records else 7) + 4 * shift
    assert len(kept.sent) == keeps_records
    if keeps_records:
        assert [tuple(each.shape) for each in kept.sent[0]] == [(rows, 54), (rows, 50), (rows, 0)]


@pytest.mark.parametrize(
    "transfer",
    [
        lambda values: values[0, 0].item(),
        lambda values: values.tolist(),
        lambda values: values.numpy(),
        lambda values: values.cpu(),
        lambda values: values.nonzero(),
        lambda values: values[values > 1],
        lambda values: values.copy_(torch.zeros(2, 3)),
        lambda values: torch.tensor([1, 2], device=META),
        lambda values: torch.tensor([1, 2]).to(META),
    ],
)
def test_the_guard_sees_a_transfer(transfer: Callable[[torch.Tensor], object]) -> None:
    values = torch.empty(2, 3, device=META)
    # Any refusal will do: the guard asserts, and torch itself refuses some of these for a tensor without data, before the guard
    # sees them, each with an exception of its own.
    with pytest.raises((AssertionError, NotImplementedError, RuntimeError, TypeError)), NoTransfers():
        transfer(values)


def test_the_meter_counts_what_is_read_and_written() -> None:
    values = torch.arange(6.0).reshape(2, 3)
    with ByteMeter(2, 3) as meter:
        (values + values).sum(-1)
    assert meter.passes == pytest.approx(4 + 1 / 3)
    index = torch.tensor([[1], [1]])
    with ByteMeter(2, 3) as meter:
        values.gather(-1, index)
    assert meter.passes == pytest.approx((2 * 16 + 8) / 24)


# --------------------------------------------------------------------------------------------------------------- ranks


def test_another_rank_draws_the_same_and_records_nothing() -> None:
    first, other = recorder(), recorder(keeps_records=False)
    requests = {row: sampling(str(row), seed=row) for row in range(6)}
    forced = []
    for found in (first, other):
        begin(found, requests)
        logits = torch.full((6, VOCAB), -1.0)
        found.sample(logits, random_rows(6, VOCAB, 1), 0)
        forced.append(logits)
    assert torch.equal(*forced)
    assert first.checksum() == other.checksum()
    assert first.held_positions() == 6
    assert other.held_positions() == 0
    assert not other.cells


def test_one_token_drawn_otherwise_changes_the_checksum() -> None:
    rows = random_rows(6, VOCAB, 1)
    requests = {row: sampling(str(row), seed=row) for row in range(6)}
    sums = set()
    for disturbed in (None, *range(6)):
        found = recorder(keeps_records=False)
        begin(found, requests)
        own = Rows(*(None if each is None else each.clone() for each in rows))
        if disturbed is not None:
            assert own.teacher is not None
            assert own.student is not None
            # The last token becomes certain.
            own.teacher[disturbed] = own.student[disturbed] = torch.eye(VOCAB)[-1].log()
        found.sample(torch.zeros(6, VOCAB), own, 0)
        sums.add(found.checksum())
    assert len(sums) == 7


# ------------------------------------------------------------------------------------------------------------- scoring

WIDTH = 5


def log_rows_of(table: torch.Tensor, calls: list[int]) -> Callable[[torch.Tensor], Rows]:
    """Rows by the number that an output begins with."""

    def log_rows(hidden: torch.Tensor) -> Rows:
        calls.append(len(hidden))
        rows = table[:, hidden[:, 0].long()]
        return Rows(rows[0], rows[1], None)

    return log_rows


@pytest.mark.parametrize("keeps_records", [True, False])
def test_scoring_records_the_response_whatever_chunks_prefill_has(keeps_records: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sequences in one batch, with ids asked for, without, and without the models' own; passes are shared and bounded."""
    monkeypatch.setattr(batch_recorder, "CHUNK_ROWS", 7)
    rng = np.random.default_rng(3)
    found = recorder(keeps_records=keeps_records)
    requests, passes, tables, sequences = {}, {}, {}, {}
    for row, (prompt, response, asked, top_k) in enumerate(
        [(4, 9, None, True), (1, 12, 3, True), (6, 8, 3, False), (3, 5, 3, False)]
    ):
        sequences[row] = rng.integers(0, VOCAB, prompt + response).astype(np.int32)
        wanted = None if asked is None else np.stack([rng.permutation(VOCAB)[:asked] for _ in range(response)]).astype(np.int32)
        requests[row] = Request(str(row), True, [], sequence=sequences[row], start=prompt, asked=wanted, top_k=top_k)
        tables[row] = random_rows(prompt + response - 1, VOCAB, seed=row)
        # The surplus step after the last token too.
        passes[row] = np.split(np.arange(prompt + response), sorted(rng.integers(0, prompt + response, 3)))
    begin(found, requests)
    table = torch.stack([torch.cat([tables[row][model] for row in requests] + [torch.zeros(1, VOCAB)]) for model in (0, 1)])
    offsets = np.cumsum([0, *(len(tables[row].teacher) for row in requests)])
    calls: list[int] = []
    for step in range(4):
        chunks, hidden = {}, []
        for row in requests:
            positions = passes[row][step]
            chunks[row] = Chunk(len(hidden), int(positions[0]) if len(positions) else 0, len(positions))
            for position in positions:
                surplus = position == len(sequences[row]) - 1
                hidden.append(len(table[0]) - 1 if surplus else offsets[row] + position)
        outputs = torch.tensor(hidden, dtype=torch.float32).unsqueeze(-1).expand(-1, WIDTH)
        found.score(outputs, chunks, log_rows_of(table, calls), student_version=2)
    assert max(calls) <= 7
    assert sum(calls) == 9 + 12 + 8 + 5, "every response token once, on every rank"
    if not keeps_records:
        assert not found.cells
        return
    for row, request in requests.items():
        length = len(sequences[row]) - request.start
        (slab,) = found.take([(request.key, length)])
        own = Rows(*(None if each is None else each[request.start - 1 :] for each in tables[row]))
        tokens = torch.from_numpy(sequences[row][request.start :])
        asked_ids = None if request.asked is None else torch.from_numpy(request.asked).long()
        check(slab, [plain.columns(own, tokens, None, TOP, asked_ids, request.top_k)])


def test_a_part_of_a_steps_outputs_is_refused() -> None:
    found = recorder()
    begin(found, {0: Request("a", True, [], sequence=np.array([1, 2, 3, 4], np.int32), start=1)})
    with pytest.raises(ValueError, match="only the last 2 of 3 tokens of a step were kept .* remove enable_dbo"):
        found.score(torch.zeros(2, WIDTH), {0: Chunk(0, 0, 3)}, lambda hidden: random_rows(len(hidden), VOCAB, 0), 0)
