"""Comparison of a run's evaluations: intervals, paired differences, share of the gap closed, warnings, and a verdict.

Works on the numbers of every response in the run folder. An evaluation of which there are none, as in folders of earlier
versions, has no intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kdray.runs.folder import RunFolder
from kdray.runs.results.bootstrap import LEVEL, RESAMPLES, Estimate, combined, difference, differences, intervals, share_of_gap
from kdray.runs.results.draws import Ratio, ratios, read_draws

OUTCOMES = ("before", "program", "distilled", "after", "control", "teacher")
"""Evaluations in summary.json, in the order in which they are shown."""

DIFFERENCES = (("after", "before"), ("after", "control"))
"""Evaluations that are compared in pairs."""

_SHARES = ("exact_match", "step_match", "pass_at_", "truncated", "repetition", "top_overlap", "rouge_l")
_LONGER = 1.25
"""Growth of responses from which on it is a warning; below it, a task may just need them."""
_MOSTLY_CUT = 0.5
"""Share of responses without an end from which on it is a warning."""
_FEW_PROMPTS = 30
_SAME_MODEL = 1e-3
"""Reverse KL, nats per token, below which student and teacher count as one model before distillation."""


@dataclass(frozen=True)
class Headline:
    """A metric by which a run is judged, in words."""

    name: str
    words: str
    higher_is_better: bool
    scale: float
    digits: str
    """Format of a number."""
    unit: str
    difference_unit: str

    def show(self, value: float) -> str:
        return f"{value * self.scale:{self.digits}}{self.unit}"

    def show_difference(self, found: Estimate) -> str:
        value, low, high = (f"{each * self.scale:+{self.digits}}" for each in (found.value, found.low, found.high))
        return f"{value} {self.difference_unit}, {LEVEL:.0%} interval {low} to {high}"


EXACT_MATCH = Headline("exact_match", "exact match", True, 100.0, ".1f", "%", "points")
REVERSE_KL = Headline("reverse_kl", "reverse KL", False, 1.0, ".3g", " nats per token", "nats")


@dataclass(frozen=True)
class TeacherFacts:
    """Facts about the run's teacher, and what else trains its student, that a comparison needs."""

    left_out: str | None
    """Reason why its own score is not there; None if it is."""
    changes: bool
    """Its weights change during the run: divergences from it before and after are not from one model."""
    trained_by: str = "distillation"
    """What trained the student between before and after, in words."""


def compare(folder: RunFolder, summary: Mapping[str, Any], passes: Sequence[int], teacher: TeacherFacts) -> dict[str, Any]:
    """Entries of summary.json that follow from the numbers of every response: `verdict`, `gap_closed`, `teacher_left_out`,
    `warnings`, `intervals`, `differences`, `resampling`.

    Args: summary: holds the evaluations by name; passes: values of k of `pass_at_<k>`.
    Raises: DataError if a file cannot be read.
    """
    found = {}
    for name in OUTCOMES:
        path = folder.evaluations / f"{name}.parquet"
        if isinstance(summary.get(name), Mapping) and path.is_file():
            found[name] = ratios(read_draws(path), passes)
    return compared(summary, found, teacher)


def compared(summary: Mapping[str, Any], found: Mapping[str, Mapping[str, Ratio]], teacher: TeacherFacts) -> dict[str, Any]:
    """See `compare`. Args: found: metrics of each evaluation whose responses are known, by evaluation and name."""
    changes = {
        other: differences(found[one], found[other], _is_share) if one in found and other in found else {}
        for one, other in DIFFERENCES
    }
    common = _on_common_prompts(found)
    return {
        "verdict": _verdict(dict(summary) | common, changes, teacher),
        "gap_closed": _gap_closed(found, teacher),
        "teacher_left_out": _left_out(summary, teacher),
        "warnings": [*_other_prompts(found, common), *_warnings(found, changes["before"])],
        "intervals": {name: intervals_of(metrics) for name, metrics in found.items()},
        "differences": {
            f"{one} - {other}": {name: asdict(each) for name, each in changes[other].items()}
            for one, other in DIFFERENCES
            if changes[other]
        },
        "resampling": {"method": "percentile bootstrap over prompts", "level": LEVEL, "resamples": RESAMPLES},
    }


