"""ROUGE-L of a response against its prompt's reference answer."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from kdray.types import Prompt


def rouge_l(prompt: Prompt, response: str) -> float | None:
    """F-measure of the longest common subsequence of words, in [0, 1]; None for a prompt without a reference answer.

    Words are runs of a-z and 0-9 in lower case; those of more than three letters are stemmed (Porter's stemmer), as MiniLLM's
    evaluation has it. Source: Lin 2004, ROUGE.
    """
    if not prompt.answer:
        return None
    return float(_scorer().score(prompt.answer, response)["rougeL"].fmeasure)


@lru_cache(maxsize=1)
def _scorer() -> Any:
    # Loads nltk: only for runs that ask for the metric.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
