"""The paper's initial values (appendix A), calibrated so that scores average 1."""

import math

from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.initialization.scales import Initialisation, Scales


def value_std(picks: int, expansion: int, num_layers: int) -> float:
    """sqrt(E / (2 m H L)): output variance 1/(2L) when scores average 1 (appendix A)."""
    return math.sqrt(expansion / (2 * picks * num_layers))


def _scales(config: UltraMemConfig, hidden_size: int, num_layers: int) -> Scales:
    return Scales(
        query_gain=1.0,  # calibrated later
        key_gain=config.key_dim**-0.5,
        query=hidden_size**-0.5,
        keys=config.key_dim**-0.5,
        values=value_std(config.picks, config.value_expansion, num_layers),
        value_projection=(config.value_expansion * config.value_dim) ** -0.5,
        cores=config.cores**-0.5,  # the sum of h independent cores has entries of variance 1
        calibrated=not config.softmax,
    )


INITIALISATION = Initialisation(name="paper", scales=_scales)