def headlines(summary: Mapping[str, Any]) -> list[str]:
    """First lines about a run, from its summary; none for a run of an earlier version. The share of the gap leads where it is
    a number, and follows the verdict where it is undefined."""
    lines = [summary["verdict"]] if isinstance(summary.get("verdict"), str) else []
    gap = summary.get("gap_closed")
    if isinstance(gap, Mapping):
        what = f"Share of the gap to the {gap['reference']} closed"
        if gap["value"] is None:
            lines.append(f"{what}: undefined, since {gap['reason']}.")
        else:
            value, low, high = (f"{gap[key]:.0%}" for key in ("value", "low", "high"))
            lines.insert(0, f"{what}: {value} ({LEVEL:.0%} interval {low} to {high}), by {gap['metric'].replace('_', ' ')}.")
    left_out = summary.get("teacher_left_out")
    if left_out is not None and (gap is None or gap["reason"] != left_out):
        lines.append(f"The teacher's own score is left out: {left_out}.")
    return lines + [f"Warning: {line}" for line in summary.get("warnings") or []]


def show_interval(found: Mapping[str, Mapping[str, Any]] | None, evaluation: str, metric: str) -> str:
    """Interval of a number as text that follows it; empty if it has none.

    Args: found: the entry `intervals` of summary.json; None in a run of an earlier version.
    """
    interval = (found or {}).get(evaluation, {}).get(metric)
    return "" if interval is None else f" ({interval[0]:.3g} to {interval[1]:.3g})"


def intervals_of(metrics: Mapping[str, Ratio]) -> dict[str, list[float]]:
    """Bounds of every metric of an evaluation that has an interval."""
    estimates = intervals(list(metrics.values()), [_is_share(name) for name in metrics])
    return {name: [each.low, each.high] for name, each in zip(metrics, estimates, strict=True) if each is not None}


def _is_share(metric: str) -> bool:
    return metric.startswith(_SHARES)


def _verdict(summary: Mapping[str, Any], changes: Mapping[str, Mapping[str, Estimate]], teacher: TeacherFacts) -> str:
    """A sentence: is the student better than before, and than its control? Args: changes: by the other evaluation."""
    before, after, control = (summary.get(name) or {} for name in ("before", "after", "control"))
    metric = next((each for each in (EXACT_MATCH, REVERSE_KL) if each.name in before and each.name in after), None)
    if metric is None or (metric is REVERSE_KL and teacher.changes):
        kl = "the teacher changes during the run" if teacher.changes else "no replica holds both models"
        return f"Before and after cannot be compared: nothing grades the held-out prompts, and {kl}."
    was, now = metric.show(before[metric.name]), metric.show(after[metric.name])
    change = changes["before"].get(metric.name)
    if change is None:
        return (
            f"{metric.words.capitalize()} was {was} before and {now} after {teacher.trained_by}; there is no interval, since "
            "evaluations/ lacks the responses of one of them or has fewer than two prompts."
        )
    if change.excludes_zero:
        verb = "raised" if change.value > 0 else "lowered"
        what = teacher.trained_by[:1].upper() + teacher.trained_by[1:]
        first = f"{what} {verb} {metric.words} from {was} to {now} ({metric.show_difference(change)})"
    else:
        first = (
            f"{metric.words.capitalize()} after {teacher.trained_by}, {now}, is not distinguishable from before, {was} "
            f"({metric.show_difference(change)})"
        )
    if metric.name not in control:
        return f"{first}; no control was trained."
    against, there = changes["control"].get(metric.name), metric.show(control[metric.name])
    if against is None:
        return f"{first}; the control is at {there}, without an interval."
    if not against.excludes_zero:
        verb = "is not distinguishable from"
    else:
        verb = "beats" if (against.value > 0) == metric.higher_is_better else "falls short of"
    return f"{first}; the student {verb} its control, {there} ({metric.show_difference(against)})."


def _on_common_prompts(found: Mapping[str, Mapping[str, Ratio]]) -> dict[str, dict[str, float]]:
    """Before and after on the prompts that both have, where a resume changed `evaluation` in between; else empty."""
    if not all(name in found for name in DIFFERENCES[0]):
        return {}
    # All metrics of an evaluation are over its prompts.
    prompts = [found[name]["response_tokens"].prompt_ids for name in DIFFERENCES[0]]
    both = np.intersect1d(prompts[0], prompts[1])
    if all(len(each) == len(both) for each in prompts):
        return {}
    common = {name: {metric: each.at(both) for metric, each in found[name].items()} for name in DIFFERENCES[0]}
    return {name: {metric: each.value for metric, each in of.items() if each.num_prompts} for name, of in common.items()}


def _other_prompts(found: Mapping[str, Mapping[str, Ratio]], common: Mapping[str, Any]) -> list[str]:
    if not common:
        return []
    before, after = (len(found[name]["response_tokens"].prompt_ids) for name in ("before", "after"))
    return [
        f"before was measured on {before} held-out prompts and after on {after}: the verdict and the differences are "
        "of those that both have."
    ]


