"""What an initialisation decides: how large everything in a memory layer is at the start."""

from collections.abc import Callable
from dataclasses import dataclass

from ultramem_megatron.memory.config import UltraMemConfig


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Standard deviations of what is drawn from a normal distribution, gains of norms."""

    query_gain: float
    key_gain: float
    query: float
    """Of the query projection."""
    keys: float
    values: float
    value_projection: float
    cores: float | None
    """Of each entry of a Tucker core; None: uniform between 0 and 1."""
    calibrated: bool
    """Scale the queries once so that scores average 1 (see UltraMemLayer.calibrate)."""


@dataclass(frozen=True)
class Initialisation:
    """One initialisation: its name as a flag's value, and its scales.

    scales: of a config, in a model of `hidden_size` and `num_layers`.
    """

    name: str
    scales: Callable[[UltraMemConfig, int, int], Scales]
