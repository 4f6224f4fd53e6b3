"""Memories under torch's FSDP2 (--use-torch-fsdp2): gathered, added to and stored by their shards.

A transformer layer is a unit: its parameters, a memory's keys and projections among them, are cut
over the data- and context-parallel ranks and whole only while the layer computes. Value tables are
not part of it; they stay over their own groups (patches/doors/fsdp2_units.py). With
--ultramem-overlap a memory is a unit of its own, whole until backward is done.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensorFactory
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.layer import UltraMemLayer


def even_dim(shape: Sequence[int], ranks: int) -> int:
    """The first dimension that so many ranks cut evenly; 0 where none is.

    Keys and cores begin with heads, of which there are few.
    """
    return next((dim for dim, size in enumerate(shape) if size % ranks == 0), 0)


class Unit(Protocol):
    """What brings a layer's parameters together on every rank, and takes them away again."""

    def unshard(self) -> object:
        """A collective."""

    def reshard(self) -> object:
        """On every rank, after it."""


def units(model: nn.Module) -> dict[UltraMemLayer, FSDPModule]:
    """The unit of each memory layer of a model; none without FSDP2."""
    return {
        memory: memory if isinstance(memory, FSDPModule) else unit
        for unit in model.modules()
        if isinstance(unit, FSDPModule)
        for memory in unit.children()
        if isinstance(memory, UltraMemLayer)
    }


@contextmanager
def gathered(unit: Unit | None) -> Iterator[None]:
    """Within it the parameters of a unit are whole on every rank; a collective. None: they are."""
    if unit is not None:
        unit.unshard()
    try:
        yield
    finally:
        if unit is not None:
            unit.reshard()


def like(parameter: Tensor, whole: Tensor) -> Tensor:
    """This rank's share of a tensor that is the same on all ranks, as `parameter` is cut.

    Megatron-FSDP cuts a flat buffer of several, and tags each with what a rank has of it.
    """
    if not isinstance(parameter, DTensor):
        return whole
    mesh = parameter.device_mesh
    flat = getattr(parameter, "megatron_fsdp_slice", None)
    if flat is not None:
        own = whole.flatten()[flat].view_as(parameter._local_tensor)
        return DTensor.from_local(
            own, mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        )
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=parameter.placements)


def stored_shard(key: str, parameter: DTensor, tensor_rank: int) -> Any:
    """A shard as Megatron's distributed checkpoints take it, wherever it lies in the whole.

    tensor_rank: of this rank among the tensor-parallel ones, which have the same shard.
    """
    place = (parameter.device_mesh, parameter.placements)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, *place)
    local = parameter._local_tensor  # itself, by which the optimizer's state is found
    if not local.numel():  # more ranks than rows: nothing to write or read
        return ShardedTensorFactory(key, local, _kept_here, lambda kept: kept)
    return ShardedTensor(
        key,
        local,
        local.dtype,
        tuple(shape),
        tuple(parameter.shape),
        tuple(offset),
        None,  # shares may differ in size: no regular grid
        replica_id=(0, tensor_rank, 0),
    )


def _kept_here(_key: str, local: Tensor, *_: Any) -> LocalNonpersistentObject:
    return LocalNonpersistentObject(local)


def refuse_uneven_shards(models: Iterable[nn.Module]) -> None:
    """Raise UltraMemError for weights of Megatron's that its checkpoints cannot hold in shards.

    They store a weight as so many equal parts of its first dimension.
    """
    for model in models:
        memories = {p for memory in units(model) for p in memory.parameters()}
        for name, parameter in model.named_parameters():
            if not isinstance(parameter, DTensor) or parameter in memories:
                continue
            rows, ranks = parameter.shape[0], parameter.device_mesh.size()
            if rows % ranks:
                raise UltraMemError(
                    f"--use-torch-fsdp2 over {ranks} data- and context-parallel ranks: the first "
                    f"dimension of {name.replace('module.', '')} is {rows}, no multiple of them, "
                    f"and Megatron's checkpoints store equal shards alone. Use another number of "
                    f"ranks or other sizes, or neither --save nor --load."
                )
