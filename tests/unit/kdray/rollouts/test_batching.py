"""Rows to batches: alignment, shards, micro-batches, padding rows, and that no split changes a loss."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdray.config import MiniLLMLoss, ReverseKLLoss
from kdray.errors import DataError
from kdray.losses import LossBatch, loss_function
from kdray.rollouts.batching import examples_to_batch, micro_batches, packed_micro_batches, rollouts_to_batch, shard
from kdray.types import Reference, Rollout

torch.set_num_threads(1)

VOCAB = 11


def rollout(sample_id, prompt=2, response=3, width=4, **changes):
    """Every number of it tells sample and position, so that a shifted column shows."""
    rng = np.random.default_rng(sample_id)
    teacher = rng.normal(size=(response, VOCAB))
    teacher -= np.log(np.exp(teacher).sum(-1, keepdims=True))
    ids = np.argsort(-teacher, axis=-1)[:, :width].astype(np.int32)
    token_ids = rng.integers(0, VOCAB, response).astype(np.int32)
    rest = np.exp(teacher)
    np.put_along_axis(rest, ids, 0.0, -1)
    values = {
        "sample_id": sample_id,
        "prompt_id": 100 + sample_id,
        "prompt_ids": rng.integers(0, VOCAB, prompt).astype(np.int32),
        "token_ids": token_ids,
        "mixture_logprobs": -rng.random(response).astype(np.float32),
        "student_logprobs": -rng.random(response).astype(np.float32),
        "student_versions": np.zeros(response, dtype=np.int32),
        "alpha": 0.2,
        "finish_reason": "stop",
        "teacher_logprobs": teacher[np.arange(response), token_ids].astype(np.float32),
        "support_ids": ids,
        "support_logprobs": np.take_along_axis(teacher, ids, -1).astype(np.float32),
        "tail_logprobs": np.log(rest.sum(-1)).astype(np.float32),
    }
    return Rollout(**(values | changes))


shapes = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=12)


def test_rows_hold_prompt_then_response_and_columns_stand_at_their_tokens():
    rollouts = [rollout(5, prompt=2, response=3), rollout(9, prompt=1, response=1)]
    batch = rollouts_to_batch(rollouts, step=7)
    assert batch.step == 7
    assert batch.sample_ids.tolist() == [5, 9]
    assert batch.lengths.tolist() == [5, 2]
    assert batch.token_ids.shape == (2, 5)
    assert batch.num_target_tokens == 4
    assert batch.loss_mask.tolist() == [[False, False, True, True, True], [False, True, False, False, False]]
    for row, one in enumerate(rollouts):
        length = len(one.prompt_ids) + len(one.token_ids)
        assert batch.token_ids[row, :length].tolist() == [*one.prompt_ids, *one.token_ids]
        assert (batch.token_ids[row, length:] == 0).all()
        for name, column in batch.columns.items():
            if name != "group":
                np.testing.assert_array_equal(column[row][batch.loss_mask[row]], getattr(one, name), err_msg=name)
    assert ((batch.columns["group"] >= 0) == batch.loss_mask).all()
    assert set(batch.columns) == {
        "group",
        "mixture_logprobs",
        "student_logprobs",
        "teacher_logprobs",
        "support_ids",
        "support_logprobs",
        "tail_logprobs",
    }
    assert batch.columns["support_ids"].dtype == np.int32
    assert (batch.columns["support_ids"][~batch.loss_mask] == -1).all()


def test_narrow_supports_are_filled_with_unused_slots():
    batch = rollouts_to_batch([rollout(0, width=2), rollout(1, width=4)], step=1)
    assert batch.columns["support_ids"].shape == (2, 5, 4)
    assert (batch.columns["support_ids"][0, 2:, 2:] == -1).all()
    assert (batch.columns["support_logprobs"][0, 2:, 2:] == -np.inf).all()
    assert (batch.columns["support_ids"][1, 2:] >= 0).all()


def test_unscored_rollouts_have_no_teacher_columns_and_a_half_scored_batch_is_refused():
    bare = dict.fromkeys(("teacher_logprobs", "support_ids", "support_logprobs", "tail_logprobs"))
    assert set(rollouts_to_batch([rollout(0, **bare)], step=1).columns) == {"group", "mixture_logprobs", "student_logprobs"}
    with pytest.raises(DataError, match=r"samples \[3\] have no teacher_logprobs"):
        rollouts_to_batch([rollout(2), rollout(3, **bare)], step=1)


def test_position_zero_is_never_a_target():
    batch = rollouts_to_batch([rollout(0, prompt=0, response=3)], step=1)
    assert batch.loss_mask.tolist() == [[False, True, True]]
    assert batch.num_target_tokens == 2


def test_tokens_of_the_environment_are_context():
    """Two turns of a tool, one of them at the end: no targets, no group, whatever version stands there."""
    writer, versions = np.array([0, 4, 4, 2, 4], np.int8), np.array([3, -1, -1, 2, -1], np.int32)
    turns = rollout(5, prompt=2, response=5, writer=writer, student_versions=versions, teacher="t")
    batch = rollouts_to_batch([turns, rollout(6, prompt=1, response=2, teacher="t")], step=5, weights={5: 0.5, 6: 2.0})
    assert batch.loss_mask.tolist() == [[False, False, True, False, False, True, False], [False, True, True] + [False] * 4]
    assert batch.num_target_tokens == 4
    assert batch.lengths.tolist() == [7, 3]
    assert batch.token_ids[0].tolist() == [*turns.prompt_ids, *turns.token_ids]
    assert batch.groups == ("teacher/t/staleness_1", "teacher/t/staleness_2", "teacher/t/staleness_4")
    assert batch.columns["group"].tolist() == [[-1, -1, 0, -1, -1, 1, -1], [-1, 2, 2, -1, -1, -1, -1]]
    # A filter takes the rest of the row out as well.
    assert rollouts_to_batch([turns], step=5, dropped={5}).num_target_tokens == 0
    # Shards and micro-batches keep the gaps.
    (part,) = micro_batches(shard(batch, 0, 1), 2)
    assert part.loss_mask.tolist() == batch.loss_mask.tolist()
    alone = rollouts_to_batch([replace(turns, writer=np.full(5, 4, np.int8))], step=5)
    assert (alone.num_target_tokens, alone.groups) == (0, ())


def reference(prompt: list[int], response: list[int], is_target: list[bool]) -> Reference:
    return Reference(np.array(prompt, np.int32), np.array(response, np.int32), np.array(is_target))


def test_earlier_turns_of_a_conversation_are_targets_with_context_between():
    examples = [(1, reference([3, 4], [5, 6, 7, 8], [True, False, False, True])), (2, reference([], [5, 6], [True, True]))]
    batch = examples_to_batch(examples, step=1)
    assert batch.token_ids.tolist() == [[3, 4, 5, 6, 7, 8], [5, 6, 0, 0, 0, 0]]
    assert batch.loss_mask.tolist() == [[False, False, True, False, False, True], [False, True, False, False, False, False]]
    assert batch.num_target_tokens == 3, "nothing predicts a first token"
    (part,) = micro_batches(shard(batch, 0, 1), 2)
    assert part.loss_mask.tolist() == batch.loss_mask.tolist()


def test_examples_have_targets_on_the_answer_only():
    examples = [(4, reference([1, 2, 3], [7, 8], [True, True])), (6, reference([5], [9], [True]))]
    batch = examples_to_batch(examples, step=2)
    assert batch.sample_ids.tolist() == [4, 6]
    assert batch.token_ids.tolist() == [[1, 2, 3, 7, 8], [5, 9, 0, 0, 0]]
    assert batch.loss_mask.tolist() == [[False, False, False, True, True], [False, True, False, False, False]]
    assert batch.num_target_tokens == 3
    assert batch.columns == {}
    assert batch.step == 2


def test_snake_order_by_hand():
    """Lengths 9 8 7 6 5 4 over three ranks: 9 and 4, 8 and 5, 7 and 6."""
    rollouts = [rollout(sample, prompt=2, response=length - 2) for sample, length in enumerate((5, 9, 7, 4, 8, 6))]
    batch = rollouts_to_batch(rollouts, step=1)
    assert [shard(batch, rank, 3).lengths.tolist() for rank in range(3)] == [[9, 4], [8, 5], [7, 6]]
    assert [shard(batch, rank, 3).sample_ids.tolist() for rank in range(3)] == [[1, 3], [4, 0], [2, 5]]


@given(shapes, st.integers(1, 5))
def test_shards_hold_every_row_once_in_equal_numbers_with_balanced_tokens(sizes, world_size):
    rollouts = [rollout(sample, *size) for sample, size in enumerate(sizes)]
    batch = rollouts_to_batch(rollouts, step=1)
    shards = [shard(batch, rank, world_size) for rank in range(world_size)]
    samples = np.concatenate([part.sample_ids for part in shards])
    assert sorted(samples[samples >= 0]) == list(range(len(sizes)))
    assert {len(part.lengths) for part in shards} == {-(-len(sizes) // world_size)}
    assert {part.num_target_tokens for part in shards} == {batch.num_target_tokens}
    tokens = [int(part.lengths.sum()) for part in shards]
    assert max(tokens) - min(tokens) <= batch.lengths.max()
    for part in shards:
        padding = part.sample_ids < 0
        assert (part.lengths[padding] == 0).all()
        assert not part.loss_mask[padding].any()
        assert (part.token_ids[padding] == 0).all()
        assert (np.diff(part.lengths) <= 0).all()


@given(shapes, st.integers(1, 5), st.integers(1, 4))
def test_micro_batches_keep_rows_and_trim_to_their_longest(sizes, micro_batch_size, world_size):
    rollouts = [rollout(sample, *size) for sample, size in enumerate(sizes)]
    whole = rollouts_to_batch(rollouts, step=3)
    counts = set()
    for rank in range(world_size):
        parts = list(micro_batches(shard(whole, rank, world_size), micro_batch_size))
        counts.add(len(parts))
        for part in parts:
            assert 1 <= len(part.lengths) <= micro_batch_size
            assert part.token_ids.shape[1] == max(1, part.lengths.max())
            assert part.num_target_tokens == whole.num_target_tokens
            assert part.step == 3
            for row, sample in enumerate(part.sample_ids):
                if sample < 0:
                    continue
                one = rollouts[sample]
                assert part.token_ids[row, : part.lengths[row]].tolist() == [*one.prompt_ids, *one.token_ids]
                for name in set(part.columns) - {"group"}:
                    np.testing.assert_array_equal(part.columns[name][row][part.loss_mask[row]], getattr(one, name))
    # Forward passes are collective: all ranks run the same number.
    assert len(counts) == 1


@settings(max_examples=40)
@given(shapes, st.integers(1, 3), st.integers(1, 40))
def test_packed_passes_are_alike_on_all_ranks_and_within_the_budget(sizes, world_size, tokens):
    """Every row once; no pass is larger than its budget, if one row of it is not, and none could have held the next row."""
    batch = rollouts_to_batch([rollout(index, *size) for index, size in enumerate(sizes)], step=1)
    shards = [shard(batch, rank, world_size) for rank in range(world_size)]
    longest = np.max([piece.lengths for piece in shards], axis=0)
    packed = [list(packed_micro_batches(piece, longest, tokens)) for piece in shards]
    rows = [[len(part.lengths) for part in parts] for parts in packed]
    assert all(each == rows[0] for each in rows)
    found = sorted(int(each) for parts in packed for part in parts for each in part.sample_ids if each >= 0)
    assert found == list(range(len(sizes)))
    for parts in packed:
        for part in parts:
            assert part.token_ids.size <= tokens or len(part.lengths) == 1
    start = 0
    for count in rows[0]:
        if start + count < len(longest):
            assert max(longest[start : start + count + 1]) * (count + 1) > tokens
        start += count


def test_parts_are_copies_that_torch_can_take():
    """Arrays out of an object store are read-only; parts of them must not be."""
    batch = rollouts_to_batch([rollout(0), rollout(1)], step=1)
    for array in (batch.token_ids, batch.loss_mask, *batch.columns.values()):
        array.setflags(write=False)
    for part in micro_batches(shard(batch, 0, 1), 2):
        assert part.token_ids.flags.writeable
        assert part.loss_mask.flags.writeable
        assert all(column.flags.writeable for column in part.columns.values())
        part.token_ids[:] = -5
    assert (batch.token_ids >= 0).all()


@settings(max_examples=30)
@given(shapes, st.integers(1, 4), st.integers(1, 4), st.sampled_from(["minillm", "reverse_kl", "sft"]), st.randoms())
def test_loss_and_gradient_do_not_depend_on_order_ranks_or_micro_batches(sizes, world_size, micro, name, random):
    """A position table stands for the student: logits depend on the token before, as a model's do."""
    loss = {"minillm": MiniLLMLoss(), "reverse_kl": ReverseKLLoss(type="reverse_kl"), "sft": None}[name]
    table = torch.tensor(np.random.default_rng(0).normal(size=(VOCAB, VOCAB + 2)), requires_grad=True)

    def run(rollouts, ranks, micro_batch_size):
        batch = rollouts_to_batch(rollouts, step=1)
        total, sums = torch.zeros((), dtype=torch.float64), {}
        for rank in range(ranks):
            for part in micro_batches(shard(batch, rank, ranks), micro_batch_size):
                tensors = LossBatch.from_train_batch(part, VOCAB)
                logits = table[tensors.token_ids].roll(1, dims=1)
                output = loss_function(loss)(logits, tensors, loss)
                total = total + output.total / max(part.num_target_tokens, 1)
                for key, value in output.sums.items():
                    sums[key] = sums.get(key, 0.0) + float(value)
        return total.item(), sums, torch.autograd.grad(total, table)[0]

    rollouts = [rollout(sample, *size) for sample, size in enumerate(sizes)]
    expected = run(rollouts, 1, len(rollouts))
    shuffled = random.sample(rollouts, len(rollouts))
    actual = run(shuffled, world_size, micro)
    assert actual[0] == pytest.approx(expected[0], rel=1e-10, abs=1e-12)
    assert actual[1] == pytest.approx(expected[1], rel=1e-6, abs=1e-6)
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-10, atol=1e-12)


def test_an_empty_batch_has_no_parts():
    assert list(micro_batches(rollouts_to_batch([], step=1), 4)) == []


def test_an_empty_batch_has_empty_shards():
    """Every rank makes the same number of passes, none here; the width is that of one token."""
    part = shard(rollouts_to_batch([], step=1), rank=1, world_size=2)
    assert part.token_ids.shape == part.loss_mask.shape == (0, 1)
    assert part.num_target_tokens == 0


def test_ids_are_long_for_a_loss_and_other_columns_as_recorded():
    tensors = LossBatch.from_train_batch(rollouts_to_batch([rollout(0)], step=1), VOCAB)
    assert tensors.token_ids.dtype == tensors.support_ids.dtype == torch.long
    assert tensors.support_logprobs.dtype == torch.float32
