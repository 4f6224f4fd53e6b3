"""Memory and traffic of one rank of a pipeline stage, from one micro-batch run without storage.

The model's own forward and backward run on the meta device: what autograd keeps is added up, and so
is what collectives of the fake process groups would bring in. Only what such a run cannot show is
worked out: reduction of gradients, transfers between stages, optimizer state.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ultramem_megatron.kernels.adam_rows.compact import moment_bytes
from ultramem_megatron.megatron.flags.refused_by_megatron import megatron_refuses
from ultramem_megatron.megatron.layer.memory_submodule import TransformerMemory
from ultramem_megatron.megatron.pipeline.layout import pipeline_chunks, spans_cross_stages
from ultramem_megatron.memory.layer import memory_layers
from ultramem_megatron.memory.tables.settings import exchange_of
from ultramem_megatron.memory.tables.value_table import is_value_table, value_tables
from ultramem_megatron.tools.plan.build import Run, built_stage
from ultramem_megatron.tools.plan.shapes_only import shapes_only


@dataclass(frozen=True)
class StageCost:
    """Bytes, of one rank of a pipeline stage."""

    stage: int
    layers: str
    parameters: int
    gradients: int
    optimizer: int
    """Adam's two moments, and the full-precision copy of half-precision parameters."""
    activations: int
    """Kept for the backward, of all micro-batches in flight; scores of attention are not kept."""
    received: dict[str, int] = field(default_factory=dict)
    """From other ranks in one step, by cause."""
    host: int = 0
    """In host memory, with --ultramem-table-memory host: tables, gradients, optimizer state."""

    @property
    def memory(self) -> int:
        """All of it that must fit."""
        return self.parameters + self.gradients + self.optimizer + self.activations


def stage_cost(run: Run, stage: int) -> StageCost:
    """Cost of a stage of a run that was parsed with its number of ranks.

    Raises UltraMemError for flags that fail in the first step.
    """
    with built_stage(run, stage) as chunks:
        everything = [p for chunk in chunks for p in chunk.parameters()]
        on_host = [p for p in everything if run.tables_on_host and is_value_table(p)]
        parameters = [p for p in everything if not any(p is table for table in on_host)]
        trained = [p for p in parameters if p.requires_grad]
        with megatron_refuses():
            kept, received = micro_batch(run, chunks)
        if on_host:
            kept += sum(_brought(run, chunk) for chunk in chunks)
        micro_batches = _micro_batches(run)
        step = {cause: count * micro_batches for cause, count in received.items()}
        for cause, count in (
            ("gradients and parameters", _reduction(run, trained)),
            ("pipeline", micro_batches * _transfers(run, stage, len(chunks))),
        ):
            step[cause] = step.get(cause, 0) + count
        return StageCost(
            stage=stage,
            layers=_layers(run, stage),
            parameters=sum(p.numel() * p.element_size() for p in parameters),
            gradients=sum(p.numel() for p in trained) * gradient_bytes(run),
            optimizer=sum(
                math.ceil(p.numel() / _shards(run, p)) * optimizer_bytes(run, is_value_table(p))
                for p in trained
            ),
            activations=round(kept / len(chunks) * _chunks_in_flight(run, stage, len(chunks))),
            received={cause: count for cause, count in step.items() if count},
            host=sum(p.numel() * _host_bytes(run, p) for p in on_host),
        )


def _host_bytes(run: Run, table: Tensor) -> int:
    """Of one number of a table in host memory: it, gradient and copy in float32, moments."""
    assert run.ultramem is not None
    number = table.element_size()
    copy = 4 if number < 4 and run.ultramem.table_main_params == "float32" else 0
    return number + 4 + copy + moment_bytes(run.ultramem.table_moments)


def _brought(run: Run, chunk: Any) -> int:
    """Bytes of the rows that a micro-batch's reads bring from host memory: as if none repeated."""
    args = run.args
    tokens = _own_length(run) * args.micro_batch_size // args.tensor_model_parallel_size
    total = 0
    for memory in memory_layers(chunk):
        for table in value_tables(memory).values():
            picks = tokens * memory.config.picks * table.layout.column_parts
            total += min(len(table.weight), picks) * table.weight[:1].nbytes
    return total


def _layers(run: Run, stage: int) -> str:
    chunks = [chunk for chunk in pipeline_chunks(run.transformer) if chunk.pp_rank == stage]
    return ", ".join(f"{c.first}-{c.last}" if c.last >= c.first else "none" for c in chunks)


