"""Memory layers added to a trained dense model: its weights, and memories that do nothing at first.

It is a GPT or a HybridModel; a HybridModel with memories may start from a GPT of the same layers.
The dense checkpoint is read by Megatron's own distributed loading, so it may come from any parallel
layout. A memory starts with a zero value projection (without one, with zero values): step 0 gives
the dense model's loss. Its first gradient reaches the projection, the next one the values, too.
"""

import contextlib
from argparse import Namespace
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.checkpoint.design import differing_flags
from ultramem_megatron.megatron.checkpoint.folder import (
    checkpoint_folder,
    is_fsdp_dtensor,
    stored_args,
)
from ultramem_megatron.megatron.checkpoint.gpt_layers import (
    fresh_layers,
    has_key_for_each_layer,
    is_hybrid,
    point_at_gpt,
    read_as_gpt,
)
from ultramem_megatron.megatron.checkpoint.source import holds_checkpoint
from ultramem_megatron.megatron.checkpoint.weights import load_weights
from ultramem_megatron.megatron.flags.arguments import config_from_args
from ultramem_megatron.memory.config import flag
from ultramem_megatron.memory.finite import naming_where
from ultramem_megatron.memory.layer import UltraMemLayer, memory_layers

UPCYCLE_FLAG = "--ultramem-upcycle"
_EXTRA = "._extra_state"  # torch's name for what get_extra_state() gives


def dense_checkpoint(args: Namespace) -> str | None:
    """Folder of the dense checkpoint to start from; None without the flag, or when resuming.

    A run whose --load already holds a checkpoint resumes from that one. Raises UltraMemError for
    a folder without a checkpoint, one with memory layers, or one of another size.
    """
    if args.ultramem_upcycle is None or holds_checkpoint(args):
        return None
    if getattr(args, "pretrained_checkpoint", None) is not None:
        raise UltraMemError(
            f"{UPCYCLE_FLAG} and --pretrained-checkpoint both name weights to start from. Drop one."
        )
    folder = checkpoint_folder(args.ultramem_upcycle, flag=UPCYCLE_FLAG)
    _refuse_misfit(args, folder)
    return folder


def _refuse_misfit(args: Namespace, folder: str) -> None:
    design = config_from_args(args)
    if design is not None and design.replace_mlp:
        raise UltraMemError(
            f"{UPCYCLE_FLAG} cannot be combined with {flag('replace_mlp')}: a dense model without "
            f"its MLPs is another model from the first step on. Drop one of the two."
        )
    dense = stored_args(folder)
    if is_fsdp_dtensor(Path(folder)) and is_hybrid(args):
        raise UltraMemError(
            f"{UPCYCLE_FLAG} {args.ultramem_upcycle}: a HybridModel does not start from a "
            f"checkpoint in fsdp_dtensor. Give one in torch_dist."
        )
    if config_from_args(dense) is not None:
        raise UltraMemError(
            f"{UPCYCLE_FLAG} {args.ultramem_upcycle}: this checkpoint has memory layers already. "
            f"Continue it with --load, or give one of a dense model."
        )
    differences = differing_flags(read_as_gpt(args, dense), dense)
    if differences:
        raise UltraMemError(
            f"{UPCYCLE_FLAG} {args.ultramem_upcycle}: the dense model is another one: "
            f"{'; '.join(differences)}. Give this run the flags the checkpoint was made with."
        )


def start_from_dense(chunks: list[nn.Module], folder: str) -> None:
    """Load the dense weights of `folder` into all chunks of this rank and silence their memories.

    chunks: as the builder made them, not yet wrapped. Collective: every rank must call it. Raises
    UltraMemError if a weight is missing in the checkpoint.
    """
    silence(layer for chunk in chunks for layer in memory_layers(chunk))
    of_gpt = not is_hybrid(stored_args(folder))
    if of_gpt:
        _say_what_starts_anew(chunks, folder)
    for chunk in chunks:
        _load_dense_weights(chunk, folder, of_gpt)


