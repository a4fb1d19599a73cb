"""Feature terms against float64 NumPy written out index by index; the teacher beside a real student; layers and refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from actors.student.features import (
    StudentWithFeatures,
    feature_inputs,
    load_feature_teacher,
    unwrapped,
    weigh_features,
    with_features,
)
from actors.student.hidden_state_loss import hidden_state_loss, load_output_head
from kdray.config import FeatureSettings, ForwardKLLoss, ReverseKLLoss
from kdray.errors import ConfigError, TrainingError
from kdray.losses import LossBatch, loss_function
from kdray.losses.features import (
    ATTENTION,
    HIDDEN,
    RELATION,
    attention_kl,
    attention_mse,
    hidden_cosine,
    hidden_mse,
    over_responses,
    relation_distances,
    relation_similarities,
)
from kdray.rollouts.batching import take_rows
from kdray.runs.metrics import METRICS
from kdray.types import TrainBatch

torch.set_num_threads(1)
VOCAB = 23
LOSS = ForwardKLLoss(type="forward_kl")
ALL = {
    "hidden": {"weight": 0.7, "layers": "uniform", "distance": "mse"},
    "attention": {"weight": 0.5, "layers": "uniform", "distance": "kl"},
    "relation": {"weight": 2.0, "layers": [[1, 3], [2, 4]], "distance": "distances"},
}


# ---------------------------------------------------------------------------------------------- values, by hand


def mse_by_hand(s, t):
    return sum(np.mean((s[i] - t[i]) ** 2) for i in range(len(s)))


def cosine_by_hand(s, t):
    return sum(1 - s[i] @ t[i] / (np.linalg.norm(s[i]) * np.linalg.norm(t[i])) for i in range(len(s)))


def attention_by_hand(student, teacher, mask, of_keys):
    """Rows of the position before each response token; heads one by one, or as their mean."""
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdims=True), teacher.mean(1, keepdims=True)
    total, heads = 0.0, student.shape[1]
    for row, token in zip(*np.nonzero(mask), strict=True):
        for head in range(heads):
            total += of_keys(student[row, head, token - 1], teacher[row, head, token - 1]) / heads
    return total


def kl_of_keys(s, t):
    return sum(p * math.log(p / q) for p, q in zip(t, s, strict=True) if p > 0)


def mse_of_keys(s, t):
    return sum((s - t) ** 2)


def distances_by_hand(s, t):
    n = len(s)
    if n < 2:
        return 0.0

    def psi(x):
        d = np.array([[math.dist(x[i], x[j]) for j in range(n)] for i in range(n)])
        return d / np.mean([d[i, j] for i in range(n) for j in range(n) if i != j])

    def huber(e):
        return 0.5 * e * e if abs(e) <= 1 else abs(e) - 0.5

    a, b = psi(s), psi(t)
    return sum(np.mean([huber(a[i, j] - b[i, j]) for j in range(n) if j != i]) for i in range(n))


def similarities_by_hand(s, t):
    n = len(s)
    if n < 2:
        return 0.0

    def cos(x, i, j):
        return x[i] @ x[j] / (np.linalg.norm(x[i]) * np.linalg.norm(x[j]))

    return sum(np.mean([(cos(s, i, j) - cos(t, i, j)) ** 2 for j in range(n) if j != i]) for i in range(n))


def causal_maps(rng, rows, heads, seq):
    logits = np.where(np.tril(np.ones((seq, seq), bool)), rng.normal(size=(rows, heads, seq, seq)), -np.inf)
    exp = np.exp(logits)
    return exp / exp.sum(-1, keepdims=True)


MASK = np.array([[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]], dtype=bool)


@pytest.mark.parametrize(("function", "by_hand"), [(hidden_mse, mse_by_hand), (hidden_cosine, cosine_by_hand)])
def test_hidden_states(function, by_hand):
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(5, 7)), rng.normal(size=(5, 7))
    assert function(torch.from_numpy(s), torch.from_numpy(t)).item() == pytest.approx(by_hand(s, t), rel=1e-12)


@pytest.mark.parametrize("heads", [(2, 2), (2, 3)])
@pytest.mark.parametrize(("function", "of_keys"), [(attention_kl, kl_of_keys), (attention_mse, mse_of_keys)])
def test_attention_maps(function, of_keys, heads):
    rng = np.random.default_rng(1)
    s, t = (causal_maps(rng, 4, count, 6) for count in heads)
    found = function(torch.from_numpy(s), torch.from_numpy(t), torch.from_numpy(MASK)).item()
    assert found == pytest.approx(attention_by_hand(s, t, MASK, of_keys), rel=1e-12)


@pytest.mark.parametrize(
    ("function", "by_hand"), [(relation_distances, distances_by_hand), (relation_similarities, similarities_by_hand)]
)
def test_relations_within_each_response(function, by_hand):
    rng = np.random.default_rng(2)
    # One far point, so that the Huber loss is met beyond its bend too.
    s, t = rng.normal(size=(4, 6, 3)), rng.normal(size=(4, 6, 8))
    s[1, 2] *= 40
    want = sum(by_hand(s[row][np.nonzero(MASK[row])[0] - 1], t[row][np.nonzero(MASK[row])[0] - 1]) for row in range(4))
    found = over_responses(function, torch.from_numpy(s), torch.from_numpy(t), torch.from_numpy(MASK)).item()
    assert found == pytest.approx(want, rel=1e-12)
    if function is relation_distances:
        errors = [distances_by_hand(s[1][:5] * k, t[1][:5]) for k in (1, 7)]
        assert errors[0] == pytest.approx(errors[1]), "the scale of the states plays no part"


@pytest.mark.parametrize(
    ("function", "tokens"), [(hidden_mse, 1), (hidden_cosine, 1), (relation_distances, 3), (relation_similarities, 2)]
)
def test_half_precision_is_compared_in_float32(function, tokens):
    """In the shortest response that differs: relative distances of two tokens are always 1."""
    generator = torch.Generator().manual_seed(3)
    s, t = torch.randn(2, tokens, 6, generator=generator).bfloat16()
    found = function(s, t)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(function(s.double(), t.double()).item(), rel=1e-5)
    assert found > 1e-3


def test_a_key_without_attention_costs_a_finite_amount():
    s, t = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]], requires_grad=True), torch.tensor([[[[0.0, 1.0], [0.5, 0.5]]]])
    value = attention_kl(s, t, torch.tensor([[False, True]]))
    value.backward()
    assert value.item() == pytest.approx(-math.log(1e-12), rel=1e-5)
    assert torch.isfinite(s.grad).all()


@pytest.mark.parametrize("function", HIDDEN.values())
def test_gradients_of_hidden_states(function):
    torch.manual_seed(0)
    s, t = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.randn(4, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: function(x, t), s)


@pytest.mark.parametrize("function", ATTENTION.values())
def test_gradients_of_attention(function):
    torch.manual_seed(0)
    logits = torch.randn(4, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    t, mask = torch.randn(4, 2, 6, 6, dtype=torch.float64).softmax(-1), torch.from_numpy(MASK)
    assert torch.autograd.gradcheck(lambda x: function(x.softmax(-1), t, mask), logits)


@pytest.mark.parametrize("function", RELATION.values())
def test_gradients_of_relations(function):
    torch.manual_seed(0)
    s, t = torch.randn(4, 6, 3, dtype=torch.float64, requires_grad=True), torch.randn(4, 6, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: over_responses(function, x, t, torch.from_numpy(MASK)), s)


# --------------------------------------------------------------------------------- the teacher beside a student


def llama(layers=2, width=32, heads=2, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=VOCAB,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def rollouts(lengths=((3, 5), (1, 8), (6, 2), (4, 1)), width=None, seed=0):
    rng = np.random.default_rng(seed)
    rows, needed = len(lengths), max(sum(length) for length in lengths)
    ids, mask = np.zeros((rows, width or needed), np.int32), np.zeros((rows, width or needed), bool)
    for row, (prompt, response) in enumerate(lengths):
        ids[row, : prompt + response] = rng.integers(0, VOCAB, prompt + response)
        mask[row, prompt : prompt + response] = True
    logprobs = np.log(np.full((*mask.shape, VOCAB), 1 / VOCAB, np.float32))
    return TrainBatch(
        step=1,
        sample_ids=np.arange(rows),
        token_ids=ids,
        lengths=np.array([sum(length) for length in lengths], np.int32),
        loss_mask=mask,
        num_target_tokens=int(mask.sum()),
        columns={
            "support_ids": np.broadcast_to(np.arange(VOCAB, dtype=np.int32), logprobs.shape).copy(),
            "support_logprobs": logprobs,
            "tail_logprobs": np.full(mask.shape, -np.inf, np.float32),
        },
    )


def inputs_of(batch):
    ids = torch.from_numpy(batch.token_ids).long()
    attention = (torch.arange(ids.shape[1]) < torch.from_numpy(batch.lengths).clamp(min=1).unsqueeze(1)).long()
    return {"input_ids": ids, "attention_mask": attention, "use_cache": False}


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    llama(layers=4, width=48, heads=3, seed=1).save_pretrained(folder)
    return folder


def wrapped(folder, student, features=ALL):
    settings = FeatureSettings.model_validate(features)
    student.set_attn_implementation("eager")
    return StudentWithFeatures(student, load_feature_teacher(str(folder), None, settings, torch.float32), settings, seed=3)


def loss_of(module, batch):
    tensors = LossBatch.from_train_batch(batch, VOCAB)
    output = module(**inputs_of(batch), **feature_inputs(module, tensors.mask))
    return with_features(loss_function(LOSS)(output.logits.roll(1, dims=1), tensors, LOSS), output, module)


def test_the_terms_are_those_of_the_two_models_run_one_sequence_at_a_time(teacher_folder):
    """Values and pairing by hand from each model's own output without padding, and the sum in the loss."""
    student = llama(seed=2)
    module = wrapped(teacher_folder, student)
    batch = rollouts()
    found = loss_of(module, batch)
    teacher = LlamaForCausalLM.from_pretrained(teacher_folder, attn_implementation="eager").eval()
    want = dict.fromkeys(("feature_hidden", "feature_attention", "feature_relation"), 0.0)
    for row, length in enumerate(batch.lengths):
        ids = torch.from_numpy(batch.token_ids[row : row + 1, :length]).long()
        mask = batch.loss_mask[row : row + 1, :length]
        at = np.nonzero(mask[0])[0] - 1
        with torch.no_grad():
            both = [model(ids, output_hidden_states=True, output_attentions=True) for model in (student, teacher)]
        states = [[each[0].double().numpy() for each in output.hidden_states] for output in both]
        maps = [[each.double().numpy() for each in output.attentions] for output in both]
        for projection, (s, t) in zip(module.projections, [(0, 0), (1, 2), (2, 4)], strict=True):
            projected = states[0][s] @ projection.weight.detach().double().numpy().T
            want["feature_hidden"] += mse_by_hand(projected[at], states[1][t][at]) / 3
        for s, t in [(1, 2), (2, 4)]:
            want["feature_attention"] += attention_by_hand(maps[0][s - 1], maps[1][t - 1], mask, kl_of_keys) / 2
        for s, t in [(1, 3), (2, 4)]:
            want["feature_relation"] += distances_by_hand(states[0][s][at], states[1][t][at]) / 2
    for name, value in want.items():
        assert found.sums[name].item() == pytest.approx(value, rel=1e-4), name
        assert name in METRICS
    plain = loss_function(LOSS)(student(**inputs_of(batch)).logits.roll(1, 1), LossBatch.from_train_batch(batch, VOCAB), LOSS)
    added = 0.7 * want["feature_hidden"] + 0.5 * want["feature_attention"] + 2.0 * want["feature_relation"]
    assert found.total.item() == pytest.approx(plain.total.item() + added, rel=1e-5)


