"""Old name of `ultramem_megatron.megatron.model`."""

from ultramem_megatron.tools.old_names import stand_in

stand_in(__name__, "megatron.model")
