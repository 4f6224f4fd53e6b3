"""Does an optimizer's state fit ranks that are laid out otherwise? Asked before anything is built.

The distributed optimizer's default (dp_reshardable) keeps each rank's flat piece. Pieces of a table
cut by rows and by columns have the same length and other numbers: they would load, in silence, as
wrong moments. How a table was cut is read off its own pieces, which every checkpoint has.

Muon's default orthogonalises what each tensor-parallel rank has of a matrix by itself: with another
number of them a step is another step.

Experts over ranks stand in an optimizer of their own, experts on one rank with everything else; the
lists of groups of the two do not fit.

Fine-tuning by rows has a state of value tables alone.

Megatron finds the groups of an optimizer's state by their rates, and has one form of state with the
distributed optimizer, another without.
"""

import re
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.checkpoint.folder import NoFlagsError, is_torch_dist, stored_layout
from ultramem_megatron.megatron.checkpoint.source import Source
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.tables.settings import TableSettings

_TABLE = re.compile(r"decoder\..*\bmemory\.values(\.table)?\.weight|decoder\.ultramem\.values")
"""Keys of tables in a checkpoint: of one memory, and of several that share."""
_MODEL_PARALLEL = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
)
_RATES = ("lr", "min_lr")
_WEIGHTS_ALONE = "or go on once with --no-load-optim (weights alone)"


def check_optimizer_layout(
    source: Source, args: Namespace, ultramem: UltraMemConfig, tables: TableSettings
) -> None:
    """Raise UltraMemError if the optimizer's state cannot follow to this run's ranks."""
    unused = args.no_load_optim or args.finetune or source.flag != "--load"
    folder = source.iteration()
    if unused or not is_torch_dist(folder):
        return
    try:
        stored = stored_layout(str(folder))
    except NoFlagsError:
        stored = Namespace()
    _check_muon(source, args, stored)
    _check_experts(source, args, stored)
    _check_train_rows(source, args, stored)
    _check_rates(source, args, stored)
    kind = _kind(str(folder))
    _check_distributed(source, args, kind)
    if not args.use_distributed_optimizer or kind != "dp_reshardable":
        return
    rows, columns = _saved_parts(str(folder), ultramem.num_values)
    mine = tables.kind.parts(tables.size, tables.node)
    if (rows, columns) != mine:
        raise UltraMemError(
            f"{source}: its tables were {_cut(rows, columns)}, here they are {_cut(*mine)}, and "
            f"the state of its distributed optimizer cannot follow. Cut them as before "
            f"({_flags(rows, columns)}), {_WEIGHTS_ALONE}; saved with "
            f"--dist-ckpt-optim-fully-reshardable it loads into any."
        )
    changed = _changed(args, stored, _MODEL_PARALLEL)
    if changed:
        raise UltraMemError(
            f"{source}: {changed}, and the state of its distributed optimizer cannot "
            f"follow. Go on with the same layout, {_WEIGHTS_ALONE}; saved with "
            f"--dist-ckpt-optim-fully-reshardable it loads into any."
        )


def _changed(args: Namespace, stored: Namespace, names: Sequence[str]) -> str:
    """Of flags by these names, those that a run was saved with otherwise, in words; or nothing."""
    return "; ".join(
        f"--{name.replace('_', '-')} was {getattr(stored, name)}, here it is {getattr(args, name)}"
        for name in names
        if hasattr(stored, name) and getattr(stored, name) != getattr(args, name)
    )


def _check_muon(source: Source, args: Namespace, stored: Namespace) -> None:
    saved = getattr(stored, "tensor_model_parallel_size", args.tensor_model_parallel_size)
    muon = "muon" in args.optimizer
    blocks = "blockwise" in (args.muon_tp_mode, getattr(stored, "muon_tp_mode", None))
    if muon and blocks and saved != args.tensor_model_parallel_size:
        raise UltraMemError(
            f"{source}: --tensor-model-parallel-size was {saved}, here it is "
            f"{args.tensor_model_parallel_size}, and with --muon-tp-mode blockwise --optimizer "
            f"{args.optimizer} takes other steps then. Go on with the same size, {_WEIGHTS_ALONE}; "
            f"a run with --muon-tp-mode duplicated from its start goes on with any."
        )


