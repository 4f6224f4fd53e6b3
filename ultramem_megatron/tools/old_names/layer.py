"""Old name of `ultramem_megatron.memory.layer`."""

from ultramem_megatron.tools.old_names import stand_in

stand_in(__name__, "memory.layer")
