"""Process that compares mathematical expressions with math-verify, a line of JSON for each question: `MathEquality` asks it.

A process of its own, because a response may hold an expression that takes for ever (9^9^9^9), and math-verify limits its time
by signals, which only the main thread of a process receives.
"""

from __future__ import annotations

import json
import sys
from typing import Any

LIMIT_S = 5
"""Time for reading one text, and for comparing two expressions."""


def answer(question: dict[str, str]) -> dict[str, Any]:
    """Answer a question. Args: question: `text`, and `reference` where it is to be compared.

    Returns: `found`: the expression in the text, None without one; `equal`: True if it equals that of the reference.
    """
    from math_verify import parse, verify

    found = parse(question["text"], parsing_timeout=LIMIT_S)
    equal = False
    if found and "reference" in question:
        # The order matters: a reference that is an interval, say, is not met by a point of it.
        equal = bool(verify(parse(question["reference"], parsing_timeout=LIMIT_S), found, timeout_seconds=LIMIT_S))
    return {"found": str(found[0]) if found else None, "equal": equal}


def serve() -> None:
    """Answer every line of standard input until it ends, with the process that asks."""
    answers = sys.stdout
    # Nothing that a library prints may come between.
    sys.stdout = sys.stderr
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True, file=answers)


if __name__ == "__main__":
    serve()