def _gap_closed(found: Mapping[str, Mapping[str, Ratio]], teacher: TeacherFacts) -> dict[str, Any]:
    """(after - before) / (teacher - before), and the reason where it is undefined.

    By exact match against the teacher, or against the program of a teacher that answers through one; where the teacher has no
    score, by reverse KL, which is 0 for the teacher itself.
    """
    reference = "program" if "program" in found else "teacher"
    entry: dict[str, Any] = {"metric": None, "reference": reference, "value": None, "low": None, "high": None}
    names = ("after", "before", reference)
    match = [found[name][EXACT_MATCH.name] for name in names if EXACT_MATCH.name in found.get(name, {})]
    if len(match) == len(names):
        return _match_gap(entry | {"metric": EXACT_MATCH.name}, *match)
    kls = [found[name][REVERSE_KL.name] for name in names[:2] if REVERSE_KL.name in found.get(name, {})]
    if teacher.changes or len(kls) < 2:
        stored = "the responses of before, after or the teacher are not stored"
        return entry | {"reason": "the teacher changes during the run" if teacher.changes else teacher.left_out or stored}
    entry |= {"metric": REVERSE_KL.name, "reference": "teacher"}
    if (before := kls[1].value) < _SAME_MODEL:
        return entry | {"reason": f"the student began at the teacher ({REVERSE_KL.show(before)})"}
    return _entry(entry, combined(kls, lambda a, b: 1.0 - a / b))


def _match_gap(entry: dict[str, Any], after: Ratio, before: Ratio, reference: Ratio) -> dict[str, Any]:
    gap = difference(reference, before, share=True)
    if gap is None:
        return _entry(entry, None)
    if not any(each.sums.any() for each in (after, before, reference)):
        prompts = min(each.num_prompts for each in (after, before, reference))
        reason = f"no response to {prompts} held-out prompts is right, neither the student's nor the {entry['reference']}'s"
        return entry | {"reason": reason}
    if gap.low <= 0.0:
        relation = "is worse than" if gap.high < 0.0 else "is not distinguishable from"
        scores = f"{EXACT_MATCH.show(reference.value)} and {EXACT_MATCH.show(before.value)}"
        reason = f"the {entry['reference']} {relation} the student before: {scores} ({EXACT_MATCH.show_difference(gap)})"
        return entry | {"reason": reason}
    return _entry(entry, share_of_gap(after, before, reference, gap))


def _entry(entry: dict[str, Any], estimate: Estimate | None) -> dict[str, Any]:
    if estimate is None:
        return entry | {"reason": "there are fewer than two prompts"}
    return entry | asdict(estimate) | {"reason": None}


def _left_out(summary: Mapping[str, Any], teacher: TeacherFacts) -> str | None:
    """Reason why the summary has no score of the teacher; None if it has one."""
    if summary.get("teacher") is not None:
        return None
    # An earlier version, or evaluation.teacher=false at that time.
    return teacher.left_out or "it was not measured when the run began"


def _warnings(found: Mapping[str, Mapping[str, Ratio]], change: Mapping[str, Estimate]) -> list[str]:
    """Signs that responses degenerated between before and after, or that there are too few of them for intervals."""
    lines = []
    prompts = min((len(metrics["response_tokens"].prompt_ids) for metrics in found.values()), default=_FEW_PROMPTS)
    if prompts < _FEW_PROMPTS:
        lines.append(f"{prompts} held-out prompts are few: intervals from fewer than {_FEW_PROMPTS} tend to be too narrow.")
    cut = {name: metrics["truncated"].value for name, metrics in found.items() if "truncated" in metrics}
    if cut.get("after", 0.0) >= _MOSTLY_CUT:
        lines.append(
            f"{cut['after']:.0%} of the responses after training are cut off at rollout.max_new_tokens: their ends are "
            "neither learned nor measured; raise it if answers should end."
        )
    length, loops = change.get("response_tokens"), change.get("repetition")
    if length is not None and length.low > 0.0:
        before, after = (found[name]["response_tokens"].value for name in ("before", "after"))
        if after >= _LONGER * before:
            grown = f"{length.value:+.3g}, {LEVEL:.0%} interval {length.low:+.3g} to {length.high:+.3g}"
            lines.append(f"responses became longer: {before:.3g} tokens before, {after:.3g} after ({grown}).")
    if loops is not None and loops.low > 0.0:
        before, after = (found[name]["repetition"].value for name in ("before", "after"))
        risen = f"{loops.value * 100:+.1f} points, {LEVEL:.0%} interval {loops.low * 100:+.1f} to {loops.high * 100:+.1f}"
        lines.append(f"more responses end in a loop: {before:.1%} before, {after:.1%} after ({risen}).")
    return lines
