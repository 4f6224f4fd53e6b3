"""Door: parameters that Megatron's report of theoretical memory does not know."""

from collections.abc import Callable
from typing import Any

from ultramem_megatron.patches.patch import Editor, Patch

more: list[Callable[[Any, bool], float]] = []
"""Each gives bytes of the fullest rank for (args, verbose), and prints its part if verbose."""


def bytes_per_parameter(args: Any) -> float:
    """Weight, gradient and Adam state, as Megatron counts them for its own parameters."""
    if args.use_distributed_optimizer:
        return 6 + 12 / args.data_parallel_size
    return 18


def _and_more(original: Any) -> Any:
    def compute_weight_and_optimizer_memory(args: Any, verbose: bool = False) -> float:
        total: float = original(args, verbose=verbose)
        return total + sum(count(args, verbose) for count in more)

    return compute_weight_and_optimizer_memory


def _install(editor: Editor) -> None:
    editor.wrap(
        "megatron.training.theoretical_memory_usage.compute_weight_and_optimizer_memory",
        _and_more,
        ("args", "verbose"),
    )


PATCH = Patch(
    name="doors.footprint",
    symbols=("megatron.training.theoretical_memory_usage.compute_weight_and_optimizer_memory",),
    reason="Parameters are counted from the arguments alone, by a closed formula.",
    delete_when="The report counts the parameters of the model that was built.",
    install=_install,
)
