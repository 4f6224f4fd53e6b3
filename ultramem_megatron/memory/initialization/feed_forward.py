"""How large a feed-forward layer's output is at the start, from its sizes.

Inputs are as a norm leaves them, of unit variance. Weights are normal, biases 0. Then an inner
value before the activation is normal too, and the variance of the output is one integral.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_NODES = 2001
_REACH = 8.0  # standard deviations; beyond them lies 1e-15 of a normal variable


def mlp_std(
    hidden_size: int,
    inner_size: int,
    *,
    first_std: float,
    second_std: float,
    activation: Callable[[Tensor], Tensor],
    gated: bool,
    gate_offset: float = 0.0,
) -> float:
    """Standard deviation of the output of an MLP: D -> inner -> D.

    first_std, second_std: of the weights. activation: between them, elementwise. gated: it is
    multiplied by a second projection of the input, plus `gate_offset`.
    """
    inner_std = first_std * math.sqrt(hidden_size)
    square = mean_square(activation, inner_std)
    if gated:
        square *= inner_std**2 + gate_offset**2
    return second_std * math.sqrt(inner_size * square)


def mean_square(function: Callable[[Tensor], Tensor], std: float) -> float:
    """E[f(z)^2] for z normal around 0, by the trapezoidal rule in float64."""
    z = torch.linspace(-_REACH, _REACH, _NODES, dtype=torch.float64, device="cpu")
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return float(torch.trapezoid(function(z * std).double().square() * density, z))


def default_std(hidden_size: int, residual_branches: int) -> float:
    """Of Megatron's MLP where nothing is said: GELU, 4 D wide, weights of 0.02."""
    return mlp_std(
        hidden_size,
        4 * hidden_size,
        first_std=0.02,
        second_std=0.02 / math.sqrt(residual_branches),
        activation=F.gelu,
        gated=False,
    )
