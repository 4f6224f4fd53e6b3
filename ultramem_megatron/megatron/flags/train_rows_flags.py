"""What --ultramem-train-rows asks of the other flags, and of the file of background reads."""

from argparse import Namespace

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.background_reads import FLAG as FILE_FLAG
from ultramem_megatron.megatron.background_reads import read_background
from ultramem_megatron.memory.config import UltraMemConfig

_OPTIMIZERS = ("adam", "sgd")


def refuse_train_rows(args: Namespace, ultramem: UltraMemConfig) -> None:
    """Raise UltraMemError where rows cannot be chosen, or the others not be left alone."""
    rows = getattr(args, "ultramem_train_rows", None)
    file = getattr(args, "ultramem_background_reads", None)
    if rows is None and file is None:
        return
    if rows is None:
        raise UltraMemError(
            f"{FILE_FLAG} {file} is for --ultramem-train-rows T, which is not given. Add it, or "
            f"drop the file."
        )
    given = f"--ultramem-train-rows {rows}"
    if not 1 <= rows <= ultramem.num_values:
        raise UltraMemError(
            f"{given}: it must be from 1 to {ultramem.num_values}, the rows of a value table."
        )
    if file is None:
        raise UltraMemError(
            f"{given} chooses rows by how rarely other text reads them. Add {FILE_FLAG} FILE, "
            f"which `ultramem count` writes."
        )
    _refuse_other_training(given, args)
    _refuse_optimizer(given, args)
    read_background(file, ultramem)


def _refuse_other_training(given: str, args: Namespace) -> None:
    if args.ultramem_train_only != "memory":
        raise UltraMemError(
            f"{given} freezes all but values of memories. Add --ultramem-train-only memory."
        )
    if args.ultramem_upcycle is not None:
        raise UltraMemError(
            f"{given} cannot be combined with --ultramem-upcycle: such memories have no effect at "
            f"first, and frozen as they are would never have one. Train them first."
        )


def _refuse_optimizer(given: str, args: Namespace) -> None:
    if args.optimizer not in _OPTIMIZERS:
        raise UltraMemError(
            f"--optimizer {args.optimizer} cannot be combined with {given}: it would move every "
            f"row. Use one of {', '.join(_OPTIMIZERS)}."
        )
    if args.use_distributed_optimizer:
        raise UltraMemError(
            f"--use-distributed-optimizer cannot be combined with {given}: it cuts tables into "
            f"pieces that are no rows. Drop one of the two."
        )
