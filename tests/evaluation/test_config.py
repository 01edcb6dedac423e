"""EvaluationConfig refuses what cannot be sampled."""

from __future__ import annotations

from typing import Any

import pytest

from cat_rs.evaluation import EvaluationConfig
from cat_rs.options import ConfigError


def test_seeds_become_a_tuple() -> None:
    seeds: Any = [3, 1]
    assert EvaluationConfig(seeds=seeds).seeds == (3, 1)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps: expected a number >= 1, got 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"height": -8}, "height"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"seeds": ()}, "seeds: expected at least one"),
        ({"seeds": (1, 1)}, r"seeds that differ, got \[1, 1\]"),
        ({"seeds": (0, -1)}, "seeds: expected a number >= 0, got -1"),
    ],
)
def test_unusable_settings_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        EvaluationConfig(**settings)
