"""Old name of `ultramem integrity`, `ultramem_megatron.faults.integrity`."""

from ultramem_megatron.tools.old_names import stand_in

stand_in(__name__, "faults.integrity", "integrity")
