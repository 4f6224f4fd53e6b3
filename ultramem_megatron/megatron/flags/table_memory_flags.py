"""What --ultramem-table-memory host asks of the other flags."""

from argparse import Namespace
from collections.abc import Mapping

import torch

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.flags.row_adam_flags import refuse_rows_behind
from ultramem_megatron.memory.config import UltraMemConfig

_GIVEN = "--ultramem-table-memory host"
_REFUSED: Mapping[str, str] = {
    "use_megatron_fsdp": "its buffers hold what it trains, on the device",
    "use_torch_fsdp2": "gradients of tables are taken from the buffers of Megatron's DDP",
    "ultramem_row_adam": "AdamW visits rows that are read anyway",
    "ultramem_train_only": "it freezes parameters, and such a table is none of Megatron's",
    "ultramem_train_rows": "it looks at gradients on the device",
    "ultramem_log_tables_interval": "it looks at gradients on the device",
    "log_num_zeros_in_grad": "it would count one number of a table",
    "data_parallel_random_init": "weights would be sent between devices",
    "cuda_graph_impl": "the host takes part in every read",
    "use_mup": "it does not know what stands for a table",
}


def refuse_table_memory(args: Namespace, ultramem: UltraMemConfig) -> None:
    """Raise UltraMemError where tables cannot stay in host memory."""
    if getattr(args, "ultramem_table_memory", None) != "host":
        return
    for name, reason in _REFUSED.items():
        value = getattr(args, name, None)
        if value not in (None, False, "none"):
            shown = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            raise UltraMemError(
                f"{shown} cannot be combined with {_GIVEN}: {reason}. Drop one of the two."
            )
    if args.async_save and torch.cuda.is_available():
        raise UltraMemError(
            f"--async-save cannot be combined with {_GIVEN} beside a GPU: the process that writes "
            f"would share the tables' memory with the steps after it, and store what they make of "
            f"them. Drop one of the two."
        )
    refuse_rows_behind(args, ultramem, _GIVEN)
