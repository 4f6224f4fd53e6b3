"""Value tables that decoding leaves in host memory or in the checkpoint's files.

Of tables on disk the host fetches a token's rows and copies them to a GPU, for which it waits for
the device.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.inference.layout import InferenceLayout
from ultramem_megatron.memory.tables.stored import CachedTable, StoredTable


def check_table_memory(table_memory: str, cuda_graphs: bool, premultiply_values: bool) -> None:
    """Raise UltraMemError for what needs its tables on the device."""
    if table_memory == "device":
        return
    reasons = {
        "--cuda-graphs": (cuda_graphs, "the host fetches rows in each step"),
        "--premultiply-values": (premultiply_values, "it multiplies whole tables"),
    }
    for flag, (given, reason) in reasons.items():
        if given:
            raise UltraMemError(f"--table-memory {table_memory}, {flag}: {reason}. Leave one out.")


def leave_tables(
    model: Any, sharded: dict[str, Any], folder: str, layout: InferenceLayout
) -> dict[str, Tensor]:
    """Let a model's tables, built `without_rows`, read from the checkpoint in `folder`.

    sharded: the model's sharded state, from which they are taken, so that nothing loads them.
    Returns their parameters, without rows, by name. All ranks call it. Raises UltraMemError, see
    TableFiles and `in_host_memory`.
    """
    from megatron.core.utils import unwrap_model

    from ultramem_megatron.inference.host_memory import in_eight_bits, in_host_memory
    from ultramem_megatron.megatron.checkpoint.folder import is_fsdp_dtensor
    from ultramem_megatron.megatron.checkpoint.table_files import TableFiles
    from ultramem_megatron.memory.tables.value_table import value_tables

    if is_fsdp_dtensor(Path(folder)):
        raise UltraMemError(
            f"--table-memory {layout.table_memory}: {folder} is in fsdp_dtensor, and such tables "
            f"are read from torch_dist alone. Use device."
        )
    in_memory, left = layout.table_memory == "host", {}
    files = TableFiles(folder, readahead=in_memory)
    for module_name, table in value_tables(unwrap_model(model)).items():
        name = f"{module_name}.weight"
        place = sharded.pop(name)
        on_disk = files.table(place.key, place.global_offset[0], table.layout.num_values)
        stored: StoredTable = on_disk
        if layout.table_format:
            stored = in_eight_bits(on_disk, table, layout.table_format, layout.table_block)
        elif in_memory:
            stored = in_host_memory(on_disk, table)
        if layout.table_cache_rows:
            stored = CachedTable(stored, layout.table_cache_rows, table.weight.detach())
        table.leave_stored(stored)
        left[name] = table.weight.detach()
    return left


def describe_cache(model: Any) -> str:
    """A line on how often rows came from caches, of all tables of this rank together."""
    from megatron.core.utils import unwrap_model

    from ultramem_megatron.memory.tables.value_table import value_tables

    tables = [table.stored for table in value_tables(unwrap_model(model)).values()]
    caches = [table.hot for table in tables if isinstance(table, CachedTable)]
    reads, hits = sum(hot.reads for hot in caches), sum(hot.hits for hot in caches)
    return (
        f"table cache: {hits:,} of {reads:,} rows that steps read came from it "
        f"({hits / max(1, reads):.1%}); {sum(hot.bytes for hot in caches) / 1e6:.1f} MB"
    )
