"""Old name of `ultramem_megatron.memory.official_v1`."""

from ultramem_megatron.tools.old_names import stand_in

stand_in(__name__, "memory.official_v1")
