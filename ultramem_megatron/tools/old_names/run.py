"""Old name of `ultramem run`, `ultramem_megatron.training.run_script`."""

from ultramem_megatron.tools.old_names import stand_in

stand_in(__name__, "training.run_script", "run")
