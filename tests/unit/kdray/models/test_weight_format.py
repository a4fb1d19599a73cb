"""Formats of quantised weights, as published configs state them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kdray.models.weight_format import WeightFormat

PUBLISHED: list[tuple[dict[str, Any], str, float]] = [
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq, 4 bits in groups of 128", 0.5 + 2 / 128),
    ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, "awq, 4 bits in groups of 128", 0.5 + 2 / 128),
    ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8, 8 bits", 1 + 2 / 4096),
    ({"quant_method": "mxfp4"}, "mxfp4, 4 bits", 0.5 + 2 / 4096),
    (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}, "targets": ["Linear"]}},
        },
        "compressed-tensors, 4 bits in groups of 32",
        0.5 + 2 / 32,
    ),
    (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"weights": {"num_bits": 8, "group_size": None}, "targets": ["Linear"]}},
        },
        "compressed-tensors, 8 bits",
        1 + 2 / 4096,
    ),
]


@pytest.mark.parametrize(("settings", "name", "size"), PUBLISHED)
def test_bits_and_groups_are_read(settings: dict[str, Any], name: str, size: float) -> None:
    found = WeightFormat.of(SimpleNamespace(quantization_config=settings))
    assert found is not None
    assert str(found) == name
    assert found.weight_bytes == pytest.approx(size)


def test_plain_weights_have_none() -> None:
    assert WeightFormat.of(SimpleNamespace()) is None