def _say_what_starts_anew(chunks: list[nn.Module], folder: str) -> None:
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.training import print_rank_0

    first = chunks[0]
    if not isinstance(first, HybridModel):
        return
    fresh = fresh_layers(first.hybrid_layer_pattern)
    if fresh:
        print_rank_0(
            f"{UPCYCLE_FLAG} {folder}: layers {', '.join(map(str, fresh))} of "
            f"{first.hybrid_layer_pattern} (Mamba) have no counterpart in a GPT and start anew"
        )


@torch.no_grad()
def silence(layers: Iterable[UltraMemLayer]) -> None:
    """Make the output of each memory zero, in the last step that has parameters."""
    for layer in layers:
        last = layer.value_proj if layer.config.value_projection else layer.values
        assert isinstance(last.weight, Tensor)
        last.weight.zero_()


def _load_dense_weights(chunk: nn.Module, folder: str, of_gpt: bool) -> None:
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    if is_fsdp_dtensor(Path(folder)):
        return _load_from_fsdp(chunk, folder)
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    with _without_memories(chunk), _layer_keys(chunk, has_key_for_each_layer(stored)):
        state = chunk.sharded_state_dict(metadata=groups)  # type: ignore[operator]  # Megatron's, untyped
        if of_gpt and isinstance(chunk, HybridModel):
            point_at_gpt(state, chunk.hybrid_layer_pattern, stored)
        wanted = {
            t.key for t in nested_values(state) if isinstance(t, dist_checkpointing.ShardedTensor)
        }
        missing = sorted(wanted - stored.keys())
        if missing:
            raise UltraMemError(
                f"{UPCYCLE_FLAG} {folder}: the checkpoint lacks weights of this model: "
                f"{', '.join(missing)}. Give this run the flags the checkpoint was made with."
            )
        absent = {name: _own_state(chunk, name) for name in _absent_states(state, stored.keys())}
        for name in absent:
            del state[name]
        names = list(state)
        # Brings the state of its training, too.
        loaded = dist_checkpointing.load(state, folder, verify_integrity=True)
        with naming_where(f"{UPCYCLE_FLAG} {folder}"):
            chunk.load_state_dict({**{name: loaded[name] for name in names}, **absent})


def _load_from_fsdp(chunk: nn.Module, folder: str) -> None:
    from megatron.core import parallel_state

    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    with _without_memories(chunk), _layer_keys(chunk, True):
        config: Any = chunk.config
        state = chunk.sharded_state_dict(metadata=groups)  # type: ignore[operator]  # Megatron's, untyped
        weights = load_weights(state, folder, config.num_moe_experts)
        with naming_where(f"{UPCYCLE_FLAG} {folder}"):
            chunk.load_state_dict(weights)


def _absent_states(state: dict[str, Any], stored: Collection[str]) -> list[str]:
    """Names of what Transformer Engine's modules keep beside weights, and the checkpoint has not.

    A norm that stands before a memory has such a state of its own, which is empty; fused into the
    dense layer's product, as in the checkpoint, it has none.
    """
    return [
        name
        for name, value in state.items()
        if name.endswith(_EXTRA) and getattr(value, "unique_key", None) not in stored
    ]


def _own_state(chunk: nn.Module, name: str) -> Any:
    return chunk.get_submodule(name.removesuffix(_EXTRA)).get_extra_state()


@contextlib.contextmanager
def _without_memories(chunk: nn.Module) -> Iterator[None]:
    """Hide the memory submodules, as if the model were dense."""
    hidden: list[tuple[dict[str, Any], nn.Module]] = []
    for module in list(chunk.modules()):
        memory = module._modules.get("memory")
        if isinstance(memory, UltraMemLayer):
            hidden.append((module._modules, memory))
            del module._modules["memory"]
    try:
        yield
    finally:
        for modules, memory in hidden:
            modules["memory"] = memory


@contextlib.contextmanager
def _layer_keys(chunk: nn.Module, per_layer: bool) -> Iterator[None]:
    """Name layers as the dense checkpoint does: each its key, or one stack for all."""
    config: Any = chunk.config
    before = config.hetereogenous_dist_checkpoint
    config.hetereogenous_dist_checkpoint = per_layer
    try:
        yield
    finally:
        config.hetereogenous_dist_checkpoint = before
