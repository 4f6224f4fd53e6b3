"""How the value tables of a run are cut: group size and partition, given or by the cost model."""

import os
from argparse import Namespace
from dataclasses import dataclass

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.tables.contract import Partition
from ultramem_megatron.memory.tables.layout import TableLayout
from ultramem_megatron.memory.tables.partitions import PARTITIONS, choose
from ultramem_megatron.memory.tables.traffic import Exchange


@dataclass(frozen=True)
class TableSettings:
    """size: P, ranks that share each table. partition: a name of PARTITIONS, how they share it."""

    size: int = 1
    partition: str = "dimension"

    @property
    def kind(self) -> Partition:
        """The partition; a table of one rank is whole."""
        return PARTITIONS["replicated" if self.size == 1 else self.partition]

    def layout(self, config: UltraMemConfig, rank: int = 0) -> TableLayout:
        """The part of one rank."""
        sizes = (config.num_values, config.value_dim, config.cores)
        return self.kind.layout(*sizes, self.size, rank)

    def check(self, config: UltraMemConfig) -> None:
        """Raise UltraMemError for a table that cannot be cut this way, naming what would work."""
        self.kind.check(self.layout(config))


def exchange_of(config: UltraMemConfig, size: int, number_bytes: int) -> Exchange:
    """The cost model's view of a memory layer whose table is shared by `size` ranks."""
    return Exchange(
        size=size, picks=config.picks, value_dim=config.value_dim,
        expansion=config.value_expansion, cores=config.cores, number_bytes=number_bytes,
        ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", "8")),
    )  # fmt: skip


def settings_from_args(args: Namespace, config: UltraMemConfig) -> TableSettings:
    """Group size and partition that the flags ask for, checked.

    Without --ultramem-parallel-size all ranks of a pipeline stage share a table; with experts it is
    the expert-parallel group, the only other geometry Megatron has. Raises UltraMemError.
    """
    stage = args.world_size // args.pipeline_model_parallel_size
    size = args.ultramem_parallel_size
    if size is None:
        size = args.expert_model_parallel_size if args.num_experts else stage
    _check_size(size, stage, args)
    partition = args.ultramem_partition or "auto"
    if partition == "auto":
        number_bytes = args.params_dtype.itemsize
        partition = choose(exchange_of(config, size, number_bytes), config.num_values)
    settings = TableSettings(size, partition)
    settings.check(config)
    return settings


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
    if args.num_experts and args.tensor_model_parallel_size > 1 and (
        args.expert_tensor_parallel_size != 1
    ):  # fmt: skip
        raise UltraMemError(
            f"--expert-tensor-parallel-size {args.expert_tensor_parallel_size}: with memory layers "
            f"it must be 1, because tables are read with each tensor-parallel rank's own tokens."
        )
    if size == 1:
        return
    if args.use_tp_pp_dp_mapping:
        raise UltraMemError(
            f"{given} needs the ranks of a stage to be neighbours; --use-tp-pp-dp-mapping puts "
            f"pipeline stages between them. Drop one of the two flags."
        )
    if args.num_distributed_optimizer_instances > 1:
        raise UltraMemError(
            f"{given} cannot be combined with --num-distributed-optimizer-instances "
            f"{args.num_distributed_optimizer_instances}. Use 1."
        )
