"""The process groups of value tables: Megatron's expert groups.

Megatron's gradient buffers, optimizers and checkpoints know two kinds of parameters: dense ones and
"expert" ones (`allreduce=False`), which are reduced over the ranks that hold the same part. A part
of a value table is of the second kind. With expert tensor parallelism 1, Megatron's expert-parallel
groups are P neighbouring ranks of one pipeline stage (tensor, context, data parallel, in this
order), which is the group a table is cut over.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection

from ultramem_megatron.errors import UltraMemError


@dataclass(frozen=True)
class TableGroups:
    """Groups that a value table lives in.

    table: ranks that share a table. replicas: ranks that hold the same part of it.
    """

    table: Any
    replicas: Any


def table_groups(groups: ProcessGroupCollection) -> TableGroups | None:
    """The groups of value tables; None where a table must be an ordinary replicated parameter.

    That is where Megatron was initialised, without table groups, so that its expert groups leave
    out tensor-parallel ranks. A table in a group of one rank is an "expert" parameter too: so the
    optimizer's state has one form, and a checkpoint loads whatever the size. Raises UltraMemError
    for table groups in which tensor-parallel ranks would not count.
    """
    if groups.ep.size() > 1 and groups.expt_tp.size() > 1:
        raise UltraMemError(
            f"Value tables over {groups.ep.size()} ranks need expert tensor parallelism 1, it is "
            f"{groups.expt_tp.size()}. Initialise Megatron with expert_tensor_parallel_size=1."
        )
    if groups.expt_tp.size() > 1:
        return None
    return TableGroups(groups.ep, groups.expt_dp)


def initialize_model_parallel(
    args: Namespace, size: int, get_embedding_ranks: Callable[[list[int]], list[int]]
) -> None:
    """Initialise torch.distributed and Megatron's groups with table groups of `size` ranks.

    To be called after parsing and before `pretrain()`, which then finds them made. The
    flags keep their values: Megatron takes an expert-parallel size above 1 for a model of experts.
    Raises UltraMemError where Megatron has been initialised before, for another size.
    """
    from megatron.core import parallel_state
    from megatron.training import initialize

    if parallel_state.model_parallel_is_initialized():
        made = parallel_state.get_expert_model_parallel_world_size()
        if made != size:
            raise UltraMemError(
                f"value tables are to be cut over {size} ranks, but Megatron was initialised "
                f"before, with expert groups of {made}. Use --ultramem-parallel-size {made}, or "
                f"make the model config before initialize_megatron()."
            )
        return
    own = (args.expert_model_parallel_size, args.expert_tensor_parallel_size)

    def embedding_ranks(pipeline_ranks: list[int]) -> list[int]:
        with _expert_sizes(args, *own):  # a model config may be made from the flags in here
            return get_embedding_ranks(pipeline_ranks)

    with _expert_sizes(args, size, 1):
        initialize._initialize_distributed(embedding_ranks, None, None)


@contextmanager
def _expert_sizes(args: Namespace, model_parallel: int, tensor_parallel: int) -> Iterator[None]:
    before = (args.expert_model_parallel_size, args.expert_tensor_parallel_size)
    args.expert_model_parallel_size = model_parallel
    args.expert_tensor_parallel_size = tensor_parallel
    try:
        yield
    finally:
        args.expert_model_parallel_size, args.expert_tensor_parallel_size = before
