"""An UltraMemLayer built as Megatron builds submodules: its dtype, device, groups and checkpoints.

S sequence, B batch, D hidden; under sequence and context parallelism S is this rank's share.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor
from torch.distributed.tensor import DTensor

from ultramem_megatron.communication.branch import Branch, stream_beside
from ultramem_megatron.communication.pausing import Pausing, run
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.checkpoint.shared_tables import (
    StoredPlace,
    shared_key,
    stored_place,
)
from ultramem_megatron.megatron.fsdp2 import even_dim, stored_shard
from ultramem_megatron.megatron.layer.document_reach import masked_reach, packed_reach
from ultramem_megatron.megatron.layer.feed_forward import feed_forward_std, residual_branches
from ultramem_megatron.megatron.layer.query_history import (
    keep_inputs,
    kept_inputs,
    neighbours_history,
    paged_history,
)
from ultramem_megatron.megatron.optimizer.scalar_parameters import keep_base_rate
from ultramem_megatron.megatron.table_groups import TableGroups, table_groups
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.layer import UltraMemLayer
from ultramem_megatron.memory.placement import Placement
from ultramem_megatron.memory.tables.value_table import ValueTable, is_value_table, value_tables
from ultramem_megatron.memory.values import VALUES
from ultramem_megatron.memory.values.contract import Site
from ultramem_megatron.patches.doors import gradient_streams
from ultramem_megatron.patches.doors.fsdp2_units import SHARD_DIM


class Surroundings(NamedTuple):
    """What a transformer layer is told beside its input, all of it None in plain training.

    mask: (B or 1, 1, queries, S of the whole sequence), True where attention is forbidden.
    """

    inference_context: Any = None
    packed: Any = None
    mask: Tensor | None = None


_NOTHING = Surroundings()


class TransformerMemory(UltraMemLayer):
    """The memory submodule of a transformer layer."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        ultramem: UltraMemConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        placement: Placement,
        values_by_table: dict[int, torch.nn.Module],
        partition: str = "dimension",
        node_size: int | None = None,
    ) -> None:
        """config: sizes, norm epsilon, parameter dtype and device are taken from it.

        placement: of this memory. values_by_table: of the memories built before on this stage, in
        which one that reads another's values finds them. partition, node_size: how tables are cut
        over the expert-parallel group, as in TableSettings, if that has several ranks. Raises
        UltraMemError.
        """
        groups = table_groups(pg_collection)
        with _parameter_dtype(config.params_dtype), _parameter_device(config):
            owns_tables = placement.table == placement.reads
            if not owns_tables and groups is None:
                raise UltraMemError(
                    "Memories that share values (--ultramem-share-values) need table groups: "
                    "initialise Megatron with expert_tensor_parallel_size=1."
                )
            if not owns_tables and placement.table not in values_by_table:
                raise UltraMemError(
                    f"The memory of layer {placement.reads} reads the values of layer "
                    f"{placement.table}, which is on another pipeline stage. Choose a pipeline "
                    f"layout that keeps the two together."
                )
            shared = values_by_table.get(placement.table)
            values = VALUES[ultramem.values].build(
                ultramem, _site(config.hidden_size, groups, partition, node_size, shared)
            )
            values_by_table.setdefault(placement.table, values)
            super().__init__(
                ultramem,
                hidden_size=config.hidden_size,
                num_layers=config.num_layers,
                layer_number=layer_number,
                eps=config.layernorm_epsilon,
                residual_branches=residual_branches(config),
                feed_forward_std=feed_forward_std(config, placement.adds),
                values=values,
                table_number=placement.table,
                first_value=placement.first_value,
            )
        self.groups = groups
        self.owns_tables = owns_tables
        if not owns_tables:
            self.register_load_state_dict_pre_hook(_tables_come_with_their_owner)
        self.tensor_group = pg_collection.tp
        self.context_group = pg_collection.cp
        # Under sequence parallelism tensor-parallel ranks, too, see other tokens.
        sequence_parallel = config.sequence_parallel
        self.token_group = pg_collection.tp_dp_cp if sequence_parallel else pg_collection.dp_cp
        self.sequence_parallel = config.sequence_parallel
        shares_tokens = not self.sequence_parallel and self.tensor_group.size() > 1
        if groups is not None and shares_tokens and owns_tables:
            for table in value_tables(self).values():
                table.share_tokens(self.tensor_group)
        self._tag_parameters(pg_collection.dp_cp.size())

    def _tag_parameters(self, data_ranks: int) -> None:
        """Tell Megatron how each parameter is to be reduced, its rate scaled, and it cut."""
        keep_base_rate(self)
        for parameter in self.parameters():
            setattr(parameter, SHARD_DIM, even_dim(parameter.shape, data_ranks))
            # Seen by each tensor-parallel rank with other tokens: summed over them.
            parameter.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]  # Megatron's tag
        if self.groups is None:
            return
        for table in value_tables(self).values():
            weight = table.trained
            weight.sequence_parallel = False  # type: ignore[attr-defined]  # Megatron's tag
            # An "expert" parameter: reduced over the ranks that hold the same part.
            weight.allreduce = False  # type: ignore[attr-defined]  # Megatron's tag

    def forward(self, x: Tensor, surroundings: Surroundings = _NOTHING) -> Tensor:  # type: ignore[override]  # for history, reach
        """x: (S, B, D), the output of the pre-MLP norm; returns the same shape and dtype."""
        return run(self.steps(x, surroundings))

    def steps(self, x: Tensor, surroundings: Surroundings = _NOTHING) -> Pausing:  # type: ignore[override]  # for history, reach
        """As forward, pausing whenever other ranks have to answer."""
        if self.config.query_conv_kernel < 2:
            return (yield from super().steps(x))
        context = surroundings.inference_context
        if context is not None and context.is_static_batching():
            return (yield from self._static_steps(x, context))
        history = self._history(x, context)
        return (yield from super().steps(x, history, self._reach(x, surroundings)))

    def _static_steps(self, x: Tensor, context: Any) -> Pausing:
        """With static batching; a single token's inputs are written where those before were.

        So a CUDA graph of one step serves the next.
        """
        kept = kept_inputs(self.layer_number, context)
        if kept is not None and len(x) == 1:
            return (yield from super().steps(x, kept, advances=True))
        keep_inputs(x, kept, self.config.query_conv_kernel, self.layer_number, context)
        return (yield from super().steps(x, None if kept is None else kept.unsqueeze(0)))

    def end_batch(self, reduce: Callable[[Tensor], object] | None = None) -> None:
        """As UltraMemLayer.end_batch; by default over all ranks that see other tokens."""
        super().end_batch(reduce or partial(dist.all_reduce, group=self.token_group))

    def branch(self, x: Tensor, surroundings: Surroundings, *, layers: int) -> Branch:
        """Start `steps` beside so many layers, each with two boundaries."""
        self._await_parameters()
        return Branch(self.steps(x, surroundings), x, pauses=self.pauses, boundaries=2 * layers)

    def add_gradients_beside(self) -> None:
        """Have its gradients added on the branch's stream, so that no layer waits for them.

        Not of shared values: a memory that joins at once adds to them on the layers' stream.
        """
        shared = self.config.share_values > 1
        for parameter in self.parameters():
            stream = stream_beside(parameter.device)
            if stream is not None and not (shared and is_value_table(parameter)):
                gradient_streams.streams[parameter] = stream

    def _await_parameters(self) -> None:
        """Let Megatron's overlapped gather bring all of the memory's parameters here, now.

        Its hook makes only that stream wait which calls a module first; the branch and the layers
        may both have parameters in what is gathered at once.
        """
        for module in self.modules():
            for hook in module._forward_pre_hooks.values():
                if getattr(hook, "__module__", "").startswith("megatron."):
                    hook(module, ())

    def _reach(self, x: Tensor, surroundings: Surroundings) -> Tensor | None:
        """How far back the query convolution sees, where a sequence holds several documents."""
        if surroundings.inference_context is not None:
            return None
        taps = self.config.query_conv_kernel
        shares = self.tensor_group if self.sequence_parallel else None
        if surroundings.packed is not None:
            return packed_reach(len(x), taps, shares, self.context_group, surroundings.packed)
        if surroundings.mask is not None:
            return masked_reach(x, taps, shares, self.context_group, surroundings.mask)
        return None

    def _history(self, x: Tensor, inference_context: Any) -> Tensor | None:
        """What the query convolution sees before x."""
        taps = self.config.query_conv_kernel
        if inference_context is not None:
            return paged_history(x, taps, self.layer_number, inference_context)
        shares = self.tensor_group if self.sequence_parallel else None
        if self.context_group.size() > 1 or (shares is not None and shares.size() > 1):
            return neighbours_history(x, taps, shares, self.context_group)
        return None

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """For distributed checkpoints: the table by its part, all else whole or by its shard."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        own = self.state_dict(keep_vars=True)
        shards = {name: own.pop(name) for name in list(own) if isinstance(own[name], DTensor)}
        state: ShardedStateDict = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            {},
            sharded_offsets,
            tp_group=self.tensor_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name, parameter in shards.items():
            state[prefix + name] = stored_shard(prefix + name, parameter, self.tensor_group.rank())
        if self.groups is not None:
            assert not sharded_offsets, "layers with memory are not homogeneous"
            place = stored_place(self.config, self.table_number)
            for name, table in value_tables(self).items():
                key = f"{prefix}{name}.weight"
                stored = key if place is None else shared_key(name)
                if self.owns_tables:
                    state[key] = _sharded_table(table, stored, self.groups, place)
                else:  # named by its owner; twice, it would be written twice
                    del state[key]
        return state


def _tables_come_with_their_owner(
    memory: torch.nn.Module, state: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Tables that another memory loads are not missed here; a hook before loading."""
    for name, table in value_tables(memory).items():
        state.setdefault(f"{prefix}{name}.weight", table.weight.detach())


def _sharded_table(
    table: ValueTable, key: str, groups: TableGroups, place: StoredPlace | None
) -> ShardedTensor:
    """place: in the checkpoint's table of all memories, None: it is one of its own."""
    layout, weight = table.layout, table.weight
    first, rows = (0, layout.num_values) if place is None else place
    return ShardedTensor(
        key,
        weight,
        weight.dtype,
        tuple(weight.shape),
        (rows, layout.value_dim),
        (first + layout.rows().start, layout.columns().start),
        None,  # parts may differ in size by a row: no regular grid
        replica_id=(0, 0, groups.replicas.rank()),
    )


def _site(
    hidden_size: int, groups: TableGroups | None, partition: str, node_size: int | None, shared: Any
) -> Site:
    if groups is None:
        return Site(hidden_size, shared=shared)
    return Site(hidden_size, (partition, groups.table, node_size), shared)


def _parameter_device(config: TransformerConfig) -> torch.device:
    if config.init_model_with_meta_device:
        return torch.device("meta")
    if config.use_cpu_initialization:
        return torch.device("cpu")
    return torch.device(torch.cuda.current_device())


@contextlib.contextmanager
def _parameter_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within it torch creates floating parameters in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
