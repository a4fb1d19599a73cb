"""Generated tasks: answers are right, prompts are different, and the same seed gives the same list."""

import re
from collections import Counter

import numpy as np
import pytest

from kdray.config.tasks import TASKS
from kdray.data.tasks import STAGES, generate_examples, shares, task
from kdray.errors import DataError
from kdray.models.resolve import ALPHABET


def _solve(name: str, prompt: str) -> str:
    """The answer by another way than the generator's: from the finished prompt."""
    if name == "last_letters":
        words = re.fullmatch(r"last letters of: ([a-z ]+) = ", prompt)
        assert words
        return "".join(word[-1] for word in words.group(1).split())
    if name == "hinted_letters":
        hint, plain = prompt.split(". ", 1)
        assert hint == _solve("last_letters", plain)
        return hint
    if name == "coin_flip":
        turns = re.findall(r"([a-z]+) (flips|does not flip) it\.", prompt)
        assert prompt.startswith("a coin is heads up. ")
        assert prompt.endswith(" is it still heads up? ")
        return "no" if sum(turn == "flips" for _, turn in turns) % 2 else "yes"
    if name in ("backed_letters", "misled_letters"):
        told = re.fullmatch(r"(last letters of: [a-z ]+ = )i think ([a-z]+)\. so: ", prompt)
        assert told
        right = _solve("last_letters", told.group(1))
        assert (told.group(2) == right) == (name == "backed_letters")
        assert len(told.group(2)) == len(right)
        return right
    if name == "judged_letters":
        judged = re.fullmatch(r"(last letters of: [a-z ]+ = )A: ([a-z]+) B: ([a-z]+) which\? ", prompt)
        assert judged
        right = _solve("last_letters", judged.group(1))
        assert sum(a != b for a, b in zip(judged.group(2), judged.group(3), strict=True)) == 1
        return {judged.group(2): "A", judged.group(3): "B"}[right]
    if name == "subtraction_game":
        pile, moves = int(prompt.split("pile ")[1].rstrip(": ")), []
        while pile:
            moves.append(pile % 4 or 1)
            pile -= moves[-1]
        return "".join(f"{move};" for move in moves)
    if name == "spelled_sum":
        pairs = [(a, int(d)) for a, d in re.findall(r"([a-z])(\d)", prompt.rstrip(": "))]
        sums = [sum(d for _, d in pairs[:n]) % 3 for n in range(len(pairs) + 1)]
        return " ".join(f"{a}{d}+{before}={after}" for (a, d), before, after in zip(pairs, sums, sums[1:], strict=False))
    if name == "running_sum":
        pairs = re.findall(r"([a-z])(\d)", prompt.rstrip(": "))
        return " ".join(f"{a}{d}={sum(int(each) for _, each in pairs[: n + 1]) % 3}" for n, (a, d) in enumerate(pairs))
    if name == "multiplication":
        return str(eval(prompt.rstrip("=")))
    numbers = re.fullmatch(r"(\d+)\+(\d+)=", prompt)
    assert numbers
    return str(int(numbers.group(1)) + int(numbers.group(2)))


@pytest.mark.parametrize("name", TASKS.names())
@pytest.mark.parametrize("difficulty", [2, 4])
def test_the_answer_is_right_and_the_grader_says_so(name: str, difficulty: int) -> None:
    size = min(200, task(name).num_prompts(difficulty))
    for example in generate_examples([name], difficulty, size, seed=1):
        assert example.answer == _solve(name, example.prompt)
        assert set(example.prompt + example.answer) <= set(ALPHABET)
        assert task(name).grade(f" {example.answer}\n", example.answer)
        assert not task(name).grade(example.answer + "x", example.answer)
        assert not task(name).grade(example.answer[:-1], example.answer)


