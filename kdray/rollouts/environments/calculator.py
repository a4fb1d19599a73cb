"""A calculator: exact arithmetic on rational numbers, in the notation of GSM8K's solutions.

Source of the notation: Cobbe et al. 2021 (arXiv 2110.14168), appendix C: `48/2 = <<48/2=24>>24`, of which a calculator writes
the result inside the brackets while the model is sampled.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

from kdray.config.environments import CalculatorEnvironment
from kdray.rollouts.environments.episode import Reply
from kdray.types import Prompt

_CALL = re.compile(r"<<([^<>=]*)=\Z")
_NUMBER = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+")
"""Without exponents, which make large numbers of short texts."""
_LONGEST_EXPRESSION = 200
_LONGEST_RESULT = 64
_LARGEST_EXPONENT = 64

_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class Calculator:
    """Writes the result of `<<expression=`, and `>>`."""

    pauses = "="

    def __init__(self, settings: CalculatorEnvironment) -> None: ...

    def start(self, prompt: Prompt, seed: int) -> Calculator:
        """It has no memory: every rollout may use the same."""
        return self

    def reply(self, turn: str) -> Reply | None:
        """The result, or `error`; None for an equals sign that ends no call."""
        call = _CALL.search(turn)
        return None if call is None else Reply(f"{calculate(call[1])}>>")


def calculate(expression: str) -> str:
    """Value of an expression as text: an integer, a finite decimal, or otherwise a fraction in lowest terms; `error` for
    anything but numbers, brackets, `+ - * / // % **` and signs, for a division by zero, and for results beyond 64
    characters."""
    try:
        if len(expression) > _LONGEST_EXPRESSION:
            return "error"
        text = _written(_value(ast.parse(expression.strip(), mode="eval").body, expression.strip()))
    # What Python cannot parse, the operations that are not allowed, and numbers too large to be written.
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return "error"
    return text if len(text) <= _LONGEST_RESULT else "error"


def _value(node: ast.AST, source: str) -> Fraction:
    """Value of a parsed expression. Raises: ValueError for what is not allowed; ArithmeticError for a division by zero."""
    if isinstance(node, ast.Constant):
        # From the text: a float would have rounded 0.1 already.
        text = ast.get_source_segment(source, node) or ""
        if not _NUMBER.fullmatch(text):
            raise ValueError(f"{text} is no number")
        return Fraction(text)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand, source)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, source), _value(node.right, source)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        if type(node.op) in _BINARY:
            return _bounded(Fraction(_BINARY[type(node.op)](left, right)))
    raise ValueError(f"{type(node).__name__} is no arithmetic")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or abs(exponent) > _LARGEST_EXPONENT:
        raise ValueError(f"an exponent is a whole number of at most {_LARGEST_EXPONENT}")
    return _bounded(base ** int(exponent))


def _bounded(value: Fraction) -> Fraction:
    """The value, unless a chain of operations would make it grow without end."""
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > 8 * _LONGEST_EXPRESSION:
        raise ValueError("too large")
    return value


def _written(value: Fraction) -> str:
    twos, fives, rest = 0, 0, value.denominator
    while rest % 2 == 0:
        twos, rest = twos + 1, rest // 2
    while rest % 5 == 0:
        fives, rest = fives + 1, rest // 5
    places = max(twos, fives)
    if rest != 1 or not places:
        return str(value)
    whole, decimals = divmod(abs(value.numerator) * 10**places // value.denominator, 10**places)
    return f"{'-' if value < 0 else ''}{whole}.{decimals:0{places}d}"
