"""--log-throughput and the FLOP counters include the memory layers."""

from typing import Any

from ultramem_megatron.patches.patch import Editor, Patch

_PARAMETERS = (
    "args", "batch_size", "seqlen_squared_sum_in_batch", "total_real_tokens_in_batch",
)  # fmt: skip


def _with_memory_flops(original: Any) -> Any:
    def num_floating_point_operations(
        args: Any,
        batch_size: int,
        seqlen_squared_sum_in_batch: float | None = None,
        total_real_tokens_in_batch: float | None = None,
    ) -> Any:
        from ultramem_megatron.megatron.current_run import current_run
        from ultramem_megatron.memory.size import training_flops

        flops = original(args, batch_size, seqlen_squared_sum_in_batch, total_real_tokens_in_batch)
        if current_run.ultramem is None:
            return flops
        tokens = total_real_tokens_in_batch
        tokens = batch_size * args.seq_length if tokens is None else tokens
        return flops + training_flops(current_run.ultramem, current_run.hidden_size, int(tokens))

    return num_floating_point_operations


def _install(editor: Editor) -> None:
    editor.wrap(
        "megatron.training.training.num_floating_point_operations", _with_memory_flops, _PARAMETERS
    )


PATCH = Patch(
    name="doors.flops",
    symbols=("megatron.training.training.num_floating_point_operations",),
    reason="FLOPs are computed from the arguments alone, by a closed formula.",
    delete_when="The model (or its config) reports its own FLOPs.",
    install=_install,
    versions=">=0.18",
)