def test_neither_padding_nor_micro_batches_change_value_or_gradient(teacher_folder):
    module = wrapped(teacher_folder, llama(seed=2))
    whole = loss_of(module, rollouts())
    whole.total.backward()
    want = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    module.zero_grad()
    # A padding row besides, as `shard` deals them out.
    parts = [take_rows(rollouts(), np.array(rows)) for rows in ([0, 2], [1, -1], [3])]
    outputs = [loss_of(module, part) for part in parts]
    sum(output.total for output in outputs).backward()
    assert sum(output.total.item() for output in outputs) == pytest.approx(whole.total.item(), rel=1e-5)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-3, atol=2e-5, msg=name)
    wider = loss_of(module, rollouts(width=14))
    for name, value in whole.sums.items():
        assert wider.sums[name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_the_teacher_is_neither_trained_nor_saved_and_the_maps_are(teacher_folder):
    module = wrapped(teacher_folder, llama(seed=2))
    loss_of(module, rollouts()).total.backward()
    teacher = module._teacher[0]
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())
    assert len(list(teacher.parameters())) > 30
    own = {f"student.{name}" for name, _ in llama().named_parameters()}
    assert set(module.state_dict()) == own | {f"projections.{number}.weight" for number in range(3)}
    assert all(parameter.grad.abs().max() > 0 for parameter in module.projections.parameters())
    assert {name for name, _ in unwrapped(module).named_parameters()} == {name for name, _ in llama().named_parameters()}


