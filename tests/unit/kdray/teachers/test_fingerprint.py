"""The handshake: the same teacher passes through JSON and rounding, every other one is named as such."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from kdray.teachers.fingerprint import Fingerprint, difference

ONE = Fingerprint("teacher", None, "abc", 98, "float32", (3, 5, 7), (-0.5, -2.0))


def test_the_same_teacher_passes() -> None:
    assert difference(ONE, ONE) is None
    assert difference(Fingerprint.from_dict(json.loads(json.dumps(ONE.to_dict()))), ONE) is None
    assert difference(ONE, replace(ONE, scores=(-0.5005, -2.0))) is None


def test_half_precision_may_round_its_own_way() -> None:
    half = replace(ONE, dtype="bfloat16")
    assert difference(half, replace(half, scores=(-0.55, -2.05))) is None
    assert difference(ONE, replace(ONE, scores=(-0.55, -2.05))) is not None
    assert difference(half, replace(half, scores=(-0.9, -2.0))) is not None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scores": (-0.5, -2.1)}, r"canary no longer matches: log p of 2 fixed tokens is off by 0\.05 nats"),
        ({"scores": (-0.5, float("nan"))}, "canary no longer matches"),
        ({"tokenizer": "xyz"}, "its tokenizer is 'xyz', the run began with 'abc'"),
        ({"vocab_size": 99}, "its vocab_size is 99, the run began with 98"),
        ({"revision": "v2"}, "its revision is 'v2', the run began with None"),
        ({"model": "other"}, "its model is 'other'"),
        ({"dtype": "bfloat16"}, "its dtype is 'bfloat16'"),
        ({"canary": (3, 5, 8)}, "its canary is other token ids"),
        ({"logprobs": "raw logits"}, "its logprobs is 'raw logits'"),
    ],
)
def test_another_teacher_is_named(change: dict[str, Any], reason: str) -> None:
    found = difference(ONE, replace(ONE, **change))
    assert found is not None
    assert re.search(reason, found)
