"""Old name of `ultramem verify`, `ultramem_megatron.tools.verify_parallel`."""

from ultramem_megatron.tools.old_names import stand_in

stand_in(__name__, "tools.verify_parallel", "verify")
