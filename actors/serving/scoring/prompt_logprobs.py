"""Scoring by vLLM's own `prompt_logprobs`: for engines whose prefill rows the recorder does not see.

It gives only the teacher's log p of the tokens and its top ids, or, under vLLM's newer model runner, log p at ids listed by the
caller: no hidden states, no divergences from the student. The tail mass is 1 minus the mass of these ids, where the recorder
sums it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.serving.spec import EngineSpec
from kdray.errors import RequestRefused
from kdray.types import Rollout

MOST_IDS = 127
"""Most ids that a request may list for a token. vLLM takes 128 (`MAX_LOGPROB_TOKEN_IDS`), and the token is one of them."""

_TAIL_FLOOR = 1e-7
"""Smallest tail mass: below this, the remainder of float32 logprobs is rounding error."""


@dataclass(frozen=True, eq=False)
class Asked:
    """A sequence to be scored: at its own tokens, and at the teacher's top ids or at listed ones."""

    sequence: np.ndarray
    """Prompt and response; the request's prompt is all but the last token."""
    start: int
    """Number of tokens of the prompt."""
    vocab_size: int
    top_k: int
    listed: np.ndarray | None = None  # [T, M]; -1 is unused

    @staticmethod
    def by(rollout: Rollout, top_k: bool, spec: EngineSpec) -> Asked:
        """The part of a call that is about a rollout. Raises: RequestRefused for what vLLM does not give."""
        listed = rollout.support_ids
        if listed is not None and not listed.shape[1]:
            listed = None
        if spec.model_runner == "v1" and (listed is not None or not top_k):
            raise RequestRefused(
                "scoring=prompt_logprobs gives a teacher's own top ids alone; set scoring=recorder, or model_runner=v2 on GPUs"
            )
        if listed is not None and top_k:
            raise RequestRefused(
                "scoring=prompt_logprobs gives a teacher's own top ids or log p at listed ones, not both; set scoring=recorder"
            )
        if listed is not None and listed.shape[1] > MOST_IDS:
            raise RequestRefused(
                f"scoring=prompt_logprobs gives log p at {MOST_IDS} ids a token at most, and {listed.shape[1]} are asked for; "
                "lower rollout.teacher_top_k, or set scoring=recorder"
            )
        if listed is None and not top_k:
            listed = np.empty((len(rollout.token_ids), 0), dtype=np.int32)
        width = min(spec.teacher_top_k, spec.vocab_size)
        sequence = np.concatenate([rollout.prompt_ids, rollout.token_ids])
        return Asked(sequence, len(rollout.prompt_ids), spec.vocab_size, width, listed)

    def sampling_params(self) -> Any:
        """vLLM's parameters of the request.

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
            allowed_token_ids=[int(self.sequence[-1])],
            flat_logprobs=True,
            **(self._top() if self.listed is None else self._at(self.listed)),
        )

    def _top(self) -> dict[str, Any]:
        return {"prompt_logprobs": self.top_k, "logprobs": self.top_k}

    def _at(self, listed: np.ndarray) -> dict[str, Any]:
        ids = _with_tokens(self.sequence[self.start :], listed)
        last = {"logprob_token_ids": sorted({int(each) for each in ids[-1] if each >= 0})}
        if len(ids) == 1:
            return last
        # A row of the prompt scores the token after it; the last one's is that of the generated token.
        return last | {"prompt_logprob_token_ids": ids[:-1], "prompt_logprob_start": self.start - 1}

    def columns(self, output: Any) -> dict[str, Any]:
        """The teacher's columns of the response. Args: output: vLLM's RequestOutput."""
        return self._top_columns(output) if self.listed is None else self._listed_columns(output, self.listed)

    def _top_columns(self, output: Any) -> dict[str, Any]:
        rows = [_row(output.prompt_logprobs, position) for position in range(self.start, len(output.prompt_token_ids))]
        rows.append(_row(output.outputs[0].logprobs, 0))
        # A token comes first, and again among the top ids if it is one of them.
        logprobs = np.array([logprobs for _, logprobs in rows], dtype=np.float32)
        ids = np.array([ids for ids, _ in rows], dtype=np.int32)
        return self._columns(logprobs, ids[:, 1:])

    def _listed_columns(self, output: Any, listed: np.ndarray) -> dict[str, Any]:
        # The first of each id: vLLM fills up shorter lists of a batch with an id at -inf.
        found = dict(reversed(list(zip(*_row(output.outputs[0].logprobs, 0), strict=True))))
        last = _with_tokens(self.sequence[-1:], listed[-1:])
        rows = [np.array([[found[each] if each >= 0 else -np.inf for each in last[0].tolist()]], dtype=np.float32)]
        if len(listed) > 1:
            rows.insert(0, np.asarray(output.prompt_token_id_logprobs, dtype=np.float32))
        return self._columns(np.concatenate(rows), listed.astype(np.int32))

    def _columns(self, logprobs: np.ndarray, support_ids: np.ndarray) -> dict[str, Any]:
        """Args: logprobs: [T, 1 + K], of the token and of the support."""
        support_logprobs = logprobs[:, 1:]
        inside = np.exp(support_logprobs.astype(np.float64)).sum(axis=1)
        whole = (support_ids >= 0).sum(axis=1) >= self.vocab_size
        tail = np.where(whole, -np.inf, np.log(np.maximum(1.0 - inside, _TAIL_FLOOR)))
        return {
            "teacher_logprobs": logprobs[:, 0],
            "support_ids": support_ids,
            "support_logprobs": support_logprobs,
            "tail_logprobs": tail.astype(np.float32),
        }


def _with_tokens(tokens: np.ndarray, listed: np.ndarray) -> np.ndarray:
    return np.concatenate([tokens[:, None], listed], axis=1).astype(np.int32)


def _row(flat: Any, position: int) -> tuple[list[int], list[float]]:
    part = slice(flat.start_indices[position], flat.end_indices[position])
    return flat.token_ids[part], flat.logprobs[part]
