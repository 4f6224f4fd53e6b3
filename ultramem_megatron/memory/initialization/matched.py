"""The default: a memory starts as loud as the feed-forward layer beside which it adds.

Appendix A's target, 1/(2L), is an MLP's variance at the paper's largest width alone; in narrow
models it is hundreds of times more, and training first turns the memory down. UltraMemV2 matches
the two as well (arXiv 2508.18756, eq. 26).
"""

from dataclasses import replace

from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.initialization.paper import INITIALISATION as PAPER
from ultramem_megatron.memory.initialization.read_std import value_std
from ultramem_megatron.memory.initialization.scales import Host, Initialisation, Scales


def _scales(config: UltraMemConfig, host: Host) -> Scales:
    std = value_std(config, host.feed_forward_std)
    return replace(
        PAPER.scales(config, host),
        values=std,
        pre_values=std,
        # Positive, so that all slices of a value weigh about the same, and the filter finds nearly
        # all that can be found: cores of both signs hide up to a quarter of it.
        cores=None,
    )


INITIALISATION = Initialisation(name="matched", scales=_scales)
