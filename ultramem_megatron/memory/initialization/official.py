"""The initial values of the authors' code."""

from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.initialization.scales import Host, Initialisation, Scales


def _scales(config: UltraMemConfig, host: Host) -> Scales:
    gain = config.key_dim ** (-0.4 if config.values == "prevalued" else -0.33)  # UltraMemV2 or v1
    if config.rank_layout == "split":
        # Their code has the layout `full` alone. A slice of a key is r times shorter, which makes
        # scores, of fourth power in the gains, r times smaller.
        gain *= config.tucker_rank**0.25
    return Scales(
        query_gain=gain,
        key_gain=gain,
        query=config.key_dim**-0.5,
        keys=config.key_dim**-0.5,
        values=0.02,
        pre_values=0.02,
        pre_projection=host.hidden_size**-0.5,
        value_projection=(config.value_expansion * config.value_dim) ** -0.5,
        cores=None,
        mean_square=None,
    )


INITIALISATION = Initialisation(name="official", scales=_scales)