@pytest.mark.parametrize(
    ("response", "share"),
    [
        ("a2=2 b2=1 c1=2 d0=2", 1.0),
        (" a2=2 b2=1 c1=2 d0=2\n", 1.0),
        ("a2=1 b2=0 c1=1 d0=1", 0.75),  # one error: the later steps follow from what was written
        ("a2=2 b2=1 c2=0 d0=0", 0.75),  # another digit than the question's
        ("a2=2 c2=1 c1=2 d0=2", 0.75),
        ("a2=2 b2 c1=2 d0=2", 0.75),  # nothing to go on from: the answer's sum counts
        ("a2=2 b2=1", 0.5),
        ("a2=2 b2=1 c1=2 d0=2 a2=1 b2=0 c1=1 d0=1", 0.5),
        ("", 0.0),
    ],
)
def test_steps_of_a_running_sum_are_graded_one_by_one(response: str, share: float) -> None:
    assert task("running_sum").step_match(response, "a2=2 b2=1 c1=2 d0=2") == share


@pytest.mark.parametrize(
    ("response", "share"),
    [
        ("a2+0=2 b2+2=1 c1+1=2 d0+2=2", 1.0),
        ("a2+0=1 b2+1=0 c1+0=1 d0+1=1", 0.75),  # one error: the later steps follow from what was written
        ("a2+0=2 b2+1=0 c1+0=1 d0+1=1", 0.75),  # not the sum that was written before
        ("a2+0=2 b2+2=1 c2+1=0 d0+0=0", 0.75),  # another digit than the question's
        ("a2+0=2 c2+2=1 c1+1=2 d0+2=2", 0.75),
        ("a2+0=2 b2=1 c1+1=2 d0+2=2", 0.75),  # nothing to go on from: the answer's sum counts
        ("a2+0=2 b2+2=1", 0.5),
        ("a2+0=2 b2+2=1 c1+1=2 d0+2=2 e1+2=0", 0.8),
        ("", 0.0),
    ],
)
def test_steps_of_a_spelled_sum_are_graded_one_by_one(response: str, share: float) -> None:
    assert task("spelled_sum").step_match(response, "a2+0=2 b2+2=1 c1+1=2 d0+2=2") == share


