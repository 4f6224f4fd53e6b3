"""Old name of `ultramem_megatron.megatron.optimizer.auxiliary_loss`."""

from ultramem_megatron.tools.old_names import stand_in

stand_in(__name__, "megatron.optimizer.auxiliary_loss")
