"""Objects in the shards of a distributed checkpoint may be only what Megatron stores there.

PyTorch unpickles them without limits, so that a checkpoint from elsewhere could run what it likes:
the flags of its run, random states, steps of the optimizer. Here they are read with
`weights_only=True`, whose allow-list Megatron fills for its other formats, and its layout classes.
What Transformer Engine will unpickle a second time is looked at with Megatron's own unpickler.
"""

import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.faults.trust import ADVICE, fault_of, is_trusted
from ultramem_megatron.patches.patch import Editor, Patch

_PLANNER = "torch.distributed.checkpoint.default_planner.DefaultLoadPlanner.load_bytes"
_READER = "torch.distributed.checkpoint.filesystem.FileSystemReader.read_data"


class _RefusedObjectError(UltraMemError):
    """What an object asks for; the reader adds the folder."""


def _layout_classes() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What Megatron's list of safe classes lacks, but flags of a pipeline layout hold."""
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    return [LayerType, PipelineParallelLayerLayout]


def _checked(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def load_bytes(self: Any, read_item: Any, value: io.BytesIO) -> None:
        if is_trusted():
            return original(self, read_item, value)
        key = read_item.dest_index.fqn
        file = self.metadata.storage_data[read_item.storage_index].relative_path
        found = _unpickled(value, file, key)
        if not self.flatten_state_dict:
            self.state_dict[key] = found
            return None
        from torch.distributed.checkpoint._traverse import set_element

        return set_element(self.original_state_dict, self.mappings[key], found)

    return load_bytes


def _unpickled(value: io.BytesIO, file: str, key: str) -> Any:
    import torch

    try:
        with torch.serialization.safe_globals(_layout_classes()):
            found = torch.load(value, weights_only=True)
        for pickled in _pickled_again(found) if "_extra_state" in key else ():
            _read_extra_state(pickled)
        return found
    except Exception as error:  # bytes that were no object raise any of them
        raise _RefusedObjectError(
            f"{file}: what it holds as {key!r} {fault_of(error)}. {ADVICE}"
        ) from None


def _pickled_again(found: Any) -> Iterator[bytes]:
    """Of an extra state, what Transformer Engine will unpickle: bytes, as a tensor or a file."""
    import torch

    if isinstance(found, (list, tuple)):
        for part in found:
            yield from _pickled_again(part)
    elif isinstance(found, io.BytesIO):
        yield found.getvalue()
    elif isinstance(found, torch.Tensor) and found.numel():
        yield found.detach().cpu().numpy().tobytes()


def _read_extra_state(pickled: bytes) -> None:
    """Raise unless there is only what Megatron allows in an extra state, as pickled or saved."""
    import torch
    from megatron.core.safe_globals import SafeUnpickler

    if pickled.startswith(b"PK"):
        torch.load(io.BytesIO(pickled), weights_only=True)
    elif pickled:
        SafeUnpickler(io.BytesIO(pickled)).load()


def _naming_the_folder(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def read_data(self: Any, plan: Any, planner: Any) -> Any:
        try:
            return original(self, plan, planner)
        except _RefusedObjectError as error:
            raise UltraMemError(f"{self.path}/{error}") from None

    return read_data


def _install(editor: Editor) -> None:
    editor.wrap(_PLANNER, _checked, ("self", "read_item", "value"))
    editor.wrap(_READER, _naming_the_folder, ("self", "plan", "planner"))


PATCH = Patch(
    name="defects.safe_objects",
    symbols=(_PLANNER, _READER),
    reason="Megatron's planner inherits the method, and neither takes a setting.",
    delete_when="DefaultLoadPlanner.load_bytes calls torch.load with weights_only=True.",
    install=_install,
)
