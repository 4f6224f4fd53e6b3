"""Old name of `ultramem_megatron.training.bridge`."""

from ultramem_megatron.tools.old_names import stand_in

stand_in(__name__, "training.bridge")
