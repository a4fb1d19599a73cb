"""Requests that an engine refuses before it asks vLLM for anything."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from actors.serving.engine import TeacherEngine
from kdray.errors import RequestRefused
from kdray.types import SampleRequest, Writer
from tests.support.pools import engine_spec

PROMPT = np.array([3, 4], np.int32)


def request(alpha: float, writer: Writer = "mixture") -> SampleRequest:
    return SampleRequest(5, 0, PROMPT, alpha, 1, 8, writer=writer)


@pytest.mark.parametrize("role", ["mixture", "teacher", "student"])
def test_no_replica_writes_in_the_datas_place(role: Literal["mixture", "teacher", "student"]) -> None:
    """A request for it has the alpha of the student's own draws, and is not one."""
    engine = TeacherEngine(engine_spec(Path("teacher"), Path("student"), role=role))
    own = {"mixture": 0.3, "teacher": 1.0, "student": 0.0}[role]
    engine._check(request(own))
    with pytest.raises(RequestRefused, match="sample 5 is to be the data's own answer"):
        engine._check(request(0.0, "data"))
    if role != "mixture":
        with pytest.raises(RequestRefused, match=rf"a {role}-only replica samples at alpha {own:g}, not 0\.3"):
            engine._check(request(0.3))
