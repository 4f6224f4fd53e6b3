"""Is a checkpoint of this run's memory design? Asked before anything is built."""

import dataclasses
from argparse import Namespace
from typing import Any

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.checkpoint.folder import (
    NoCheckpointError,
    is_torch_dist,
    loaded_iteration,
    stored_args,
)
from ultramem_megatron.megatron.flags.arguments import config_from_args
from ultramem_megatron.memory.config import UltraMemConfig, flag

_RESUMABLE = {"value_lr_decay", "lazy_adam", "aux_loss_weight", "aux_loss_margin", "init", "seed"}
"""Fields that a resumed run may change: they shape neither tensors nor what is read from them."""


def check_checkpoint(args: Namespace, ultramem: UltraMemConfig | None) -> None:
    """Raise UltraMemError if the checkpoint to be loaded holds another memory design.

    Compares the flags stored in a `torch_dist` checkpoint under --load. Nothing there is a fresh
    start. Megatron resumes from other formats, too; their flags are not read, which is said.

    Raises:
        UltraMemError: also where --ckpt-step or the folder names an iteration that is not there.
    """
    stored = _saved_args(args)
    if stored is None:
        return
    saved = config_from_args(stored)
    if saved is None or ultramem is None:
        if saved is not ultramem:
            has, wants = ("has no", "asks for") if saved is None else ("has", "asks for no")
            raise UltraMemError(
                f"--load {args.load}: the checkpoint {has} memory layers, this run {wants} them. "
                f"Give the --ultramem-* flags it was made with, or load another checkpoint."
            )
        return
    differences = [
        f"{flag(name)} is {_shown(mine)} here, {_shown(theirs)} in the checkpoint"
        for name, mine, theirs in _fields(ultramem, saved)
        if mine != theirs and name not in _RESUMABLE
    ]
    if differences:
        raise UltraMemError(
            f"--load {args.load}: the checkpoint was made with another memory design: "
            f"{'; '.join(differences)}. Use the checkpoint's values, or start without --load."
        )


def _fields(mine: UltraMemConfig, theirs: UltraMemConfig) -> list[tuple[str, Any, Any]]:
    names = [field.name for field in dataclasses.fields(UltraMemConfig)]
    return [(name, getattr(mine, name), getattr(theirs, name)) for name in names]


def _shown(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _saved_args(args: Namespace) -> Namespace | None:
    """Flags stored under --load; None where there are none to compare with."""
    if not args.load:
        return None
    try:
        folder = loaded_iteration(args.load, args.ckpt_step)
    except NoCheckpointError:
        return None
    if not is_torch_dist(folder):
        print(f"--load {folder}: not torch_dist, so its memory design is not compared.", flush=True)
        return None
    try:
        return stored_args(str(folder))
    except KeyError:  # saved by a training loop that is not Megatron's
        return None
