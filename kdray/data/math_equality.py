"""Grader of mathematical equality, by math-verify in a process of its own."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import weakref
from typing import Any

from kdray.config.graders import MathGrader
from kdray.data.graders import Grader
from kdray.data.math_worker import LIMIT_S
from kdray.types import Prompt

_DEADLINE_S = 60.0 + 3 * LIMIT_S
"""Longest wait for an answer: the first has to import sympy; then three limits of the process itself."""


class MathEquality(Grader):
    """Equality of the last expression in the response with that of the reference; `kdray.config.graders.MathGrader`."""

    def __init__(self, settings: MathGrader) -> None:
        self._process: subprocess.Popen[str] | None = None

    def grade(self, prompt: Prompt, response: str) -> bool:
        assert prompt.answer is not None
        return bool(self._ask(text=response, reference=prompt.answer)["equal"])

    def answer_of(self, response: str) -> str | None:
        found: str | None = self._ask(text=response)["found"]
        return found

    def check(self, prompt: Prompt) -> None:
        reference = prompt.answer or ""
        if self._ask(text=reference)["found"] is None:
            raise ValueError(f"no mathematical expression in the reference answer {reference[:80]!r}")

    def _ask(self, **question: str) -> dict[str, Any]:
        """Ask the process. Text that it cannot deal with in time, or dies of, is like text without an expression.

        Raises: RuntimeError if it answers nothing at all.
        """
        # The process may have died of something else, so the question is asked once more.
        found = self._answer(question) or self._answer(question)
        if found is None:
            if self._answer({"text": "1"}) is None:
                raise RuntimeError(
                    "the process that compares expressions (python -m kdray.data.math_worker) does not answer; is math-verify "
                    "installed?"
                )
            return {"found": None, "equal": False}
        return found

    def _answer(self, question: dict[str, str]) -> dict[str, Any] | None:
        """Answer of the process; None if it has died, or did not answer in time and was killed."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], _DEADLINE_S)
            line = process.stdout.readline() if ready else ""
        except BrokenPipeError:
            line = ""
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        process.kill()
        process.wait()
        self._process = None
        return None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kdray.data.math_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # Its complaints are about single responses.
                stderr=subprocess.DEVNULL,
                text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            weakref.finalize(self, self._process.kill)
        return self._process