def _micro_batches(run: Run) -> int:
    args = run.args
    return int(args.global_batch_size // (args.micro_batch_size * args.data_parallel_size))


def _chunks_in_flight(run: Run, stage: int, chunks: int) -> int:
    """Forward passes of a chunk done before the first backward, plus one (Megatron's schedules)."""
    later = run.stages - stage - 1
    if chunks == 1:
        return min(later + 1, _micro_batches(run))
    return min(2 * later + (chunks - 1) * run.stages + 1, _micro_batches(run) * chunks)


def gradient_bytes(run: Run) -> int:
    """Of one parameter's gradient."""
    in_fp32 = run.args.accumulate_allreduce_grads_in_fp32
    return 4 if in_fp32 else int(run.transformer.params_dtype.itemsize)


def optimizer_bytes(run: Run, of_table: bool = False) -> int:
    """Of one parameter's moments and full-precision copy; of_table: of one number of a table."""
    args = run.args
    moments = args.exp_avg_dtype.itemsize + args.exp_avg_sq_dtype.itemsize
    if of_table and run.ultramem is not None and run.ultramem.table_moments != "float32":
        moments = moment_bytes(run.ultramem.table_moments)
    half = run.transformer.params_dtype.itemsize < 4
    if of_table and run.ultramem is not None and run.ultramem.table_main_params == "none":
        half = False
    return int(moments + (args.main_params_dtype.itemsize if half else 0))


def _replicas(parameter: Tensor) -> int:
    """Ranks that hold the same parameter and reduce its gradient together."""
    if getattr(parameter, "allreduce", True):
        return int(parallel_state.get_data_parallel_world_size(with_context_parallel=True))
    return int(parallel_state.get_expert_data_parallel_world_size())


def _shards(run: Run, parameter: Tensor) -> int:
    return _replicas(parameter) if run.args.use_distributed_optimizer else 1


def _reduction(run: Run, parameters: list[Any]) -> int:
    """Bytes received for gradients (and parameters, with the distributed optimizer), by rings."""
    gradient = gradient_bytes(run)
    total = 0.0
    for parameter in parameters:
        replicas = _replicas(parameter)
        back = parameter.element_size() if run.args.use_distributed_optimizer else gradient
        total += parameter.numel() * (gradient + back) * (replicas - 1) / replicas
    return round(total)


def _hidden_shape(run: Run) -> tuple[int, int, int]:
    """(sequence, batch, width) between stages; twice the width where spans cross stages."""
    args, spans = run.args, run.ultramem.spans if run.ultramem else ()
    shares = args.tensor_model_parallel_size if args.sequence_parallel else 1
    width = 2 if spans_cross_stages(spans, run.transformer) else 1
    return _own_length(run) // shares, args.micro_batch_size, width * args.hidden_size


def _own_length(run: Run) -> int:
    """Tokens of a sequence on one rank of a context-parallel group."""
    return int(run.args.seq_length // run.args.context_parallel_size)


def _transfers(run: Run, stage: int, chunks: int) -> int:
    """Bytes received from neighbouring stages for one micro-batch."""
    size = math.prod(_hidden_shape(run)) * run.transformer.params_dtype.itemsize
    if run.stages == 1:
        return 0
    boundaries = 2 * chunks - (stage == 0) - (stage == run.stages - 1)
    return int(boundaries * size)


def micro_batch(run: Run, chunks: list[Any]) -> tuple[int, dict[str, int]]:
    """Bytes kept for the backward, and bytes received, in one micro-batch through all chunks."""
    kept, received, attended = 0, _Received(run), shapes_only(chunks)
    with received:
        for chunk in chunks:
            output, bytes_kept = _forward(run, chunk)
            output.backward(torch.empty_like(output))
            kept += bytes_kept
    _add_sizes_unknown(run, chunks, received.bytes)
    others = run.args.context_parallel_size - 1
    # Forward: keys and values of the others; backward: both again, and what they add to the
    # gradients of the rank's own, or as much in the ring of Transformer Engine.
    exchanged = received.bytes.get("context parallel", 0) + 3 * others * sum(attended)
    received.bytes["context parallel"] = exchanged
    return kept, received.bytes


def _forward(run: Run, chunk: Any) -> tuple[Tensor, int]:
    """Output, and bytes of the tensors that autograd keeps besides the parameters."""
    args = run.args
    tokens = torch.empty(args.micro_batch_size, _own_length(run), dtype=torch.long, device="meta")
    if not chunk.pre_process:
        hidden = torch.empty(_hidden_shape(run), dtype=run.transformer.params_dtype, device="meta")
        chunk.set_input_tensor(hidden.requires_grad_())
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor  # the reference keeps the key unique
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = chunk(tokens, tokens, None, labels=tokens if chunk.post_process else None)
    own = {p.untyped_storage()._cdata for p in chunk.parameters()}
    return output, sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in own)


class _Received(TorchDispatchMode):
    """Adds up what the collectives that run under it bring to this rank from others."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}
        shared = "experts" if run.ultramem is None else "value tables"
        self.causes = {
            parallel_state.get_expert_model_parallel_group().group_name: shared,
            parallel_state.get_tensor_model_parallel_group().group_name: "tensor parallel",
            parallel_state.get_context_parallel_group().group_name: "context parallel",
        }

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Count c10d's operators and run everything."""
        if function.namespace == "c10d":
            boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
            group = dist.ProcessGroup.unbox(boxed)
            count = round(_incoming(function.__name__, args, group.size()))
            cause = self.causes.get(group.group_name, "other")
            self.bytes[cause] = self.bytes.get(cause, 0) + count
        return function(*args, **(kwargs or {}))


def _incoming(operator: str, args: Any, ranks: int) -> float:
    """Bytes from other ranks, for ring algorithms. args[0]: output or, in place, the tensor(s)."""
    tensors = args[1] if operator.startswith("_reduce_scatter") else args[0]
    size = _nbytes(tensors)
    away = (ranks - 1) / ranks
    return 2 * size * away if operator.startswith("allreduce") else size * away


def _nbytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_nbytes, tensors))


def _add_sizes_unknown(run: Run, chunks: list[Any], received: dict[str, int]) -> None:
    """Bytes of exchanges whose sizes depend on numbers: by the cost model, for uniform use."""
    if run.ultramem is None or not run.tables.kind.waits_for_host:
        return
    memories = sum(isinstance(m, TransformerMemory) for chunk in chunks for m in chunk.modules())
    tokens = _own_length(run) * run.args.micro_batch_size // run.args.tensor_model_parallel_size
    itemsize = run.transformer.params_dtype.itemsize
    volume = run.tables.kind.volume(
        exchange_of(run.ultramem, run.tables.size, itemsize, run.tables.node_size)
    )
    count = received.get("value tables", 0) + round(memories * tokens * volume.total)
    received["value tables"] = count
