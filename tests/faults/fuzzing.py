"""How the fuzzes draw: by hypothesis, from fixed seeds, the same in every run."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

TIMES = [
    pytest.param(1, marks=pytest.mark.slow, id="slow"),
    pytest.param(10, marks=pytest.mark.long, id="long"),
]
"""Parameters of a fuzz: as many examples as it names, or ten times as many."""


def drawn(examples: int) -> Callable[[Any], Any]:
    """Decorator of a test of hypothesis."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