@pytest.mark.parametrize("difficulty", [1, 3, 25])
def test_difficulty_is_the_number_of_words_people_and_digits(difficulty: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        letters = task("last_letters").generate(rng, difficulty)
        assert len(letters.answer) == difficulty
        assert len(letters.prompt) <= 24 + 6 * difficulty
        assert task("coin_flip").generate(rng, difficulty).prompt.count(" it.") == difficulty
        assert len(task("running_sum").generate(rng, difficulty).answer) == 5 * difficulty - 1
        assert len(task("spelled_sum").generate(rng, difficulty).answer) == 7 * difficulty - 1
        numbers = task("arithmetic").generate(rng, difficulty).prompt[:-1].split("+")
        assert [len(number) for number in numbers] == [difficulty, difficulty]


# ------------------------------------------------------------------------------------------------ shares and stages


@pytest.mark.parametrize(
    ("size", "weights", "expected"),
    [(10, [1, 1], [5, 5]), (301, [1, 1, 1], [101, 100, 100]), (10, [3, 1], [8, 2]), (48, [0.06, 0.55, 0.39], [3, 26, 19])],
)
def test_shares_are_whole_and_in_proportion(size: int, weights: list[float], expected: list[int]) -> None:
    assert shares(size, weights) == expected


def test_weights_are_the_shares_of_tasks() -> None:
    examples = generate_examples(["coin_flip", "arithmetic"], 2, 40, seed=0, weights={"coin_flip": 1.0, "arithmetic": 3.0})
    assert Counter(example.task for example in examples) == {"coin_flip": 10, "arithmetic": 30}
    without = generate_examples(["coin_flip", "arithmetic"], 2, 40, seed=0, weights={"arithmetic": 1.0})
    assert {example.task for example in without} == {"arithmetic"}


def test_stages_say_what_they_promise() -> None:
    rng = np.random.default_rng(0)
    for name, stage in STAGES.items():
        assert stage.name == name
        for _ in range(50):
            example = stage.generate(rng, 2)
            assert set(example.prompt + example.answer) <= set(ALPHABET)
            if name == "letters_join":
                assert example.answer == "".join(re.findall("-([a-z])", example.prompt))
            if name == "letters_rephrase":
                assert example.answer.replace("-", "") in example.prompt
                assert re.fullmatch("[a-z]+-[a-z] [a-z]+-[a-z]", example.answer)
            if name == "coin_turns":
                turns = re.fullmatch("turns: ([fn]+) = ", example.prompt)
                assert turns
                assert example.answer == ("no" if turns.group(1).count("f") % 2 else "yes")
            if name == "sum_steps":
                left, right = re.findall(r"\d+", example.prompt)
                digits = [part.split("=")[1] for part in example.answer.split(".")[0].split(", ")]
                assert int(digits[-1] + "".join(digit[-1] for digit in digits[-2::-1])) == int(left) + int(right)
                assert all(eval(part.replace("=", "==")) for part in example.answer.split(".")[0].split(", "))
                assert example.answer.endswith(f"final answer: {int(left) + int(right)}")
            if name == "calculator_call":
                assert example.answer == f"<<{example.prompt}"
            if name == "calculator_read":
                question, call, result = re.fullmatch(r"(.*=)<<(.*=)(\d+)>>", example.prompt).groups()
                assert (call, result) == (question, example.answer)
                assert result == str(eval(question.rstrip("=")))
            if name == "game_move":
                pile, moves = re.fullmatch(r"[a-z]+ plays\. pile (\d+): ([1-3;]*)", example.prompt).groups()
                taken = [int(move) for move in moves.split(";")[:-1]]
                assert len(taken) % 2 == 0
                assert (int(pile) - sum(taken) - int(example.answer[:-1])) % 4 == 0
            if name.startswith("rewrite"):
                assert example.prompt.startswith(f"rewrite: {example.answer} i think ")
            if name == "judge_merge":
                (a, b) = ("".join(re.findall(f"{side}([01])", example.prompt)) for side in "AB")
                assert {"A": a, "B": b}[example.answer] == "11"
                assert sorted(a + b) == list("0111")


def test_coin_flip_answers_are_balanced() -> None:
    answers = Counter(example.answer for example in generate_examples(["coin_flip"], 3, 1000, seed=0))
    assert set(answers) == {"yes", "no"}
    assert 400 < answers["yes"] < 600


def test_examples_are_distinct_shared_equally_shuffled_and_repeatable() -> None:
    names = ["last_letters", "coin_flip", "arithmetic"]
    examples = generate_examples(names, 2, 301, seed=5)
    assert len({example.prompt for example in examples}) == 301
    kinds = ["l" if e.prompt[0] == "l" else "c" if e.prompt[0] == "a" else "a" for e in examples]
    assert Counter(kinds) == {"l": 101, "c": 100, "a": 100}
    assert len(set(kinds[:20])) > 1, "the tasks stand one after another"
    assert examples == generate_examples(names, 2, 301, seed=5)
    assert examples != generate_examples(names, 2, 301, seed=6)


def test_a_whole_space_can_be_drawn_and_one_more_is_refused_with_its_size() -> None:
    assert task("arithmetic").num_prompts(1) == 100
    everything = generate_examples(["arithmetic"], 1, 100, seed=0)
    assert len({example.prompt for example in everything}) == 100
    with pytest.raises(DataError, match=r"arithmetic has 100 different prompts at difficulty 1: 101 were asked"):
        generate_examples(["arithmetic"], 1, 101, seed=0)


def test_excluded_prompts_never_come_and_count_against_the_space() -> None:
    taken = frozenset(example.prompt for example in generate_examples(["arithmetic"], 1, 40, seed=0))
    rest = generate_examples(["arithmetic"], 1, 60, seed=0, exclude=taken)
    assert not taken & {example.prompt for example in rest}
    with pytest.raises(DataError, match=r"has 100 different prompts.* all but 60 of them"):
        generate_examples(["arithmetic"], 1, 61, seed=0, exclude=taken)
