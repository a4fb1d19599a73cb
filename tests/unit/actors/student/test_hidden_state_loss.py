"""The loss inside the output head against the same loss on full rows; the head read out of checkpoints of every layout."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from actors.student.hidden_state_loss import hidden_state_loss, load_output_head
from actors.student.output_head import AfterHead
from kdray.config import ForwardKLLoss, HintonLoss, JSDLoss, ReverseKLLoss
from kdray.errors import ConfigError, TrainingError
from kdray.losses import LossBatch, loss_function
from kdray.types import TrainBatch

torch.set_num_threads(1)
VOCAB = 23


def llama(width=32, rows=VOCAB, tied=False, seed=0, **settings):
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=rows,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        **settings,
    )
    return LlamaForCausalLM(config).eval()


def batch_with_hidden(teacher, lengths=((3, 5), (1, 8), (6, 2)), seed=0):
    """Rows of unequal length, the teacher's states where the tokens that they predict stand."""
    rng = np.random.default_rng(seed)
    rows, width = len(lengths), max(sum(length) for length in lengths)
    ids = rng.integers(0, VOCAB, (rows, width)).astype(np.int32)
    mask = np.zeros((rows, width), dtype=bool)
    for row, (prompt, response) in enumerate(lengths):
        mask[row, prompt : prompt + response] = True
        ids[row, prompt + response :] = 0
    with torch.no_grad():
        output = teacher(torch.from_numpy(ids).long(), output_hidden_states=True)
    hidden = output.hidden_states[-1].roll(1, dims=1).numpy().astype(np.float16)
    rows_of = output.logits[..., :VOCAB].log_softmax(-1).roll(1, dims=1)
    logprobs = rows_of.gather(-1, torch.from_numpy(ids).long().unsqueeze(-1)).squeeze(-1).numpy()
    return TrainBatch(
        step=4,
        sample_ids=np.arange(rows),
        token_ids=ids,
        lengths=np.array([sum(length) for length in lengths], dtype=np.int32),
        loss_mask=mask,
        num_target_tokens=int(mask.sum()),
        columns={"teacher_hidden": hidden, "teacher_logprobs": logprobs},
    ), output.logits


@pytest.mark.parametrize(
    "loss",
    [ReverseKLLoss(type="reverse_kl"), ForwardKLLoss(type="forward_kl"), JSDLoss(type="jsd"), HintonLoss(type="hinton")],
    ids=lambda loss: loss.type,
)
@pytest.mark.parametrize("tied", [False, True])
def test_value_and_every_gradient_equal_those_of_full_rows(loss, tied, tmp_path):
    # Both embeddings are padded beyond the shared vocabulary, by different numbers of rows.
    teacher, student = llama(64, VOCAB + 3, seed=1), llama(32, VOCAB + 7, tied=tied, seed=2)
    teacher.save_pretrained(tmp_path)
    batch, _ = batch_with_hidden(teacher)
    output = hidden_state_loss(student, student, batch, loss, load_output_head(str(tmp_path)), VOCAB)
    output.total.backward()
    found = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}

    student.zero_grad()
    # The oracle's teacher rows come from the same half-precision states.
    with torch.no_grad():
        states = torch.from_numpy(batch.columns["teacher_hidden"]).float()
        teacher_logits = teacher.lm_head(states)
    ids = torch.from_numpy(batch.token_ids).long()
    attention = (torch.arange(ids.shape[1]) < torch.from_numpy(batch.lengths).unsqueeze(1)).long()
    logits = student(ids, attention_mask=attention).logits.roll(1, dims=1)
    tensors = LossBatch(ids, torch.from_numpy(batch.loss_mask), VOCAB, teacher_logits=teacher_logits)
    want = loss_function(loss)(logits, tensors, loss)
    want.total.backward()
    assert output.total.item() == pytest.approx(want.total.item(), rel=1e-5)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert output.sums["reverse_kl_support"].item() == pytest.approx(want.sums["reverse_kl_support"].item(), rel=1e-5)
    # Half precision of the states is all that separates the rows from the recorded log p.
    assert 0 < output.sums["teacher_head_error"].item() / batch.num_target_tokens < 0.01
    assert "forward" not in vars(student.lm_head), "the head gives logits again"


