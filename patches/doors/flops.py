"""Door: FLOPs that Megatron's closed formula does not know, for --log-throughput."""

from collections.abc import Callable
from typing import Any

from ultramem_megatron.patches.patch import Editor, Patch

more: list[Callable[[int], int]] = []
"""Each gives the FLOPs of forward and backward for so many tokens; they are added up."""

_PARAMETERS = ("args", "batch_size", "seqlen_squared_sum_in_batch", "total_real_tokens_in_batch")


def _and_more(original: Any) -> Any:
    def num_floating_point_operations(
        args: Any,
        batch_size: int,
        seqlen_squared_sum_in_batch: float | None = None,
        total_real_tokens_in_batch: float | None = None,
    ) -> Any:
        flops = original(args, batch_size, seqlen_squared_sum_in_batch, total_real_tokens_in_batch)
        tokens = total_real_tokens_in_batch
        tokens = batch_size * args.seq_length if tokens is None else tokens
        return flops + sum(count(int(tokens)) for count in more)

    return num_floating_point_operations


def _install(editor: Editor) -> None:
    editor.wrap("megatron.training.training.num_floating_point_operations", _and_more, _PARAMETERS)


PATCH = Patch(
    name="doors.flops",
    symbols=("megatron.training.training.num_floating_point_operations",),
    reason="FLOPs are computed from the arguments alone, by a closed formula.",
    delete_when="The model (or its config) reports its own FLOPs.",
    install=_install,
    versions=">=0.18",
)
