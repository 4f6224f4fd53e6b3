"""An optimizer's state that was saved as it lay on the ranks, for tables that are now cut anew.

Megatron's default (dp_reshardable) keeps each rank's flat piece. Pieces of a table cut by rows and
by columns have the same length and other numbers: they would load, in silence, as wrong moments.
"""

from argparse import Namespace

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.checkpoint.folder import NoFlagsError, is_torch_dist, stored_args
from ultramem_megatron.megatron.checkpoint.source import Source
from ultramem_megatron.megatron.in_force import cut_of
from ultramem_megatron.memory.tables.settings import TableSettings


def check_table_cut(source: Source, args: Namespace, tables: TableSettings) -> None:
    """Raise UltraMemError if the optimizer's state cannot follow the tables' new cut."""
    unused = args.no_load_optim or args.finetune or source.flag != "--load"
    if not args.use_distributed_optimizer or unused or not is_torch_dist(source.iteration()):
        return
    from megatron.core.dist_checkpointing import load_content_metadata

    folder = str(source.iteration())
    try:
        stored = stored_args(folder)
    except NoFlagsError:
        return
    saved = (getattr(stored, "ultramem_in_force", None) or {}).get("tables")
    kind = (load_content_metadata(folder) or {}).get("distrib_optim_sharding_type")
    if kind == "dp_reshardable" and saved not in (None, cut_of(tables)):
        raise UltraMemError(
            f"{source}: its tables were {saved}, here they are {cut_of(tables)}, and the state of "
            f"its distributed optimizer cannot follow. Cut them as before "
            f"(--ultramem-parallel-size, --ultramem-partition), or go on once with --no-load-optim "
            f"(weights alone); saved with --dist-ckpt-optim-fully-reshardable it loads into any."
        )
