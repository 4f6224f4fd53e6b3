"""What an initialisation decides: how large everything in a memory layer is at the start."""

from collections.abc import Callable
from dataclasses import dataclass

from ultramem_megatron.memory.config import UltraMemConfig


@dataclass(frozen=True, kw_only=True)
class Host:
    """The model that a memory stands in."""

    hidden_size: int
    residual_branches: int
    """That add to its hidden states: two in a Transformer layer, one in a layer of a hybrid."""
    feed_forward_std: float
    """Of the output of the layer's own MLP or experts, where the memory adds its own."""


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Standard deviations of what is drawn from a normal distribution, gains of norms."""

    query_gain: float
    key_gain: float
    query: float
    """Of the query projection."""
    keys: float
    values: float
    """Of the values; under a softmax, if its weights had the mean square that is asked for."""
    value_projection: float
    pre_values: float = 0.0
    pre_projection: float = 0.0
    """Of the projection to the width of a pre-value."""
    cores: float | None
    """Of each entry of a Tucker core; None: uniform between 0 and 1."""
    uniform: bool = False
    """Keys and the query projection are uniform around 0, of these standard deviations."""
    mean_square: float | None
    """To which that of scores is brought (see UltraMemLayer.calibrate); None: it is as it comes."""


@dataclass(frozen=True)
class Initialisation:
    """One initialisation: its name as a flag's value, and its scales."""

    name: str
    scales: Callable[[UltraMemConfig, Host], Scales]
