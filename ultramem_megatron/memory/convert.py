"""Exchange of memory layers with their authors' published code: every loader, and its way back.

Each loader gives the layers of a model; `load_official_v1`, that of one layer.
"""

from ultramem_megatron.memory.memory_plus import load_memory_plus, to_memory_plus
from ultramem_megatron.memory.official_v1 import export_official_v1, load_official_v1
from ultramem_megatron.memory.official_v2 import load_official_v2, to_official_v2
from ultramem_megatron.memory.peer import load_peer, to_peer
from ultramem_megatron.memory.vertical_parallel import cut_official_v2

__all__ = [
    "cut_official_v2",
    "export_official_v1",
    "load_memory_plus",
    "load_official_v1",
    "load_official_v2",
    "load_peer",
    "to_memory_plus",
    "to_official_v2",
    "to_peer",
]
