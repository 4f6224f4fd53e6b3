"""The initial values of product-key memories (Lample et al. 2019, arXiv 1907.05242, section 3).

Keys are uniform between -1/sqrt(Dk) and 1/sqrt(Dk), values normal with standard deviation
1/sqrt(Dv), the query projection is Glorot's uniform one. What product keys do not have starts so
that scores stay as large as theirs: norms, and Tucker cores.
"""

import torch

from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.initialization.scales import Host, Initialisation, Scales

_TOKENS = 256


def _scales(config: UltraMemConfig, host: Host) -> Scales:
    queries = config.num_queries * 2 * config.key_dim
    keys = (3 * config.key_dim) ** -0.5  # a uniform number up to a has std a/sqrt(3)
    additive = config.retrieval == "pkm"
    return Scales(
        query_gain=1.0,
        key_gain=keys,
        query=(2 / (host.hidden_size + queries)) ** 0.5,
        keys=keys,
        values=config.value_dim**-0.5,
        pre_values=config.pre_dim**-0.5,
        pre_projection=host.hidden_size**-0.5,
        value_projection=(config.value_expansion * config.value_dim) ** -0.5,
        cores=None,
        uniform=True,
        mean_square=None if additive or config.softmax else additive_mean_square(config),
    )


def additive_mean_square(config: UltraMemConfig) -> float:
    """Of the m best sums of a row's and a column's score, each normal with variance 1/3."""
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (2, _TOKENS, config.keys_per_side)
    drawn = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float64)
    rows, columns = drawn.topk(config.topk).values
    best = (rows.unsqueeze(2) + columns.unsqueeze(1)).flatten(1).topk(config.topk).values
    return float(best.square().mean() / 3)


INITIALISATION = Initialisation(name="pkm", scales=_scales)
