"""--optimizer muon with --use-distributed-optimizer over gloo: parts of different sizes.

The layer-wise optimizer gives whole parameters to ranks and gathers what each has updated. NCCL
takes parts of different sizes, gloo does not; upstream's own reference, a broadcast each, is exact.
"""

from typing import Any

from ultramem_megatron.patches.cpu.devices import without_cuda
from ultramem_megatron.patches.patch import Editor, Patch

_GATHER = (
    "megatron.core.optimizer.layer_wise_optimizer.LayerWiseDistributedOptimizer.allgather_params"
)


def _allgather_params(self: Any) -> None:
    if self.pg_collection is not None:
        self.broadcast_params()


def _install(editor: Editor) -> None:
    editor.replace(_GATHER, _allgather_params, ("self",))


PATCH = Patch(
    name="cpu.uneven_gather",
    symbols=(_GATHER,),
    reason="It calls torch.distributed.all_gather with parts of different sizes: 'invalid tensor "
    "size' over gloo.",
    delete_when="gloo gathers parts of different sizes.",
    install=_install,
    active=without_cuda,
    versions=">=0.19",
)
