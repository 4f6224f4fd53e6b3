"""Large pages under tables and their gradients on a CPU, wherever Megatron has put them."""

from typing import Any

from ultramem_megatron.kernels.native.large_pages import ask_for_large_pages
from ultramem_megatron.memory.tables.value_table import is_value_table


def ask_for_table_pages(_: Any, model_chunks: list[Any]) -> None:
    """Move value tables and each `main_grad` to large pages; for the door of a built optimizer."""
    for chunk in model_chunks:
        for table in filter(is_value_table, chunk.parameters()):
            ask_for_large_pages(table.data, filled=True)
            gradient = getattr(table, "main_grad", None)
            if gradient is not None:
                ask_for_large_pages(gradient, filled=True)
