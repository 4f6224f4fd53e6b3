"""The paper's initial values (appendix A), calibrated so that they meet their own target."""

from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.initialization.read_std import value_std
from ultramem_megatron.memory.initialization.scales import Host, Initialisation, Scales


def output_std(residual_branches: int) -> float:
    """1/sqrt(2L): the target of appendix A, what it takes an MLP's output to be.

    residual_branches: that add to the model's hidden states, 2L in L Transformer layers.
    """
    return residual_branches**-0.5


def _scales(config: UltraMemConfig, host: Host) -> Scales:
    std = value_std(config, output_std(host.residual_branches))  # sqrt(E / (2 m H L)) where pooled
    return Scales(
        query_gain=1.0,
        key_gain=config.key_dim**-0.5,
        query=host.hidden_size**-0.5,
        keys=config.key_dim**-0.5,
        values=std,
        pre_values=std,
        pre_projection=host.hidden_size**-0.5,
        value_projection=(config.value_expansion * config.value_dim) ** -0.5,
        cores=config.cores**-0.5,  # the sum of h independent cores has entries of variance 1
        mean_square=1.0,
    )


INITIALISATION = Initialisation(name="paper", scales=_scales)
