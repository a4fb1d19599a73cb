"""Rollouts and requests as Arrow: what goes in comes out, bit for bit."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kdray.rollouts.arrow import (
    REQUEST_SCHEMA,
    ROLLOUT_SCHEMA,
    requests_to_table,
    rollouts_to_table,
    table_to_requests,
    table_to_rollouts,
)
from kdray.types import WRITERS, Rollout, SampleRequest

INT32 = st.integers(-1, 2**31 - 1)
FLOAT32 = st.floats(width=32)  # NaN and the infinities included


def ints(*shape: int) -> st.SearchStrategy[np.ndarray]:
    return arrays.arrays(np.int32, shape, elements=INT32)


def floats(*shape: int) -> st.SearchStrategy[np.ndarray]:
    return arrays.arrays(np.float32, shape, elements=FLOAT32)


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    length, width = draw(st.integers(0, 5)), draw(st.integers(1, 3))
    has_support, has_hidden = draw(st.booleans()), draw(st.booleans())
    halves = arrays.arrays(np.float16, (length, 2), elements=st.floats(width=16))

    def maybe() -> np.ndarray | None:
        return draw(st.none() | floats(length))

    return Rollout(
        sample_id=draw(st.integers(0, 2**62)),
        prompt_id=draw(st.integers(0, 2**62)),
        prompt_ids=draw(st.integers(1, 4).flatmap(ints)),
        token_ids=draw(ints(length)),
        mixture_logprobs=maybe(),
        student_logprobs=maybe(),
        student_versions=draw(ints(length)),
        alpha=draw(st.floats(0, 1)),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        teacher=draw(st.text(max_size=4)),
        teacher_logprobs=maybe(),
        support_ids=draw(ints(length, width)) if has_support else None,
        support_logprobs=draw(floats(length, width)) if has_support else None,
        tail_logprobs=maybe(),
        reverse_kl=maybe(),
        forward_kl=maybe(),
        teacher_hidden=draw(halves) if has_hidden else None,
        writer=draw(arrays.arrays(np.int8, length, elements=st.integers(0, len(WRITERS) - 1))),
    )


@st.composite
def requests(draw: st.DrawFn) -> SampleRequest:
    return SampleRequest(
        sample_id=draw(st.integers(0, 2**62)),
        prompt_id=draw(st.integers(0, 2**62)),
        prompt_ids=draw(st.integers(1, 4).flatmap(ints)),
        alpha=draw(st.floats(0, 1)),
        seed=draw(st.integers(0, 2**64 - 1)),
        max_new_tokens=draw(st.integers(1, 2**31 - 1)),
        min_version=draw(st.integers(0, 2**31 - 1)),
        writer=draw(st.sampled_from(["mixture", "data"])),
        stop_ids=tuple(draw(st.lists(st.integers(0, 2**31 - 1), max_size=3))),
    )


def assert_same(left: Rollout | SampleRequest, right: Rollout | SampleRequest) -> None:
    """Equal field by field, arrays with dtype and shape, NaN equal to NaN."""
    assert type(left) is type(right)
    for name in (field.name for field in fields(left)):
        a, b = getattr(left, name), getattr(right, name)
        if isinstance(a, np.ndarray):
            assert isinstance(b, np.ndarray), name
            assert (a.dtype, a.shape) == (b.dtype, b.shape), name
            np.testing.assert_array_equal(a, b, err_msg=name)
        else:
            assert a == b, name


@settings(max_examples=30)
@given(st.lists(rollouts(), max_size=5))
def test_rollouts_round_trip(given_rollouts: list[Rollout]) -> None:
    table = rollouts_to_table(given_rollouts)
    assert table.schema == ROLLOUT_SCHEMA
    restored = table_to_rollouts(table)
    assert len(restored) == len(given_rollouts)
    for left, right in zip(given_rollouts, restored, strict=True):
        assert_same(left, right)


@settings(max_examples=30)
@given(st.lists(rollouts(), min_size=1, max_size=5), st.data())
def test_slices_and_chunks_of_a_table_round_trip(given_rollouts: list[Rollout], data: st.DataObject) -> None:
    table = rollouts_to_table(given_rollouts)
    start = data.draw(st.integers(0, len(given_rollouts)))
    end = data.draw(st.integers(start, len(given_rollouts)))
    part = table.slice(start, end - start)
    for left, right in zip(given_rollouts[start:end], table_to_rollouts(part), strict=True):
        assert_same(left, right)
    both = pa.concat_tables([part, table])
    for left, right in zip(given_rollouts[start:end] + given_rollouts, table_to_rollouts(both), strict=True):
        assert_same(left, right)


@settings(max_examples=30)
@given(st.lists(requests(), max_size=5), st.integers(0, 5))
def test_requests_round_trip(given_requests: list[SampleRequest], start: int) -> None:
    table = requests_to_table(given_requests)
    assert table.schema == REQUEST_SCHEMA
    for part, wanted in ((table, given_requests), (table.slice(start), given_requests[start:])):
        for left, right in zip(wanted, table_to_requests(part), strict=True):
            assert_same(left, right)


def test_every_field_of_a_rollout_is_in_the_schema() -> None:
    widths = {"support_width", "hidden_width"}
    assert ({field.name for field in fields(Rollout)} | widths) - {"more"} == set(ROLLOUT_SCHEMA.names)
    # Replicas read ids; a question is for teachers that read text, which live in the run's own process.
    assert {field.name for field in fields(SampleRequest)} - {"question"} == set(REQUEST_SCHEMA.names)


@pytest.mark.parametrize("length", [0, 2])
def test_support_keeps_its_width_and_its_unused_places(length: int) -> None:
    ids = np.array([[3, 1, -1], [2, 0, 4]], np.int32)[:length]
    logprobs = np.array([[-0.5, -1.5, -np.inf], [-0.1, -2.5, -3.5]], np.float32)[:length]
    zeros = np.zeros(length, np.float32)
    tokens = np.zeros(length, np.int32)
    made = Rollout(
        1,
        2,
        np.array([7], np.int32),
        tokens,
        zeros,
        zeros,
        tokens,
        0.2,
        "stop",
        support_ids=ids,
        support_logprobs=logprobs,
    )
    table = rollouts_to_table([made])
    assert table.column("support_width").to_pylist() == [3]
    (restored,) = table_to_rollouts(table)
    assert restored.support_ids is not None
    assert restored.support_ids.shape == (length, 3)
    assert_same(made, restored)
