"""What start-up says of memories: their sizes, who holds what of their tables, and why cut so."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.initialization.paper import output_std
from ultramem_megatron.memory.size import memory_size
from ultramem_megatron.memory.tables.layout import TableLayout
from ultramem_megatron.memory.tables.partitions import PARTITIONS, choose, shared_partitions
from ultramem_megatron.memory.tables.settings import TableSettings, exchange_of

_GIGABYTE = 1e9
_SHOWN_RANKS = 8
_MASTER_BYTES = 4  # float32 copy of a half-precision parameter


@dataclass(frozen=True)
class Storage:
    """How a run stores parameters: bytes per element."""

    parameter_bytes: int
    gradient_bytes: int
    optimizer_shards: int
    """Ranks over which optimizer state is spread: the replicas, with the distributed optimizer."""
    memory: str = "device"
    """Where all of it is."""
    moment_bytes: int = 8
    """Adam's two, in float32 or smaller."""
    copies: bool = True
    """Whether a parameter in half precision has a float32 copy."""

    @property
    def optimizer_bytes(self) -> float:
        """Adam's moments, and a float32 copy where parameters are in half precision."""
        copied = self.copies and self.parameter_bytes < _MASTER_BYTES
        master = _MASTER_BYTES if copied else 0
        return (self.moment_bytes + master) / self.optimizer_shards


def describe_memories(ultramem: UltraMemConfig, hidden_size: int) -> str:
    """The memory layers in one line: places, sizes, parameters, FLOPs."""
    size = memory_size(ultramem, hidden_size)
    spans = "/".join(map(str, ultramem.spans))
    return (
        f" > UltraMem: {len(ultramem.spans)} memory layers at spans {spans}, "
        f"{ultramem.num_values} values x {ultramem.value_dim} each; parameters: "
        f"{size.sparse} sparse (value tables), {size.dense} dense; "
        f"{size.flops_per_token} FLOPs per token forward"
    )


def describe_start(ultramem: UltraMemConfig, branches: int, mlp_stds: Sequence[float]) -> str:
    """How large outputs start, in one line.

    branches: residual ones of the model. mlp_stds: of the layers' own MLPs.
    """
    mlp = "/".join(f"{std:.3g}" for std in dict.fromkeys(mlp_stds))
    return (
        f" > UltraMem initialisation {ultramem.init}: an MLP's output starts with a standard "
        f"deviation of {mlp}, to which `matched` sets a memory's; the paper's rule would be "
        f"{output_std(branches):.3g}"
    )


def describe_tables(
    config: UltraMemConfig, settings: TableSettings, storage: Storage, tables_per_rank: int
) -> str:
    """Several lines for the log. tables_per_rank: those on the fullest pipeline stage.

    A table is one of values, with its pre-values.
    """
    if settings.size == 1:
        lines = [" > value tables: whole on every rank"]
    else:
        lines = [
            f" > value tables: cut {settings.partition}-wise over groups of {settings.size} ranks",
            *_parts(config, settings),
            *_traffic(config, settings, storage.parameter_bytes),
        ]
    elements = max(
        sum(_elements(settings.layout(config, rank, width=width)) for width in config.row_widths)
        for rank in range(settings.size)
    )
    gigabytes = [
        tables_per_rank * elements * per_element / _GIGABYTE
        for per_element in (
            storage.parameter_bytes,
            storage.gradient_bytes,
            storage.optimizer_bytes,
        )
    ]
    held = (
        "   per rank ({} tables): {:.3f} GB parameters, {:.3f} GB gradients, {:.3f} GB optimizer "
        "state".format(tables_per_rank, *gigabytes)
    )
    lines.append(held + (", in host memory" if storage.memory == "host" else ""))
    return "\n".join(lines)


def _elements(layout: TableLayout) -> int:
    rows, columns = layout.shape
    return rows * columns


def _parts(config: UltraMemConfig, settings: TableSettings) -> list[str]:
    ranks = range(settings.size)
    shown = list(ranks) if settings.size <= _SHOWN_RANKS else [0, 1, settings.size - 1]
    lines = [f"   rank {rank}: {settings.layout(config, rank).describe()}" for rank in shown]
    if len(shown) < settings.size:
        lines.insert(2, "   ...")
    return lines


def _traffic(config: UltraMemConfig, settings: TableSettings, number_bytes: int) -> list[str]:
    exchange = exchange_of(config, settings.size, number_bytes, settings.node_size)
    volumes = {
        name: PARTITIONS[name].volume(exchange)
        for name in shared_partitions()
        if name == settings.partition or PARTITIONS[name].fits(exchange, config.num_values)
    }
    cheaper = choose(exchange, config.num_values)
    own = volumes[settings.partition]
    verdict = (
        "the cheaper partition" if cheaper == settings.partition else f"{cheaper}-wise is cheaper"
    )
    shown = ", ".join(f"{name}-wise {volume.total:.0f}" for name, volume in volumes.items())
    return [
        f"   bytes received per token and layer: {own.forward:.0f} forward, {own.backward:.0f} "
        f"backward ({shown}: {verdict})"
    ]


def check_agreement(plan: Any) -> None:
    """Raise UltraMemError on every rank unless all ranks were given the same plan; a collective."""
    mine = repr(plan)
    plans: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(plans, mine)
    if len(set(plans)) > 1:
        raise UltraMemError(_disagreement(plans))


def _disagreement(plans: Sequence[str | None]) -> str:
    others = [rank for rank, plan in enumerate(plans) if plan != plans[0]]
    return (
        f"Ranks disagree on the memory layers: rank 0 has {plans[0]}, rank {others[0]} has "
        f"{plans[others[0]]} ({len(others)} ranks differ from rank 0). Give all the same flags, "
        f"and --ultramem-node-size where hosts have unlike numbers of ranks."
    )