def test_a_student_equal_to_the_teacher_misses_nothing(tmp_path):
    """Equal widths begin with the identity, so every term is 0 and no gradient comes of them."""
    llama(seed=5).save_pretrained(tmp_path)
    features = {"hidden": {"layers": "uniform"}, "attention": {"layers": "uniform"}, "relation": {"layers": "uniform"}}
    for distances in (("cosine", "kl", "similarities"), ("mse", "mse", "distances")):
        given = {name: value | {"distance": d} for (name, value), d in zip(features.items(), distances, strict=True)}
        module = wrapped(tmp_path, llama(seed=5), given)
        output = module(**inputs_of(rollouts()), response_mask=torch.from_numpy(rollouts().loss_mask))
        terms = output["feature_terms"]
        assert max(abs(value.item()) for value in terms.values()) < 1e-5
        sum(terms.values()).backward()
        assert max(parameter.grad.abs().max() for parameter in module.parameters() if parameter.grad is not None) < 1e-4


def test_attention_that_shows_its_maps_gives_the_same_logits():
    batch = rollouts()
    fused, eager = llama(seed=2), llama(seed=2)
    assert fused.config._attn_implementation == "sdpa"
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        logits = [model(**inputs_of(batch)).logits[torch.from_numpy(batch.loss_mask)] for model in (fused, eager)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


def test_hidden_states_in_the_output_head_and_features_together(teacher_folder):
    """The loss inside the head gets the same terms on top, out of the same forward pass."""
    module = wrapped(teacher_folder, llama(seed=2))
    batch = rollouts()
    rng = np.random.default_rng(0)
    batch.columns["teacher_hidden"] = rng.normal(size=(*batch.token_ids.shape, 48)).astype(np.float16)
    batch.columns["teacher_logprobs"] = np.zeros(batch.token_ids.shape, np.float32)
    loss = ReverseKLLoss(type="reverse_kl")
    head = load_output_head(str(teacher_folder))
    both = hidden_state_loss(module, module, batch, loss, head, VOCAB)
    alone = hidden_state_loss(module.student, module.student, batch, loss, head, VOCAB)
    terms = loss_of(module, batch).sums
    added = sum(ALL[name.removeprefix("feature_")]["weight"] * terms[name] for name in terms if name.startswith("feature_"))
    assert both.total.item() == pytest.approx(alone.total.item() + added.item(), rel=1e-5)


def test_weights_of_a_step_replace_the_own_ones_for_that_step(teacher_folder):
    module = wrapped(teacher_folder, llama(seed=2))
    batch = rollouts()
    own = loss_of(module, batch)
    weigh_features(module, {"training.features.hidden.weight": 0.0, "training.features.relation.weight": 3.0})
    found = loss_of(module, batch)
    hidden, relation = (own.sums[f"feature_{name}"] for name in ("hidden", "relation"))
    change = -ALL["hidden"]["weight"] * hidden + (3.0 - ALL["relation"]["weight"]) * relation
    assert (found.total - own.total).item() == pytest.approx(change.item(), rel=1e-4)
    assert found.sums["feature_hidden"] == hidden, "a term without weight is measured all the same"
    weigh_features(module, {})
    assert loss_of(module, batch).total == own.total


def test_another_architecture(tmp_path):
    """GPT-2 names its sizes differently; heads and widths differ from the student's."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=3, n_head=4)).save_pretrained(tmp_path)
    output = loss_of(wrapped(tmp_path, llama(seed=2), ALL | {"relation": {}}), rollouts())
    assert torch.isfinite(output.total)
    assert {"feature_hidden", "feature_attention", "feature_relation"} <= set(output.sums)


def test_a_model_that_shows_no_maps_is_named(teacher_folder):
    module = wrapped(teacher_folder, llama(seed=2))
    module.student.set_attn_implementation("sdpa")
    with pytest.raises(TrainingError, match=r"features\.attention: a llama shows attention maps of 0 of its 2 layers"):
        loss_of(module, rollouts())


# ------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize(
    ("term", "layers", "depths", "want"),
    [
        ("hidden", "uniform", (2, 4), [(0, 0), (1, 2), (2, 4)]),
        ("hidden", "uniform", (2, 3), [(0, 0), (1, 2), (2, 3)]),
        ("hidden", "uniform", (3, 2), [(0, 0), (1, 1), (2, 1), (3, 2)]),
        ("attention", "uniform", (4, 1), [(1, 1), (2, 1), (3, 1), (4, 1)]),
        ("attention", "last", (2, 4), [(2, 4)]),
        ("relation", [[0, 1], [2, 4]], (2, 4), [(0, 1), (2, 4)]),
    ],
)
def test_pairs_of_layers(term, layers, depths, want):
    (only,) = FeatureSettings.model_validate({term: {"layers": layers}}).terms
    assert only.pairs(*depths) == want


@pytest.mark.parametrize(
    ("term", "pair", "message"),
    [
        ("hidden", [3, 1], r"training\.features\.hidden\.layers=\[\[3, 1\]\]: the student has no layer 3.*from 0 to 2"),
        ("relation", [2, 5], r"training\.features\.relation\.layers=\[\[2, 5\]\]: the teacher has no layer 5.*from 0 to 4"),
        ("attention", [0, 1], r"the student has no layer 0 to compare; choose from 1 to 2"),
    ],
)
def test_a_layer_that_is_not_there_is_refused(term, pair, message):
    (only,) = FeatureSettings.model_validate({term: {"layers": [pair]}}).terms
    with pytest.raises(ConfigError, match=message):
        only.pairs(2, 4)
