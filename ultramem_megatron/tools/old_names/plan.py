"""Old name of `ultramem plan`, `ultramem_megatron.tools.plan`."""

from ultramem_megatron.tools.old_names import stand_in

stand_in(__name__, "tools.plan", "plan")
