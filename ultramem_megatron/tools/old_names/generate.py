"""Old name of `ultramem generate`, `ultramem_megatron.inference.generate`."""

from ultramem_megatron.tools.old_names import stand_in

stand_in(__name__, "inference.generate", "generate")
