"""Initial values by name: each initialisation is a file that gives scales for a config."""

from ultramem_megatron.memory.initialization import matched, official, paper, pkm
from ultramem_megatron.memory.initialization.scales import Initialisation

INITIALISATIONS: dict[str, Initialisation] = {
    entry.name: entry
    for entry in (
        matched.INITIALISATION,
        paper.INITIALISATION,
        official.INITIALISATION,
        pkm.INITIALISATION,
    )
}
"""By the word after --ultramem-init; a new one is a file and a place in this list."""
