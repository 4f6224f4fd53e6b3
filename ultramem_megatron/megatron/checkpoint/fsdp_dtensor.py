"""Weights of a checkpoint that Megatron-FSDP wrote, for a model that it does not wrap.

It stores whole weights under the names of modules, a gated MLP's first one in two halves (_w, _v),
and a shared table once for each group of memories. Each rank reads its parts on its own.
"""

import dataclasses
import re
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.transformer.fsdp_dtensor_checkpoint import handle_experts_in_state_dict
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan, ReadItem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ultramem_megatron.errors import UltraMemError, user_error

_MODEL = "model."
_WRAPPER = "module."
_LAYER = re.compile(r"decoder\.layers\.\d+\.")
_HALVES = ("_w", "_v")
_NORMS = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
)
"""A norm's name in Megatron's own layers, and in Transformer Engine's."""


class _Part(NamedTuple):
    """What is read: of one stored tensor, from `first` on, as much as `into` holds."""

    key: str
    first: torch.Size
    into: Tensor


def load_state(sharded: dict[str, Any], folder: str, num_experts: int | None) -> dict[str, Any]:
    """The state of a module, as its `load_state_dict` takes it; no collective.

    sharded: its `sharded_state_dict`, whose tensors are written to. num_experts: of all ranks.
    Raises UltraMemError for weights that are missing, of other sizes or damaged.
    """
    reader = FileSystemReader(folder)
    metadata = reader.read_metadata()
    names = _Names(metadata, sharded, num_experts, folder)
    parts: list[_Part] = []
    state = {name: _asked(name, entry, names, parts) for name, entry in sharded.items()}
    planner = _PartsPlanner(parts, metadata, folder)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    try:
        plan = reader.prepare_local_plan(planner.create_local_plan())
        reader.read_data(plan, planner).wait()
    except Exception as error:  # damaged files end in errors of any kind
        raise user_error(error) or UltraMemError(
            f"{folder} is damaged: {type(error).__name__} {error!s:.200}. Give another --load."
        ) from error
    return {
        name: entry.merge_fn(state[name])
        if isinstance(entry, ShardedTensorFactory)
        else state[name]
        for name, entry in sharded.items()
    }


class _Names:
    """Which stored tensor is a module's."""

    def __init__(
        self, metadata: Metadata, own: dict[str, Any], num_experts: int | None, folder: str
    ) -> None:
        self.folder = folder
        self.sizes: dict[str, torch.Size] = {
            key: stored.size
            for key, stored in metadata.state_dict_metadata.items()
            if key.startswith(_MODEL) and hasattr(stored, "size")
        }
        self.keys = {_bare(key.removeprefix(_MODEL)): key for key in self.sizes}
        # This rank's experts have their numbers among all.
        of_all = handle_experts_in_state_dict({name: name for name in own}, num_experts)
        self.stored = {name: _of_model(others, own[name]) for others, name in of_all.items()}

    def keys_of(self, name: str) -> list[str]:
        """One key, or those of two halves, one above the other. Raises UltraMemError."""
        for wanted in self._spelled(self.stored[name]):
            if wanted in self.keys:
                return [self.keys[wanted]]
            if wanted + _HALVES[0] in self.keys:
                return [self.keys[wanted + half] for half in _HALVES]
        raise UltraMemError(
            f"{self.folder}: the checkpoint lacks weights of this model: {name}. Give the flags "
            f"the checkpoint was made with, or another one."
        )

    def _spelled(self, name: str) -> list[str]:
        others = [name.replace(a, b) for pair in _NORMS for a, b in (pair, pair[::-1]) if a in name]
        return [name, *others]


def _of_model(name: str, entry: Any) -> str:
    """With a layer's number in the model for that in its pipeline stage."""
    number = _LAYER.match(getattr(entry, "key", ""))
    return _LAYER.sub(number[0], name) if number else name


def _bare(name: str) -> str:
    while name.startswith(_WRAPPER):
        name = name.removeprefix(_WRAPPER)
    return name


def _asked(name: str, entry: Any, names: _Names, parts: list[_Part]) -> Any:
    """What the state has of an entry, once `parts` are read."""
    if isinstance(entry, LocalNonpersistentObject):
        return entry.obj
    if isinstance(entry, ShardedObject):  # of Transformer Engine's modules, beside weights
        return entry.data
    if isinstance(entry, ShardedTensorFactory):
        built = entry.build()
        assert isinstance(built, list)
        return [_asked(name, part, names, parts) for part in built]
    assert isinstance(entry, ShardedTensor)
    part = _part(name, entry, names)
    if part.into.numel():
        parts.append(part)
    return entry.data


def _part(name: str, entry: ShardedTensor, names: _Names) -> _Part:
    keys = names.keys_of(name)
    size = names.sizes[keys[0]]
    shape = entry.global_shape[entry.prepend_axis_num :]
    first = list(entry.global_offset[entry.prepend_axis_num :])
    into = entry.data.detach()
    if entry.allow_shape_mismatch and size[1:] == shape[1:]:  # a vocabulary is padded for its ranks
        return _Part(keys[0], torch.Size(first), into[: max(0, size[0] - first[0])])
    # Halves, and shared tables, which torch_dist stacks.
    stacked = len(shape) > 0 and size[1:] == shape[1:] and shape[0] % max(1, size[0]) == 0
    if size != shape and not stacked:
        raise UltraMemError(
            f"{names.folder}: {name} is {tuple(size)} in the checkpoint, {tuple(shape)} in this "
            f"model. Give the flags the checkpoint was made with, or another one."
        )
    key = keys[0]
    if stacked:
        number, first[0] = divmod(first[0], size[0])
        key = keys[number] if len(keys) > 1 else key
    return _Part(key, torch.Size(first), into)


class _PartsPlanner(DefaultLoadPlanner):
    """Reads parts of tensors into tensors that have no names."""

    def __init__(self, parts: list[_Part], metadata: Metadata, folder: str) -> None:
        super().__init__()
        self.parts, self.metadata, self.folder = parts, metadata, folder

    def create_local_plan(self) -> LoadPlan:
        """What to read, all of which the files must have; others have no part in it."""
        return LoadPlan([item for number in range(len(self.parts)) for item in self._items(number)])

    def _items(self, number: int) -> list[ReadItem]:
        key, first, into = self.parts[number]
        assert self.metadata is not None
        stored: Any = self.metadata.state_dict_metadata[key]
        chunk = ChunkStorageMetadata(first, into.shape)
        items = create_read_items_for_chunk_list(key, stored, [chunk])
        if sum(item.lengths.numel() for item in items) != into.numel():
            raise UltraMemError(
                f"{self.folder} is damaged: its files lack numbers of {key}. Give another --load."
            )
        return [dataclasses.replace(i, dest_index=MetadataIndex(str(number))) for i in items]

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Where the numbers go."""
        into = self.parts[int(read_item.dest_index.fqn)].into
        return narrow_tensor_by_index(into, read_item.dest_offsets, read_item.lengths)
