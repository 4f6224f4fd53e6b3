"""Initial values by name: each initialisation is a file that gives scales for a config."""

from typing import TYPE_CHECKING

from ultramem_megatron.memory.kinds import Kinds, Listed

if TYPE_CHECKING:
    from ultramem_megatron.memory.initialization.scales import Initialisation

_HERE = "ultramem_megatron.memory.initialization"
INITIALISATIONS: "Kinds[Initialisation]" = Kinds(
    matched=Listed(
        f"{_HERE}.matched:INITIALISATION", "the output's variance is that of the layer's own MLP"
    ),
    paper=Listed(f"{_HERE}.paper:INITIALISATION", "appendix A, that variance is 1/(2 layers)"),
    official=Listed(f"{_HERE}.official:INITIALISATION", "the authors' code"),
    pkm=Listed(f"{_HERE}.pkm:INITIALISATION", "product-key memories' own"),
)
"""By the word after --ultramem-init; a new one is a file and a place in this list."""
