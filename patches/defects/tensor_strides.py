"""The tensors of a checkpoint can be listed with a torch that knows their strides (2.12 on).

--dist-ckpt-strictness with anything but its default asks for that list, and upstream hands every
property that torch keeps of a tensor to torch.empty, which takes no strides (TypeError).
"""

import functools
from collections.abc import Callable
from typing import Any

from torch.distributed.checkpoint.metadata import TensorProperties, TensorStorageMetadata

from ultramem_megatron.patches.patch import Editor, Patch

_MODULE = "megatron.core.dist_checkpointing.strategies.torch"
_METHOD = f"{_MODULE}.TorchDistLoadShardedStrategy.load_tensors_metadata"


def _without_strides(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_tensors_metadata(self: Any, checkpoint_dir: Any, metadata: Any = None) -> Any:
        from megatron.core.dist_checkpointing.strategies.torch import _get_filesystem_reader

        if metadata is None:
            metadata = _get_filesystem_reader(checkpoint_dir).read_metadata()
        for tensor in metadata.state_dict_metadata.values():
            if isinstance(tensor, TensorStorageMetadata):
                vars(tensor.properties).pop("strides", None)
        return original(self, checkpoint_dir, metadata)

    return load_tensors_metadata


def _install(editor: Editor) -> None:
    editor.wrap(_METHOD, _without_strides, ("self", "checkpoint_dir", "metadata"))


PATCH = Patch(
    name="defects.tensor_strides",
    symbols=(_METHOD,),
    reason="The method reads the metadata itself and passes all properties on.",
    delete_when="It passes on the type alone.",
    install=_install,
    active=lambda: hasattr(TensorProperties, "strides"),
)
