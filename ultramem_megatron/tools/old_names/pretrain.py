"""Old name of `ultramem train`, `ultramem_megatron.training.pretrain`."""

from ultramem_megatron.tools.old_names import stand_in

stand_in(__name__, "training.pretrain", "train")
