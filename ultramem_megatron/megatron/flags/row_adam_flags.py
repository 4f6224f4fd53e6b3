"""What --ultramem-row-adam asks of the other flags."""

from argparse import SUPPRESS, Action, ArgumentParser, Namespace
from typing import Any

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.config import UltraMemConfig, flag
from ultramem_megatron.memory.placement import placements

_LOOK_AT_ALL = {
    "log_params_norm": "--log-params-norm",
    "check_weight_hash_across_dp_replicas_interval": "--check-weight-hash-across-dp-replicas-"
    "interval",
}
"""Flags with which Megatron reads all weights, which it cannot be told to announce."""


def refuse_row_adam(args: Namespace, ultramem: UltraMemConfig) -> None:
    """Raise UltraMemError where rows cannot be left behind."""
    for name in ("table_moments", "table_main_params"):
        if getattr(ultramem, name) != "float32":
            _refuse_state(args, ultramem, name)
    if ultramem.table_main_params == "none" and not getattr(args, "bf16", False):
        raise UltraMemError(
            f"{flag('table_main_params')} none is for tables in bfloat16, and needs --bf16. Add "
            f"it, or drop the flag."
        )
    if ultramem.row_adam:
        refuse_rows_behind(args, ultramem, flag("row_adam"))


def _refuse_state(args: Namespace, ultramem: UltraMemConfig, name: str) -> None:
    given = f"{flag(name)} {getattr(ultramem, name)}"
    on_host = getattr(args, "ultramem_table_memory", None) == "host"
    if not ultramem.row_adam and not on_host:
        raise UltraMemError(
            f"{given} needs {flag('row_adam')} or --ultramem-table-memory host: PyTorch's AdamW "
            f"keeps its own state, in float32. Add one of the two, or drop the flag."
        )
    if getattr(args, "use_torch_fsdp2", False):
        raise UltraMemError(
            f"{given} cannot be combined with --use-torch-fsdp2, whose checkpoints take state "
            f"from PyTorch's AdamW. Drop one of the two."
        )


def refuse_rows_behind(args: Namespace, ultramem: UltraMemConfig, given: str) -> None:
    """The same of `given`, a flag with which AdamW visits only rows that are read."""
    if args.optimizer != "adam":
        raise UltraMemError(
            f"--optimizer {args.optimizer} cannot be combined with {given}, which is a form of "
            f"adam. Drop one of the two."
        )
    if getattr(args, "ultramem_train_rows", None) is not None:
        raise UltraMemError(
            f"--ultramem-train-rows {args.ultramem_train_rows} cannot be combined with {given}: "
            f"rows that it does not choose stay, and here they move. Drop one of the two."
        )
    for name, spelled in _LOOK_AT_ALL.items():
        if getattr(args, name, None):
            raise UltraMemError(
                f"{spelled} cannot be combined with {given}: it would look at rows that are behind "
                f"the others. Drop one of the two."
            )
    places = placements(ultramem)
    shared = len({place.table for place in places}) < len(places)
    if shared and getattr(args, "ultramem_overlap", False):
        raise UltraMemError(
            f"--ultramem-overlap cannot be combined with {given} where memories share values "
            f"({flag('share_values')} {ultramem.share_values:g}): two of them would bring one row "
            f"up to date at the same time. Drop one of the two."
        )


class _Gone(Action):
    def __call__(self, *_: Any) -> None:
        raise UltraMemError(
            "--ultramem-lazy-adam is gone: it did not train as Adam does. Use --ultramem-row-adam, "
            "which visits as few rows, and does."
        )


def refuse_lazy_adam(parser: ArgumentParser) -> None:
    """Say what became of it; no help names it."""
    parser.add_argument(
        "--ultramem-lazy-adam", action=_Gone, nargs=0, default=SUPPRESS, help=SUPPRESS
    )
