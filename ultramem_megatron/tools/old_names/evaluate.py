"""Old name of `ultramem evaluate`, `ultramem_megatron.tools.evaluate`."""

from ultramem_megatron.tools.old_names import stand_in

stand_in(__name__, "tools.evaluate", "evaluate")
