"""Megatron's report of parameters and theoretical memory counts the memory layers."""

from typing import Any

from ultramem_megatron.patches.patch import Editor, Patch

_BILLION = 10**9


def _with_memory_layers(original: Any) -> Any:
    def compute_weight_and_optimizer_memory(args: Any, verbose: bool = False) -> float:
        from ultramem_megatron.megatron.current_run import current_run
        from ultramem_megatron.memory.size import memory_size

        total: float = original(args, verbose=verbose)
        if current_run.ultramem is None:
            return total
        size = memory_size(current_run.ultramem, current_run.hidden_size)
        if verbose:
            print(
                "Number of parameters in memory layers in billions: "
                f"sparse {size.sparse / _BILLION:.4f}, dense {size.dense / _BILLION:.4f} "
                "(not in the totals above)"
            )
        share = current_run.memories_on_fullest_stage / len(current_run.ultramem.spans)
        # Everything but the tables is whole on every tensor-parallel rank.
        held = size.sparse / current_run.tables.size + size.dense
        return total + share * held * _bytes_per_parameter(args)

    return compute_weight_and_optimizer_memory


def _bytes_per_parameter(args: Any) -> float:
    """Weight, gradient and Adam state, as Megatron counts them for its own parameters."""
    if args.use_distributed_optimizer:
        return 6 + 12 / args.data_parallel_size
    return 18


def _install(editor: Editor) -> None:
    editor.wrap(
        "megatron.training.theoretical_memory_usage.compute_weight_and_optimizer_memory",
        _with_memory_layers,
        ("args", "verbose"),
    )


PATCH = Patch(
    name="doors.footprint",
    symbols=("megatron.training.theoretical_memory_usage.compute_weight_and_optimizer_memory",),
    reason="Parameters are counted from the arguments alone, by a closed formula.",
    delete_when="The report counts the parameters of the model that was built.",
    install=_install,
)
