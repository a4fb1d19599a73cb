"""Signals: the parts of a teacher's answer that a run may need."""

from __future__ import annotations

from typing import Literal

Signal = Literal["text", "references", "sampled", "top_k", "requested", "hidden", "beside"]
"""`text`: responses written by the teacher. `references`: the same scores for the data's reference answers as for any response.
`sampled`: log p of the tokens of a given response. `top_k`: the teacher's top ids and the tail mass. `requested`: log p at ids
given by the caller. `hidden`: last hidden states. `beside`: sampling jointly with the student, token by token, so that the
density of every sampled token is known."""

MEANING: dict[Signal, str] = {
    "text": "responses that it writes",
    "references": "its scores of the data's reference answers",
    "sampled": "its log p of every token",
    "top_k": "its logprobs at its top ids",
    "requested": "its logprobs at ids that another teacher names",
    "hidden": "its hidden states",
    "beside": "sampling beside the student",
}
"""Descriptions of the signals for messages."""