def _check_experts(source: Source, args: Namespace, stored: Namespace) -> None:
    saved = getattr(stored, "expert_model_parallel_size", args.expert_model_parallel_size)
    if args.num_experts and (saved == 1) != (args.expert_model_parallel_size == 1):
        raise UltraMemError(
            f"{source}: --expert-model-parallel-size was {saved}, here it is "
            f"{args.expert_model_parallel_size}, and the optimizer's state of experts on one rank "
            f"and of experts over several cannot follow each other. Go on with the same size, "
            f"{_WEIGHTS_ALONE}."
        )


def _check_train_rows(source: Source, args: Namespace, stored: Namespace) -> None:
    saved = getattr(stored, "ultramem_train_rows", None)
    if (saved is None) != (args.ultramem_train_rows is None):
        had = "did not have" if saved is None else "had"
        raise UltraMemError(
            f"{source}: the run that saved it {had} --ultramem-train-rows, whose optimizer has a "
            f"state of value tables alone, which does not fit another's. Add --finetune to start "
            f"from its weights, {_WEIGHTS_ALONE}."
        )


def _check_rates(source: Source, args: Namespace, stored: Namespace) -> None:
    changed = _changed(args, stored, _RATES)
    if changed:
        raise UltraMemError(
            f"{source}: {changed}, and Megatron finds an optimizer's state by its "
            f"rates, --override-opt_param-scheduler or not. Give those of before, {_WEIGHTS_ALONE}."
        )


def _check_distributed(source: Source, args: Namespace, kind: str | None) -> None:
    """kind: of the state of a distributed optimizer, also a layer-wise one; None: of another."""
    here = args.use_distributed_optimizer or args.use_layer_wise_distributed_optimizer
    if bool(here) != (kind is not None):
        had, here, do = ("with", "without", "Add") if kind else ("without", "with", "Drop")
        raise UltraMemError(
            f"{source}: it was saved {had} --use-distributed-optimizer, and Megatron does not load "
            f"that optimizer's state {here} it. {do} the flag, {_WEIGHTS_ALONE}."
        )


def _kind(folder: str) -> str | None:
    from megatron.core.dist_checkpointing import load_content_metadata

    metadata: dict[str, Any] = load_content_metadata(folder) or {}
    return metadata.get("distrib_optim_sharding_type")


def _saved_parts(folder: str, num_values: int) -> tuple[int, int]:
    """Into how many parts of rows and of columns the tables of a checkpoint are cut."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    for key, table in stored.items():
        if isinstance(table, TensorStorageMetadata) and _TABLE.fullmatch(key):
            offsets = [chunk.offsets for chunk in table.chunks]
            # Memories that share lie below each other in one table.
            rows = len({offset[0] for offset in offsets}) // max(1, table.size[0] // num_values)
            return rows, len({offset[1] for offset in offsets})
    raise UltraMemError(f"{folder} is damaged: there is no value table in it. Load another.")


def _flags(rows: int, columns: int) -> str:
    """What cuts a table so."""
    size = f"--ultramem-parallel-size {rows * columns}"
    if rows * columns == 1:
        return size
    nodes = f" --ultramem-node-size {rows}" if min(rows, columns) > 1 else ""
    return f"{size} --ultramem-partition {_partition(rows, columns)}{nodes}"


def _partition(rows: int, columns: int) -> str:
    return "grid" if min(rows, columns) > 1 else "number" if rows > 1 else "dimension"


def _cut(rows: int, columns: int) -> str:
    """In the words of the settings in force."""
    if rows * columns == 1:
        return "whole"
    how = _partition(rows, columns)
    nodes = f", {rows} in a node" if how == "grid" else ""
    return f"over {rows * columns} ranks, {how}-wise{nodes}"
