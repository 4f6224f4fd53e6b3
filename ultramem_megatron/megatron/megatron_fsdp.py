"""Memories under Megatron-FSDP (--use-megatron-fsdp): what its shards need that FSDP2's do not.

Value tables are in none of its units; they stay over their own groups, and their gradients and the
optimizer's state are cut over the ranks that have the same part
(patches/doors/megatron_fsdp_parts.py).
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from ultramem_megatron.megatron.fsdp2 import Unit
from ultramem_megatron.memory.layer import UltraMemLayer, memory_layers
from ultramem_megatron.memory.tables.value_table import VALUES_TAG, ValueTable
from ultramem_megatron.patches.doors.megatron_fsdp_parts import KEPT_TAGS

KEPT_TAGS.add(VALUES_TAG)


@dataclass(frozen=True)
class _Cut:
    """A memory whose dense weights are in shards between forward passes."""

    fsdp: Any
    memory: UltraMemLayer

    def unshard(self) -> None:
        """Its retrieval's parameters are what forward reads; a collective."""
        self.fsdp._replace_param_with_raw_if_needed()
        retrieval = list(self.memory.retrieval.parameters())
        self.fsdp.all_gather_and_wait_parameters_ready(retrieval, prefetch=False)

    def reshard(self) -> None:
        """Its parameters are the optimizer's again, and gathered anew before they are read."""
        self.fsdp.synchronize_param_gather()


def cut_layers(model: nn.Module) -> dict[UltraMemLayer, Unit]:
    """The memory layers of a model that Megatron-FSDP wraps; none without it."""
    fsdp = getattr(model, "module", None)
    if type(fsdp).__name__ != "MegatronFSDP":
        return {}
    return {memory: _Cut(fsdp, memory) for memory in memory_layers(model)}


def sum_over_all_ranks(optimizer: Any, chunks: list[Any]) -> None:
    """One norm and one overflow of dense parts and tables, where nothing is cut (no_shard).

    Upstream then asks the tensor-parallel ranks alone, for the others have the same gradients, but
    of tables they have other parts. Here all are asked, and only the first to have one answers.
    """
    if not cut_layers(chunks[0]):
        return
    if chunks[0].ddp_config.data_parallel_sharding_strategy != "no_shard":
        return
    first = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    first_of_part = parallel_state.get_expert_data_parallel_rank() == 0
    own = optimizer._filter_grads_for_norm

    def of_the_first(parameters: list[Any], *rest: Any, **named: Any) -> Any:
        dense = [p for p in parameters if first and getattr(p, "allreduce", True)]
        parts = [p for p in parameters if first_of_part and not getattr(p, "allreduce", True)]
        return own(dense + parts, *rest, **named)

    optimizer._filter_grads_for_norm = of_the_first
    optimizer.grad_stats_parallel_group = torch.distributed.group.WORLD


def place_tables(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """With each part of a value table where it lies in the whole one, which has one name.

    state: of a checkpoint in fsdp_dtensor; what is loaded into it lands in the tensors that it had.
    To Megatron-FSDP a rank's part is a whole parameter, under the same name on every rank.
    """
    tables, again = _tables_by_name(model)
    weights = {n: w for n, w in state["model"].items() if _bare(n) not in again}
    placed = {**state, "model": {n: _placed(w, tables.get(_bare(n))) for n, w in weights.items()}}
    if "optimizer" in state:
        kept = state["optimizer"]["state"].items()
        placed["optimizer"] = {**state["optimizer"]}
        placed["optimizer"]["state"] = {
            name: {key: _placed(tensor, tables.get(_bare(name))) for key, tensor in own.items()}
            for name, own in kept
        }
    return placed


def _tables_by_name(model: nn.Module) -> tuple[dict[str, ValueTable], set[str]]:
    """By the names of their weights, and the names under which they appear once more."""
    tables: dict[str, ValueTable] = {}
    again: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, ValueTable):
            continue
        weight = _bare(f"{name}.weight")
        if any(module is table for table in tables.values()):
            again.add(weight)
        else:
            tables[weight] = module
    return tables, again


def _bare(name: str) -> str:
    """Without wrappers, of which the optimizer's names have more."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def _placed(tensor: Any, table: ValueTable | None) -> Any:
    """A rank's shard of its part, as one of the whole table; the same memory."""
    if table is None or not isinstance(tensor, DTensor):
        return tensor
    layout = table.layout
    own = getattr(table.weight, "megatron_fsdp_slice", slice(0, 0))
    first = layout.rows().start + own.start // layout.shape[1]
    placed = DTensor.from_local(
        tensor._local_tensor,
        tensor.device_mesh,
        tensor.placements,
        shape=torch.Size((layout.num_values, layout.value_dim)),
        stride=(layout.value_dim, 1),
    )
    _say_where(placed, torch.Size((first, layout.columns().start)))
    return placed


def _say_where(tensor: DTensor, corner: torch.Size) -> None:
    """Tell torch's checkpoints where the shard begins, in the way that Megatron-FSDP does it."""
    local: Any = tensor._local_tensor
    chunk = ChunkStorageMetadata(corner, local.shape)

    def write_items(name: str, whole: DTensor) -> list[WriteItem]:
        if not local.numel():
            return []
        data = TensorWriteData(chunk, TensorProperties.create_from_tensor(local), whole.shape)
        return [WriteItem(MetadataIndex(name, corner), WriteItemType.SHARD, tensor_data=data)]

    local.__create_chunk_list__ = lambda: [chunk]
    local.__create_write_items__ = write_items
