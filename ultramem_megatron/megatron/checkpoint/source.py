"""Where training takes its weights from: --load, or --pretrained-checkpoint where that is empty."""

import contextlib
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ultramem_megatron.errors import NonFiniteError, UltraMemError
from ultramem_megatron.faults.integrity import check_iteration, has_sums, repair_tracker
from ultramem_megatron.megatron.checkpoint.folder import NoCheckpointError, loaded_iteration


class Source(NamedTuple):
    """A folder of checkpoints and the flag that gave it."""

    flag: str
    folder: str
    step: int | None
    """--ckpt-step; None for the latest."""

    def __str__(self) -> str:
        return f"{self.flag} {self.folder}"

    def iteration(self) -> Path:
        """The folder of its iteration. Raises UltraMemError, also NoCheckpointError."""
        return loaded_iteration(self.folder, self.step, self.flag)


def source_of_weights(args: Namespace) -> Source | None:
    """What Megatron will load, None for a fresh start.

    Raises UltraMemError: a --load without a checkpoint, unless --load-or-start allows for it.
    """
    if args.load and args.verify_integrity and args.ckpt_format == "torch_dist":
        repair_tracker(Path(args.load))
    if holds_checkpoint(args):
        return Source("--load", args.load, args.ckpt_step)
    if args.load and args.non_persistent_ckpt_type is None:
        _require_permission_to_start(args)
    if args.pretrained_checkpoint:
        return Source("--pretrained-checkpoint", args.pretrained_checkpoint, args.ckpt_step)
    return None


def holds_checkpoint(args: Namespace) -> bool:
    """Whether this run goes on from --load."""
    if not args.load:
        return False
    try:
        loaded_iteration(args.load, args.ckpt_step)
    except NoCheckpointError:
        return False
    return True


@contextlib.contextmanager
def named_where_not_finite(args: Namespace) -> Iterator[None]:
    """Put the folder of the loaded iteration before a NonFiniteError that leaves the block."""
    try:
        yield
    except NonFiniteError as error:
        source = source_of_weights(args)
        if source is None:
            raise
        raise NonFiniteError(f"{source.flag} {source.iteration()}: {error}") from None


def settle_sums(args: Namespace, has_memories: bool) -> None:
    """Decide whether checkpoints have sums, where neither flag says so: with memory layers.

    Then, one that was saved without them is loaded all the same (`sums_required`).
    """
    args.sums_required = bool(args.verify_integrity)
    if args.verify_integrity is None:
        args.verify_integrity = has_memories and args.ckpt_format == "torch_dist"


def check_sums(source: Source, args: Namespace) -> None:
    """Where sums are on, refuse a damaged checkpoint before it is read: this rank's share of it."""
    if args.verify_integrity and args.ckpt_format == "torch_dist":
        folder = source.iteration()
        if args.sums_required or has_sums(folder):
            check_iteration(folder, source.flag)


def _require_permission_to_start(args: Namespace) -> None:
    same = args.save and Path(args.save).absolute() == Path(args.load).absolute()
    if args.load_or_start and same:
        return
    if args.load_or_start:
        where = f"save to {args.save}" if args.save else "save nowhere"
        raise UltraMemError(
            f"--load {args.load}: no checkpoint there, and this run would {where}: "
            f"--load-or-start is for one folder, given as --load and as --save. Correct --load."
        )
    raise UltraMemError(
        f"--load {args.load}: no checkpoint there. Correct it, leave it out for a fresh start, or "
        f"add --load-or-start, with the same folder as --save: go on if there is a checkpoint, "
        f"otherwise start."
    )
