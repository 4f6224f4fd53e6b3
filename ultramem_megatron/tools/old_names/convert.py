"""Old name of `ultramem_megatron.memory.convert`."""

from ultramem_megatron.tools.old_names import stand_in

stand_in(__name__, "memory.convert")
