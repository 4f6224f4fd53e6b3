"""Recomputed outputs take their place again without a C++ extension compiled in every process."""

import torch

from ultramem_megatron.patches.cpu.devices import without_cuda
from ultramem_megatron.patches.patch import Editor, Patch

_GETTER = "megatron.core.tensor_parallel.random._get_share_storage"


def _refill(output: torch.Tensor, recomputed: torch.Tensor) -> None:
    """Fill the storage that was freed; views of it see the data, and no version is counted."""
    storage, source = output.untyped_storage(), recomputed.untyped_storage()
    storage.resize_(source.nbytes())
    storage.copy_(source)


def _get_share_storage() -> object:
    return _refill


def _install(editor: Editor) -> None:
    editor.replace(_GETTER, _get_share_storage, ())


PATCH = Patch(
    name="cpu.shared_storage",
    symbols=(_GETTER,),
    reason="--recompute-modules layernorm and its like compile an extension with load_inline, "
    "which needs a C++ compiler and ninja, in each process.",
    delete_when="torch can let one storage share another's data.",
    install=_install,
    active=without_cuda,
    versions=">=0.19",
)
