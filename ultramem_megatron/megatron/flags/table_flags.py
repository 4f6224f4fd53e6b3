"""From Megatron's parsed flags to how value tables are cut: as given, or by the cost model."""

import math
from argparse import Namespace

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.placement import placements
from ultramem_megatron.memory.tables.default_size import Step, default_size
from ultramem_megatron.memory.tables.partitions import choose
from ultramem_megatron.memory.tables.settings import TableSettings, exchange_of

_GRADIENT_BYTES = 4  # float32
_ADAM_BYTES = 12  # two moments and the parameter, in float32


def settings_from_args(args: Namespace, config: UltraMemConfig) -> TableSettings:
    """Group size, partition and node size that the flags ask for, checked.

    Without --ultramem-parallel-size it is what `default_size` says; with experts it is the expert-
    parallel group, the only other geometry Megatron has. Raises UltraMemError.
    """
    node_size = args.ultramem_node_size
    if node_size is not None and node_size < 1:
        raise UltraMemError(f"--ultramem-node-size {node_size}: it must be at least 1.")
    stage = args.world_size // args.pipeline_model_parallel_size
    size = args.ultramem_parallel_size
    if size is None and args.num_experts:
        size = args.expert_model_parallel_size
    elif size is None:
        exchange = exchange_of(config, stage, args.params_dtype.itemsize, node_size)
        size = default_size(exchange, config.num_values, _step(args, config, stage))
    _check_size(size, stage, args)
    partition = args.ultramem_partition or "auto"
    if partition == "auto":
        exchange = exchange_of(config, size, args.params_dtype.itemsize, node_size)
        partition = choose(exchange, config.num_values)
    settings = TableSettings(size, partition, node_size)
    settings.check(config)
    return settings


def _step(args: Namespace, config: UltraMemConfig, stage: int) -> Step:
    """Of the fullest pipeline stage, as if memories were spread evenly; with fp32 Adam."""
    stages, places = args.pipeline_model_parallel_size, placements(config)
    tables = math.ceil(len({place.table for place in places}) / stages)
    tokens = args.global_batch_size * args.seq_length / stage
    parameter = args.params_dtype.itemsize
    return Step(
        ranks=stage,
        reads=tokens * math.ceil(len(places) / stages),
        elements=tables * config.num_values * sum(config.row_widths),
        moved_bytes=parameter + _GRADIENT_BYTES,
        held_bytes=parameter + _GRADIENT_BYTES + _ADAM_BYTES,
    )


def _check_size(size: int, stage: int, args: Namespace) -> None:
    given = f"--ultramem-parallel-size {size}"
    if size < 1 or stage % size:
        allowed = ", ".join(str(p) for p in range(1, stage + 1) if stage % p == 0)
        raise UltraMemError(
            f"{given}: it must divide the {stage} ranks of a pipeline stage (tensor x context x "
            f"data parallel). Use one of {allowed}."
        )
    if args.num_experts and size != args.expert_model_parallel_size:
        raise UltraMemError(
            f"{given}: with experts, value tables share Megatron's expert-parallel groups, so it "
            f"must equal --expert-model-parallel-size {args.expert_model_parallel_size}."
        )
    if (
        args.num_experts
        and args.tensor_model_parallel_size > 1
        and (args.expert_tensor_parallel_size != 1)
    ):
        raise UltraMemError(
            f"--expert-tensor-parallel-size {args.expert_tensor_parallel_size} (by default "
            f"--tensor-model-parallel-size): with memory layers it must be 1, because tables are "
            f"read with each tensor-parallel rank's own tokens. Add --expert-tensor-parallel-size "
            f"1."
        )
    if size == 1:
        return
    if args.use_tp_pp_dp_mapping:
        raise UltraMemError(
            f"--use-tp-pp-dp-mapping puts pipeline stages between the {size} ranks that share a "
            f"value table{_by_default(args)}. Add --ultramem-parallel-size 1, or drop the flag."
        )
    if args.num_distributed_optimizer_instances > 1:
        raise UltraMemError(
            f"--num-distributed-optimizer-instances {args.num_distributed_optimizer_instances} "
            f"leaves no group for value tables shared by {size} ranks{_by_default(args)}. Add "
            f"--ultramem-parallel-size 1, or drop the flag."
        )


def _by_default(args: Namespace) -> str:
    return " (the default)" if args.ultramem_parallel_size is None else ""
