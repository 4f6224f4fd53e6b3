"""Old name of `ultramem_megatron.megatron.optimizer.value_learning_rate`."""

from ultramem_megatron.tools.old_names import stand_in

stand_in(__name__, "megatron.optimizer.value_learning_rate")
