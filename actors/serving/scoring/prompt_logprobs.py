"""Scoring by vLLM's own `prompt_logprobs`: for engines whose prefill rows the recorder does not see.

It gives only the teacher's log p of the tokens and its top ids: no ids listed by the caller, no hidden states, no divergences
from the student. The tail mass is 1 minus the mass of its top logprobs, where the recorder sums it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_TAIL_FLOOR = 1e-7
"""Smallest tail mass: below this, the remainder of float32 logprobs is rounding error."""


def sampling_params(top_k: int, last_id: int) -> Any:
    """vLLM's parameters of a request that scores all of its prompt but the first token, and `last_id` after it.

    The last token is generated, from an allowed set of one: a prompt of full length leaves no room for another.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0,
        max_tokens=1,
        detokenize=False,
        ignore_eos=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        allowed_token_ids=[last_id],
        prompt_logprobs=top_k,
        logprobs=top_k,
        flat_logprobs=True,
    )


def columns(output: Any, start: int, vocab_size: int) -> dict[str, Any]:
    """The teacher's columns at the tokens from `start` on. Args: output: vLLM's RequestOutput; vocab_size: of its rows."""
    rows = [_row(output.prompt_logprobs, position) for position in range(start, len(output.prompt_token_ids))]
    rows.append(_row(output.outputs[0].logprobs, 0))
    # A token comes first, and again among the top ids if it is one of them.
    logprobs = np.array([logprobs for _, logprobs in rows], dtype=np.float32)
    ids = np.array([ids for ids, _ in rows], dtype=np.int32)
    support_ids, support_logprobs = ids[:, 1:], logprobs[:, 1:]
    inside = np.exp(support_logprobs.astype(np.float64)).sum(axis=1)
    tail = np.log(np.maximum(1.0 - inside, _TAIL_FLOOR)) if support_ids.shape[1] < vocab_size else np.full(len(ids), -np.inf)
    return {
        "teacher_logprobs": logprobs[:, 0],
        "support_ids": support_ids,
        "support_logprobs": support_logprobs,
        "tail_logprobs": tail.astype(np.float32),
    }


def _row(flat: Any, position: int) -> tuple[list[int], list[float]]:
    part = slice(flat.start_indices[position], flat.end_indices[position])
    return flat.token_ids[part], flat.logprobs[part]
