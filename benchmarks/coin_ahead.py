"""How often a large teacher would have to run if coins said ahead where it draws: `python -m benchmarks.coin_ahead`.

A mixture alpha p + (1 - alpha) q can be drawn by a coin: with probability alpha the teacher draws the next token, and
otherwise the student alone does. Coins depend on (seed, position) only, so that they are known before anything is drawn.
Where the student draws, the teacher need not run in that step: it follows later, over several tokens in one pass, which also
gives their log p. Exact: no token is ever taken back.

Counts, nothing is timed. Requests are drawn in continuous batches of `in_flight`, and the next one takes a place that gets
free. In an engine step the student runs for every request that is not held up; the teacher runs

every step     as it does today;
on demand      in steps in which a coin is the teacher's, for those requests and, over what they drew since, for all the others;
grouped at f   once a share f of the requests is held up by such a coin: until then these wait, and the others draw on;
in turns of k  in every k-th step, or sooner if all are held up.

The cost of a pass is that of reading a model's weights, up to `FREE_TOKENS` tokens, and grows with the tokens beyond: the
teacher's weights are `ratio` times the student's. `faster` is the cost today over the cost of the policy. Writes
benchmarks/results/.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks import measured

ALPHA = 0.2
IN_FLIGHT = (16, 64, 256)
RATIOS = (4, 10, 30)
"""Sizes of the teacher over the student's."""
FREE_TOKENS = 256
"""Tokens of a pass up to which reading the weights decides, as with bfloat16 on an H100 or H200."""
ROUNDS = 6
"""Requests that a place has on average."""

Lengths = Callable[[np.random.Generator, int], np.ndarray]
LENGTHS: dict[str, Lengths] = {
    "all 256 tokens": lambda random, count: np.full(count, 256),
    "until EOS, mean 256": lambda random, count: np.minimum(random.geometric(1 / 256, count), 1024),
    "reasoning, lognormal": lambda random, count: np.clip(random.lognormal(5.5, 1.2, count), 1, 8192).astype(int),
}


@dataclass(frozen=True)
class Policy:
    """When the teacher runs."""

    name: str
    held: float = 0.0
    """Share of the requests in flight that a coin has to hold up; 0: one request is enough."""
    period: int = 0
    """Steps from one pass to the next; 0: none is due by time."""
    always: bool = False

    def runs(self, held: int, running: int, since: int) -> bool:
        """Decide on a step. Args: held: requests whose coin is the teacher's, of `running`; since: steps since its last."""
        if self.always or held == running:
            return True
        return since >= self.period if self.period else held > 0 and held >= self.held * running


POLICIES = [
    Policy("every step", always=True),
    Policy("on demand"),
    *(Policy(f"grouped at {share:.0%}", held=share) for share in (0.25, 0.5, 0.75, 1.0)),
    *(Policy(f"in turns of {period}", period=period) for period in (2, 4, 8)),
]


@dataclass(frozen=True)
class Counts:
    """What a policy did with all requests."""

    steps: int
    teacher_steps: int
    tokens: int
    student_cost: float
    """Passes of the student, each by its tokens."""
    teacher_cost: float

    @property
    def share(self) -> float:
        return self.teacher_steps / self.steps


def _cost(tokens: int) -> float:
    """Cost of a pass in readings of the weights."""
    return max(1.0, tokens / FREE_TOKENS) if tokens else 0.0


def draw(policy: Policy, lengths: np.ndarray, in_flight: int, alpha: float, seed: int = 0) -> Counts:
    """Draw all requests, each up to its length, and count."""
    random = np.random.default_rng(seed)
    waiting = list(lengths[::-1])
    left = np.array([waiting.pop() for _ in range(min(in_flight, len(lengths)))])
    behind = np.zeros_like(left)
    """Tokens that the teacher has not read."""
    coins = random.random(len(left)) < alpha
    """Whose turn the next token is: the teacher's."""
    steps = teacher_steps = tokens = since = 0
    student_cost = teacher_cost = 0.0
    while len(left):
        steps += 1
        since += 1
        runs = policy.runs(int(coins.sum()), len(left), since)
        draws = np.ones_like(coins) if runs else ~coins
        # A request that is held up has been through the student already: its q is known until the teacher's turn comes.
        student_cost += _cost(int(draws.sum()))
        if runs:
            teacher_cost += _cost(int(behind.sum()) + len(left))
            behind[:] = 0
            teacher_steps += 1
            since = 0
        else:
            behind += draws
        tokens += int(draws.sum())
        left = left - draws
        coins = np.where(draws, random.random(len(left)) < alpha, coins)
        ended = left == 0
        if ended.any():
            if not runs and (last := int(behind[ended].sum())):
                # Their rows are recorded by a pass that others need as well, or by one of prefill.
                teacher_cost += last / FREE_TOKENS
            for place in np.flatnonzero(ended):
                if waiting:
                    left[place], behind[place], coins[place] = waiting.pop(), 0, random.random() < alpha
            gone = left == 0
            left, behind, coins = left[~gone], behind[~gone], coins[~gone]
    return Counts(steps, teacher_steps, tokens, student_cost, teacher_cost)


def faster(today: Counts, found: Counts, ratio: float) -> float:
    """Cost today over the cost of a policy, with a teacher of `ratio` times the student's size."""
    return (today.student_cost + ratio * today.teacher_cost) / (found.student_cost + ratio * found.teacher_cost)


def main() -> None:
    alpha = float(sys.argv[1]) if len(sys.argv) > 1 else ALPHA
    results = []
    for kind, lengths_of in LENGTHS.items():
        for in_flight in IN_FLIGHT:
            lengths = lengths_of(np.random.default_rng(1), ROUNDS * in_flight)
            found = {policy.name: draw(policy, lengths, in_flight, alpha) for policy in POLICIES}
            today = found["every step"]
            for name, counts in found.items():
                gains = {str(ratio): faster(today, counts, ratio) for ratio in RATIOS}
                row = {"lengths": kind, "in_flight": in_flight, "policy": name, "teacher_share": counts.share}
                results.append(row | {"steps_over_today": counts.steps / today.steps, "faster": gains})
                numbers = f"{counts.share:6.2f} {counts.steps / today.steps:6.2f}  " + " ".join(
                    f"{gain:5.2f}" for gain in gains.values()
                )
                print(f"{kind:22s} {in_flight:4d} {name:16s} {numbers}")
    measured.write("coin_ahead", ["numpy"], {"alpha": alpha, "free_tokens": FREE_TOKENS, "results": results})


if __name__ == "__main__":
    main()
