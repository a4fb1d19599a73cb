"""The calculator: exact values of arithmetic, `error` for everything else, and calls in a model's text."""

from __future__ import annotations

import operator
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdray.config.environments import CalculatorEnvironment
from kdray.rollouts.environments import Reply
from kdray.rollouts.environments.calculator import Calculator, calculate

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("37*58", "2146"),
        (" 48/2 ", "24"),
        ("0.1+0.2", "0.3"),
        ("1/8", "0.125"),
        ("-7/4", "-1.75"),
        ("1/3", "1/3"),
        ("(1+2)*-3", "-9"),
        ("7//2", "3"),
        ("-7%3", "2"),
        ("2**10", "1024"),
        ("2**-3", "0.125"),
        (".5*4.", "2"),
        ("99999999999999999999*99999999999999999999", "9999999999999999999800000000000000000001"),
    ],
)
def test_values_are_exact(expression: str, value: str) -> None:
    assert calculate(expression) == value


NO_ARITHMETIC = [
    *("", "1/0", "0**-1", "1+", "x", "True", "1e9", "1e999999999", "0x10", "1_0", "1j", "'a'*9", "[1]", "abs(1)", "1<2", "1;2"),
    *("__import__('os').system('true')", "(1).__class__", "9**9**9", "2**65", "2**0.5", "10**60*10**60", "1" * 65, "1" * 201),
    *("(" * 150 + "1" + ")" * 150, "-" * 199 + "11", "\x00", "\uff11"),
]


@pytest.mark.parametrize("expression", NO_ARITHMETIC)
def test_anything_else_is_an_error_and_ends(expression: str) -> None:
    assert calculate(expression) == "error"


@given(st.integers(-999, 999), st.sampled_from("+-*/"), st.integers(1, 999), st.sampled_from("+-*/"), st.integers(1, 999))
def test_precedence_is_arithmetics(a: int, first: str, b: int, second: str, c: int) -> None:
    tight = second in "*/" and first in "+-"
    inner = OPERATIONS[second](Fraction(b), c) if tight else OPERATIONS[first](Fraction(a), b)
    value = OPERATIONS[first](a, inner) if tight else OPERATIONS[second](inner, c)
    assert Fraction(calculate(f"{a}{first}{b}{second}{c}")) == value


@pytest.mark.parametrize(
    ("turn", "reply"),
    [
        ("<<37*58=", "2146>>"),
        ("first 2+2=4, then <<6/4=", "1.5>>"),
        ("<<<3=", "3>>"),
        ("<<what=", "error>>"),
        ("37*58=", None),
        ("<<37*58=2146>> so x=", None),
        # A token that reaches beyond the sign: the model has begun to write the result itself.
        ("<<37*58=2", None),
        ("<37=", None),
        ("<<=", "error>>"),
        ("<<1+1=\n", None),
    ],
)
def test_a_call_ends_with_its_equals_sign(turn: str, reply: str | None) -> None:
    assert Calculator(CalculatorEnvironment()).reply(turn) == (None if reply is None else Reply(reply))
