"""The initial values of product-key memories (Lample et al. 2019, arXiv 1907.05242, section 3).

Keys are uniform between -1/sqrt(Dk) and 1/sqrt(Dk), values normal with standard deviation
1/sqrt(Dv), the query projection is Glorot's uniform one; norms start as they are.
"""

from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.initialization.scales import Host, Initialisation, Scales


def _scales(config: UltraMemConfig, host: Host) -> Scales:
    queries = config.num_queries * 2 * config.key_dim
    return Scales(
        query_gain=1.0,
        key_gain=1.0,
        query=(2 / (host.hidden_size + queries)) ** 0.5,
        keys=(3 * config.key_dim) ** -0.5,  # a uniform number up to a has std a/sqrt(3)
        values=config.value_dim**-0.5,
        value_projection=(config.value_expansion * config.value_dim) ** -0.5,
        cores=None,
        uniform=True,
        calibrated=False,
    )


INITIALISATION = Initialisation(name="pkm", scales=_scales)
