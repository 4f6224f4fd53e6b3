"""Old name of `ultramem export`, `ultramem_megatron.tools.export`."""

from ultramem_megatron.tools.old_names import stand_in

stand_in(__name__, "tools.export", "export")