def test_a_student_equal_to_the_teacher_has_no_loss_and_no_gradient(tmp_path):
    teacher = llama(32, seed=1)
    teacher.save_pretrained(tmp_path)
    batch, _ = batch_with_hidden(teacher)
    loss = ReverseKLLoss(type="reverse_kl")
    output = hidden_state_loss(teacher, teacher, batch, loss, load_output_head(str(tmp_path)), VOCAB)
    output.total.backward()
    assert output.total.item() / batch.num_target_tokens < 1e-5
    assert max(parameter.grad.abs().max().item() for parameter in teacher.parameters()) < 0.05


def test_the_gap_to_the_sampler_is_that_of_the_tokens_of_the_trained_version(tmp_path):
    teacher, student = llama(64, seed=1), llama(32, seed=2)
    teacher.save_pretrained(tmp_path)
    batch, _ = batch_with_hidden(teacher)
    ids, mask = torch.from_numpy(batch.token_ids).long(), torch.from_numpy(batch.loss_mask)
    with torch.no_grad():
        rows = student(ids).logits.log_softmax(-1).roll(1, dims=1)
    q = rows.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    fresh = torch.arange(ids.shape[1]) % 3 > 0
    batch.columns["student_logprobs"] = torch.where(fresh, q - 0.25, q - 9.0).numpy()
    batch.columns["group"] = (~fresh).to(torch.int8).expand(ids.shape).numpy()
    batch = replace(batch, groups=("teacher/a/staleness_0", "teacher/a/staleness_1"))
    loss = ReverseKLLoss(type="reverse_kl")
    sums = hidden_state_loss(
        student, student, batch, loss, load_output_head(str(tmp_path)), VOCAB, AfterHead(student), chunk_tokens=4
    ).sums
    count = int((mask & fresh).sum())
    assert int(sums["rollout_gap_tokens"]) == count > 0
    assert float(sums["rollout_gap"]) == pytest.approx(0.25 * count, rel=1e-4)


def test_another_models_head_shows(tmp_path):
    teacher = llama(32, seed=1)
    llama(32, seed=5).save_pretrained(tmp_path)
    batch, _ = batch_with_hidden(teacher)
    student = llama(32, seed=2)
    output = hidden_state_loss(
        student, student, batch, ReverseKLLoss(type="reverse_kl"), load_output_head(str(tmp_path)), VOCAB
    )
    assert output.sums["teacher_head_error"].item() / batch.num_target_tokens > 0.25


def test_a_batch_without_states_is_refused(tmp_path):
    teacher = llama(32)
    teacher.save_pretrained(tmp_path)
    batch, _ = batch_with_hidden(teacher)
    batch.columns.pop("teacher_hidden")
    with pytest.raises(TrainingError, match="teacher_signal=hidden"):
        hidden_state_loss(teacher, teacher, batch, ReverseKLLoss(type="reverse_kl"), load_output_head(str(tmp_path)), VOCAB)


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_found_in_every_layout(shards, tied, tmp_path):
    model = llama(32, tied=tied, seed=3)
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size=size // shards + 1)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards > 1)
    head = load_output_head(str(tmp_path))
    assert torch.equal(head.weight, model.lm_head.weight)
    assert head.bias is None


def test_the_head_of_another_architecture(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path)
    assert torch.equal(load_output_head(str(tmp_path)).weight, model.lm_head.weight)


def test_a_head_whose_name_in_the_file_is_another(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCAB, **sizes))
    model.save_pretrained(tmp_path)
    assert "embed_out.weight" in load_file(tmp_path / "model.safetensors")
    assert torch.equal(load_output_head(str(tmp_path)).weight, model.get_output_embeddings().weight)


def test_logits_that_are_bent_after_the_head_are_refused(tmp_path):
    model = llama(32)
    model.config.final_logit_softcapping = 30.0
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"final_logit_softcapping.*teacher_signal=support"):
        load_output_head(str(tmp_path))
