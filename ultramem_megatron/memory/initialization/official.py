"""The initial values of the authors' code."""

from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.initialization.scales import Initialisation, Scales


def _scales(config: UltraMemConfig, _hidden_size: int, _num_layers: int) -> Scales:
    return Scales(
        query_gain=config.key_dim**-0.33,
        key_gain=config.key_dim**-0.33,
        query=config.key_dim**-0.5,
        keys=config.key_dim**-0.5,
        values=0.02,
        value_projection=(config.value_expansion * config.value_dim) ** -0.5,
        cores=None,
        calibrated=False,
    )


INITIALISATION = Initialisation(name="official", scales=_scales)
