"""Metric names with unit, meaning and reduction, and functions that compute metrics from a step's sums and rollouts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kdray.losses.importance import effective_sample_size
from kdray.rollouts.batching import token_groups
from kdray.rollouts.columns import at_targets
from kdray.types import Rollout

Reduction = Literal["token_mean", "rollout_mean", "max", "ratio_of_sums", "step"]
"""Reduction over the parts of a step (micro-batches, ranks, rollouts): a mean over its response tokens or rollouts,
a maximum, a quotient of sums over all parts, or `step`: measured once, for the whole step."""


@dataclass(frozen=True)
class Metric:
    """Description of a metric in `metrics.jsonl`, the dashboard and the report."""

    unit: str
    reduction: Reduction
    meaning: str


METRICS: dict[str, Metric] = {
    "loss": Metric("nats/token", "token_mean", "What the optimizer minimises; with minillm a surrogate, not a divergence"),
    "grad_norm": Metric("1", "step", "Global gradient norm before clipping"),
    "learning_rate": Metric("1", "step", "Learning rate of the step"),
    "padding": Metric("share", "step", "Positions of the student's forward passes that hold no token"),
    "train_step_s": Metric("s", "step", "Optimizer step: forward, backward, update, on the slowest rank"),
    # From the rollouts of the step.
    "reverse_kl": Metric("nats/token", "token_mean", "KL(student || teacher), full rows, at the sampled prefixes"),
    "forward_kl": Metric("nats/token", "token_mean", "KL(teacher || student), full rows, at the sampled prefixes"),
    "response_tokens": Metric("tokens", "rollout_mean", "Response length, end-of-sequence token included"),
    "truncated": Metric("share", "rollout_mean", "Rollouts that max_new_tokens cut, or a limit of the environment"),
    "turns": Metric("turns", "rollout_mean", "Turns of the model, where an environment answered some"),
    "environment_tokens": Metric("tokens", "rollout_mean", "Tokens that the environment wrote, which are context"),
    "staleness_mean": Metric("steps", "rollout_mean", "Version trained minus the oldest version that sampled the rollout"),
    "staleness_max": Metric("steps", "max", "The same, of the stalest rollout"),
    "filtered": Metric("share", "rollout_mean", "Rollouts that rollout.filters left out; filtered/<rule> says by which rule"),
    "reward": Metric("1", "rollout_mean", "Value that the grader gives a response: 1 if it is right, 0 if wrong"),
    "reward_contrast": Metric("share", "step", "Prompts whose responses differ in reward; the others teach nothing by it"),
    "importance_weight_mean": Metric("1", "token_mean", "Mixing weight q / m at the sampled tokens; expected to be 1"),
    "importance_weight_ess": Metric("share", "ratio_of_sums", "Effective sample size of the mixing weights over tokens"),
    # From the sums of the loss.
    "trajectory_weight_mean": Metric("1", "token_mean", "Product of q_theta / m up to a token, over its window; about 1"),
    "trajectory_weight_ess": Metric("share", "ratio_of_sums", "Effective sample size of these products"),
    "staleness_ratio": Metric("1", "token_mean", "q_theta / q of the sampler at the sampled tokens, as the loss uses it"),
    "rollout_gap": Metric(
        "nats/token", "ratio_of_sums", "|log q_theta - log q of the sampler| at tokens that the trained version sampled"
    ),
    "staleness_clipped": Metric("share", "token_mean", "Tokens whose staleness ratio was above the cap"),
    "ppo_clipped": Metric("share", "token_mean", "Tokens that PPO's clip leaves without a policy gradient"),
    "policy_gradient": Metric("nats/token", "token_mean", "The sampled term of the loss; only its gradient has a meaning"),
    "single_step": Metric("nats/token", "token_mean", "The per-position reverse KL term, as it enters the loss"),
    "reward_gradient": Metric("1/token", "token_mean", "The reward's term of the loss; only its gradient has a meaning"),
    "log_ratio": Metric("nats/token", "token_mean", "Reward log p / q_theta at the sampled tokens"),
    "reverse_kl_support": Metric("nats/token", "token_mean", "KL(student || teacher) on support and tail: a lower bound"),
    "teacher_head_error": Metric("nats/token", "token_mean", "Distance of the output head's log p from the recorded one"),
    "pretraining_loss": Metric("nats/token", "token_mean", "Cross entropy of the pretraining text, over its own tokens"),
    "pretraining_kl": Metric("nats/token", "token_mean", "KL(teacher || student) on the pretraining text"),
    "feature_hidden": Metric("1/token", "token_mean", "Distance of projected hidden states, mean over pairs of layers"),
    "feature_attention": Metric("1/token", "token_mean", "Distance of attention maps, mean over pairs of layers (nats for kl)"),
    "feature_relation": Metric("1/token", "token_mean", "Distance of relations among a response's tokens"),
    "uld": Metric("1/token", "token_mean", "Distance of both distributions, sorted by probability, at aligned positions"),
    "matched_kl": Metric(
        "nats/token", "token_mean", "KL(teacher || student) over the student's ids and a rest, at aligned positions"
    ),
    "aligned": Metric("share", "token_mean", "Response tokens at which a teacher with another tokenizer gives a row"),
    "teacher_disagreement": Metric("nats/token", "token_mean", "-log Z of an ensemble's geometric mean: 0 if all agree"),
    "teacher_tail_mass": Metric("share", "token_mean", "Teacher's probability outside the support"),
    "student_tail_mass": Metric("share", "token_mean", "Student's probability outside the support; high: raise student_top_k"),
    # From the loop and the pools.
    "tokens_per_s": Metric("tokens/s", "step", "Response tokens trained per second of the last 10 steps, waits included"),
    "wait_rollout_s": Metric("s", "step", "Training waited for sampling"),
    "wait_teacher_s": Metric("s", "step", "Training waited for scoring by a teacher that did not sample"),
    "parity_gap": Metric(
        "nats/token", "step", "Largest mean |log q of a replica - log q of the trainer| since the step before, on fixed ids"
    ),
    "wait_sync_s": Metric("s", "step", "Training waited for its new weights to be copied; replicas get them meanwhile"),
    "wait_evaluation_s": Metric(
        "s", "step", "Training waited for the evaluation of the version before to end, before it published its new weights"
    ),
    "wait_checkpoint_s": Metric("s", "step", "Training waited for checkpoints since the step before"),
    "wait_s": Metric("s", "step", "Training waited for samples or scores of this teacher alone or among others"),
    "queue_age_s": Metric(
        "s", "step", "Age of the oldest rollout in flight or waiting, since its admission, at the batch's start"
    ),
    "published_bytes": Metric("B", "step", "Weights that the student published last for the replicas, before any compression"),
    "update_bytes": Metric(
        "B",
        "step",
        "What is new in the version published last, which every node fetches, with training.sync_full_every or training.lora",
    ),
    "update_changed": Metric(
        "share", "step", "Weights of that version that differ from the one before, counted as 16-bit words of its files"
    ),
    "retried_samples": Metric("samples", "step", "Samples asked for again after a replica failed, since the run's start"),
    "hedged_samples": Metric("samples", "step", "Samples asked for twice since a replica was slow, since the run's start"),
    # From a System-2 program, over the rollouts that ended since the step before.
    "teacher_calls": Metric("calls", "rollout_mean", "Calls to the teacher for one answer"),
    "teacher_tokens": Metric("tokens", "rollout_mean", "Tokens that the teacher wrote for one answer, all calls together"),
    "answer_tokens": Metric("tokens", "rollout_mean", "Final answer, end-of-sequence token included, where there is one"),
    "unparsable": Metric("share", "rollout_mean", "Rollouts without an answer that could be read"),
    "unparsable_cut": Metric("share", "rollout_mean", "Of all rollouts, those without one because a limit of tokens cut it"),
    "teacher_replicas": Metric("replicas", "step", "Teacher replicas that were ready"),
    "replicas": Metric("replicas", "step", "Replicas of this teacher that were ready"),
    "pass_share": Metric(
        "share", "step", "Forward passes of this teacher's engines that ran the teacher, since the step before"
    ),
}


_WEIGHT = "trajectory_weight"
"""Sum of weights: with the sum of squares under `<name>_sq` it becomes `<name>_mean` and `<name>_ess`."""

_GAP = "rollout_gap"
"""Sum over some of the tokens, whose number is under `<name>_tokens`: a step without any has no mean."""


def reduce_sums(sums: Mapping[str, float], num_tokens: int) -> dict[str, float]:
    """Reduce the sums of a loss over all response tokens of a step to metrics: means, and the effective sample size.

    Args: sums: by the names in `LossOutput.sums`, added up over micro-batches and ranks; num_tokens: tokens of the whole step.
    `<group>/<name>` is divided by `<group>/tokens` instead; groups without a token have no means.
    Returns: an empty dict for a step without response tokens.
    """
    if num_tokens == 0:
        return {}
    means = {}
    for name, value in sums.items():
        group, slash, leaf = name.rpartition("/")
        count = sums[f"{group}/tokens"] if slash else num_tokens
        if leaf != "tokens" and count:
            means[name] = float(value) / count
    if _WEIGHT in means:
        means[f"{_WEIGHT}_mean"] = means.pop(_WEIGHT)
        del means[f"{_WEIGHT}_sq"]
        means[f"{_WEIGHT}_ess"] = effective_sample_size(float(sums[_WEIGHT]), float(sums[f"{_WEIGHT}_sq"]), num_tokens)
    if (tokens := means.pop(f"{_GAP}_tokens", None)) is not None:
        gap = means.pop(_GAP)
        if tokens:
            means[_GAP] = gap / tokens
    return means


def batch_metrics(rollouts: Sequence[Rollout], trained_version: int) -> dict[str, float]:
    """Compute metrics of a step's rollouts (at least one) before training: staleness, lengths, divergences, weights.

    Args: trained_version: the student version that the step starts from, relative to which staleness is counted.
    """
    versions = [rollout.target_versions for rollout in rollouts]
    staleness = [trained_version - int(drawn.min()) for drawn in versions if len(drawn)] or [0]
    metrics = {
        "staleness_mean": float(np.mean(staleness)),
        "staleness_max": float(max(staleness)),
        "response_tokens": float(np.mean([len(drawn) for drawn in versions])),
        "truncated": float(np.mean([rollout.finish_reason == "length" for rollout in rollouts])),
    }
    if any(rollout.has_context for rollout in rollouts):
        metrics["turns"] = float(np.mean([_turns(rollout) for rollout in rollouts]))
        metrics["environment_tokens"] = float(np.mean([len(each.token_ids) - each.num_targets for each in rollouts]))
    for name in ("reverse_kl", "forward_kl"):
        values = at_targets(rollouts, name)
        if len(values):
            metrics[name] = float(values.mean(dtype=np.float64))
    return metrics | _weight_metrics(rollouts, trained_version)


def _turns(rollout: Rollout) -> int:
    """Number of runs of targets."""
    is_target = rollout.is_target
    return int(is_target[:1].sum() + np.count_nonzero(is_target[1:] & ~is_target[:-1]))


def filter_metrics(dropped: Mapping[int, str], num_rollouts: int) -> dict[str, float]:
    """Fraction of a batch that was excluded, in total and by rule; empty if nothing was."""
    if not dropped:
        return {}
    shares = {f"filtered/{rule}": count / num_rollouts for rule, count in Counter(dropped.values()).items()}
    return {"filtered": len(dropped) / num_rollouts, **shares}


def _weight_metrics(rollouts: Sequence[Rollout], trained_version: int) -> dict[str, float]:
    """Mean and effective sample size of the mixing weights q / m, over all tokens and by `token_groups`.

    A teacher that the student has moved away from, or that is far from it, shows up as a low effective sample size there.
    Tokens of a black-box teacher, whose m is unknown, are excluded.
    """
    known = [rollout for rollout in rollouts if rollout.student_logprobs is not None and rollout.mixture_logprobs is not None]
    names, groups = token_groups(known, trained_version)
    if not names:
        return {}
    log_q, log_m = at_targets(known, "student_logprobs"), at_targets(known, "mixture_logprobs")
    weights = np.exp((log_q - log_m).astype(np.float64))
    counts = np.bincount(groups)
    totals, squares = np.bincount(groups, weights), np.bincount(groups, np.square(weights))
    every = [("", totals.sum(), squares.sum(), counts.sum())]
    every += [(f"{name}/", *of) for name, *of in zip(names, totals, squares, counts, strict=True)]
    metrics = {}
    for prefix, total, square, count in every:
        metrics[f"{prefix}importance_weight_mean"] = float(total / count)
        metrics[f"{prefix}importance_weight_ess"] = effective_sample_size(float(total), float(square), int(count))
    return metrics
