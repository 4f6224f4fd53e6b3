"""Initial values by name: each initialisation is a file that gives scales for a config."""

from typing import TYPE_CHECKING

from ultramem_megatron.memory.kinds import Kinds, Listed

if TYPE_CHECKING:
    from ultramem_megatron.memory.initialization.scales import Initialisation

_HERE = "ultramem_megatron.memory.initialization"
INITIALISATIONS: "Kinds[Initialisation]" = Kinds(
    paper=Listed(f"{_HERE}.paper:INITIALISATION", "appendix A, calibrated to mean score 1"),
    official=Listed(f"{_HERE}.official:INITIALISATION", "the authors' code"),
)
"""By the word after --ultramem-init; a new one is a file and a place in this list."""
