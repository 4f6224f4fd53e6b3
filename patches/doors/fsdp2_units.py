"""Door: FSDP2 leaves out of its units what is not the same on all data-parallel ranks.

Its units cut every parameter of a layer over these ranks. One with `allreduce=False`, Megatron's
tag of what fewer ranks have in common (a part of a value table), stays as it is; its gradient is
summed over those ranks when a step's gradients are finished, as Megatron's DDP does it. Any other
is cut along the dimension that its tag `SHARD_DIM` names, or else the first.

A module that is marked as WHOLE is a unit of its own within its layer's. It computes beside later
layers, when its layer's is given back: whoever calls it gathers it, FSDP2 gives it back when
backward is done.
"""

import functools
from collections.abc import Callable
from typing import Any

from ultramem_megatron.patches.doors.megatron_fsdp_parts import WHOLE
from ultramem_megatron.patches.patch import Editor, Patch

SHARD_DIM = "fsdp2_shard_dim"
"""Attribute of a parameter; the dimension must be a multiple of the ranks."""

_WRAPPER = "megatron.core.distributed.torch_fully_sharded_data_parallel"
_CLASS = f"{_WRAPPER}.TorchFullyShardedDataParallel"


def stays_whole(parameter: Any) -> bool:
    """Whether a parameter is of fewer ranks than all data-parallel ones."""
    return not getattr(parameter, "allreduce", True)


def _placement(parameter: Any) -> Any:
    from torch.distributed.tensor import Shard

    return Shard(getattr(parameter, SHARD_DIM, 0))


def _without_them(fully_shard: Callable[..., Any]) -> Callable[..., Any]:
    def sharded(module: Any, *, mesh: Any, **settings: Any) -> Any:
        from torch.distributed.fsdp import FSDPModule

        for child in [*module.modules()][1:]:
            if getattr(child, WHOLE, False) and not isinstance(child, FSDPModule):
                sharded(child, mesh=mesh, **settings)
        left_out = {parameter for parameter in module.parameters() if stays_whole(parameter)}
        for parameter in left_out:  # units move only their own
            parameter.data = parameter.data.to(mesh.device_type)
        return fully_shard(
            module, mesh=mesh, ignored_params=left_out, shard_placement_fn=_placement, **settings
        )

    return sharded


def _with_theirs(finish: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(finish)
    def finish_grad_sync(self: Any, force_all_reduce: bool = False) -> None:
        import torch
        import torch.distributed as dist
        from megatron.core import parallel_state

        finish(self, force_all_reduce)
        for parameter in self.parameters():
            if parameter.requires_grad and stays_whole(parameter):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad /= self.process_group.size()
                group = parallel_state.get_expert_data_parallel_group()
                dist.all_reduce(parameter.grad, group=group)

    return finish_grad_sync


def _install(editor: Editor) -> None:
    editor.wrap(f"{_WRAPPER}.fully_shard", _without_them)
    editor.wrap(f"{_CLASS}.finish_grad_sync", _with_theirs, ("self", "force_all_reduce"))


PATCH = Patch(
    name="doors.fsdp2_units",
    symbols=(f"{_WRAPPER}.fully_shard", f"{_CLASS}.finish_grad_sync"),
    reason="Megatron's wrapper gives fully_shard() neither ignored_params nor placements.",
    delete_when="TorchFullyShardedDataParallel takes both, and reduces what it left out.",
    install=_install,
    versions=">=0.19",
)
