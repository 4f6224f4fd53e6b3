"""How large values start, so that what a memory puts out has a given standard deviation.

Scores have mean square 1, inputs and what projections make of them unit variance.
"""

import math

import torch.nn.functional as F

from ultramem_megatron.kernels.lookup_prevalued.activations import activation
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.initialization.feed_forward import mean_square

_HALVINGS = 60
_RANGE = (1e-6, 1e3)


def value_std(config: UltraMemConfig, output_std: float) -> float:
    """Standard deviation of values, and of pre-values where the config has them.

    Each of m*H values reaches 1/E of the projection's inputs. Pre-values of sigma make products of
    sigma * sqrt(Dp), so that without activation the output grows with sigma^2 (arXiv 2508.18756,
    eq. 26: sigma^4 = E Var_out / (m H Dp)).
    """
    pooled = math.sqrt(config.value_expansion / config.picks) * output_std
    if config.values == "gated":
        return pooled / math.sqrt(mean_square(F.silu, 1.0))
    return _root(config, pooled) if config.values == "prevalued" else pooled


def _root(config: UltraMemConfig, pooled: float) -> float:
    """sigma for which sigma times the root of the activated products' mean square is `pooled`."""
    function, width = activation(config.pre_value_activation), math.sqrt(config.pre_dim)
    low, high = (math.log(bound) for bound in _RANGE)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        sigma = math.exp(middle)
        loud = sigma * math.sqrt(mean_square(function, sigma * width)) > pooled
        low, high = (low, middle) if loud else (middle, high)
    return math.exp(low)
