"""Megatron-FSDP cuts no row of a weight in two.

A unit's weights lie in one buffer, which ranks cut at multiples of a grid, the least common
multiple of their rows. Weights smaller than the grid come last, one behind the other, wherever that
may be, and a cut within a row of one ends in an error ("shape '[-1, 48]' is invalid"): with latent
attention, for example. Here such a weight starts at the next multiple.
"""

import functools
from collections.abc import Callable
from typing import Any

from ultramem_megatron.patches.patch import Editor, Patch

_BUFFER = "megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer"
_FUNCTION = f"{_BUFFER}.build_data_parallel_buffer_index"


def _cuts_a_row(start: int, item: Any, grid: int) -> bool:
    """Whether a multiple of the grid lies within a row of the weight that starts there."""
    rows_above = -start % grid
    return item.size < grid and rows_above < item.size and rows_above % item.shape[1:].numel() > 0


def _moved(places: dict[int, Any], grid: int) -> dict[int, Any]:
    """Where weights lie in the buffer, those behind one that a cut would go through moved on."""
    shift, moved = 0, dict(places)
    for number in sorted(places, key=lambda number: int(places[number].global_data_index)):
        start = places[number].global_data_index + shift
        if _cuts_a_row(start, places[number], grid):
            shift += -start % grid
            start += -start % grid
        moved[number] = places[number]._replace(global_data_index=start)
    return moved


def _in_whole_rows(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def build_data_parallel_buffer_index(
        elements: Any,
        data_parallel_rank: int,
        data_parallel_world_size: int,
        is_data_distributed: bool,
        ddp_config: Any,
        bucket_id: int = 0,
        chunk_size_factor: int = 1,
    ) -> Any:
        from megatron.core.distributed.fsdp.src.megatron_fsdp import param_and_grad_buffer

        ranks = (data_parallel_rank, data_parallel_world_size)
        built = build(
            elements, *ranks, is_data_distributed, ddp_config, bucket_id, chunk_size_factor
        )
        moved = _moved(built[0], chunk_size_factor)
        if ddp_config.data_parallel_sharding_strategy == "no_shard" or moved == built[0]:
            return built
        end = max(place.global_data_index + place.size for place in moved.values())
        step = data_parallel_world_size * chunk_size_factor
        bucket = built[1]._replace(size=-(-end // step) * step, items=[*moved.values()])
        shard = param_and_grad_buffer._get_dp_buffer_shard_bucket_index(
            bucket, is_data_distributed, *reversed(ranks)
        )
        return moved, bucket, shard

    return build_data_parallel_buffer_index


def _install(editor: Editor) -> None:
    place = ("data_parallel_rank", "data_parallel_world_size", "is_data_distributed", "ddp_config")
    given = ("elements", *place, "bucket_id", "chunk_size_factor")
    editor.wrap(_FUNCTION, _in_whole_rows, given)


PATCH = Patch(
    name="defects.megatron_fsdp_cut_rows",
    symbols=(_FUNCTION,),
    reason="The function that lays out a buffer does it in one go.",
    delete_when="A GPT with --multi-latent-attention starts with optim_grads_params on two ranks.",
    install=_install,
    versions=">=0.19",
)
