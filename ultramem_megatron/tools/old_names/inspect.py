"""Old name of `ultramem inspect`, `ultramem_megatron.tools.inspect`."""

from ultramem_megatron.tools.old_names import stand_in

stand_in(__name__, "tools.inspect", "inspect")
