"""Refusals before training: unsupported or missing flags, checkpoints made with another design."""

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.config import UltraMemConfig, flag

_RESUMABLE = {"value_lr_decay", "lazy_adam", "aux_loss_weight", "aux_loss_margin", "init", "seed"}
"""Fields that a resumed run may change: they shape neither tensors nor what is read from them."""


def refuse_unsupported_flags(args: Namespace, ultramem: UltraMemConfig | None) -> None:
    """Raise UltraMemError for Megatron flags that memory layers cannot honour."""
    if ultramem is None:
        return
    refused = (
        (args.cuda_graph_impl != "none", f"--cuda-graph-impl {args.cuda_graph_impl}",
         "graphs capture a layer without its memory branch. Use --cuda-graph-impl none"),
        (args.overlap_moe_expert_parallel_comm, "--overlap-moe-expert-parallel-comm",
         "its schedule does not call the layer's forward. Drop the flag"),
        (args.use_megatron_fsdp, "--use-megatron-fsdp",
         "value tables need Megatron's DDP. Drop the flag; --use-distributed-optimizer works"),
        (getattr(args, "use_torch_fsdp2", False), "--use-torch-fsdp2",
         "value tables need Megatron's DDP. Drop the flag; --use-distributed-optimizer works"),
        (args.hybrid_layer_pattern is not None, "--hybrid-layer-pattern",
         "memory layers attach to GPT models only. Drop the flag"),
        (args.fp8 is not None, f"--fp8-format {args.fp8}",
         "memory layers compute in fp32, fp16 or bf16. Drop the flag"),
        (ultramem.lazy_adam and args.use_distributed_optimizer, "--use-distributed-optimizer",
         f"it cuts tables into pieces that are no rows. Drop it or {flag('lazy_adam')}"),
    )  # fmt: skip
    for present, given, reason in refused:
        if present:
            raise UltraMemError(f"{given} cannot be combined with memory layers: {reason}.")


def require_eval_interval(args: Namespace) -> None:
    """Raise UltraMemError without --eval-interval: Megatron 0.19 divides by it, whatever it is."""
    if not (args.eval_interval or args.full_validation or args.skip_train):
        raise UltraMemError(
            f"--eval-interval is {args.eval_interval}; Megatron counts by it how many samples to "
            f"validate with. Give a number of steps, and --eval-iters 0 for no validation."
        )


def check_checkpoint(args: Namespace, ultramem: UltraMemConfig | None) -> None:
    """Raise UltraMemError if the checkpoint to be loaded holds another memory design.

    Compares the flags stored in a `torch_dist` checkpoint under --load; a folder without one (a
    fresh start, or another format) is not refused here.
    """
    stored = _saved_args(args)
    if stored is None:
        return
    from ultramem_megatron.megatron.flags.arguments import config_from_args

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


def checkpoint_folder(load: str, ckpt_step: int | None = None) -> str:
    """The iteration's folder of a `torch_dist` checkpoint under `load`, by default the latest.

    Raises UltraMemError if there is none.
    """
    from megatron.core import dist_checkpointing
    from megatron.training.checkpointing import get_checkpoint_name
    from megatron.training.checkpointing import get_checkpoint_tracker_filename as tracker_name

    tracker = Path(tracker_name(load))
    if not tracker.is_file():
        raise UltraMemError(
            f"--load {load}: no checkpoint there ({tracker.name} is missing). Give the folder "
            f"that training had as --save."
        )
    text = tracker.read_text().strip() if ckpt_step is None else str(ckpt_step)
    release = text == "release"
    folder: str = get_checkpoint_name(
        load, 0 if release else int(text), release, return_base_dir=True
    )
    if not dist_checkpointing.check_is_distributed_checkpoint(folder):
        found = sorted(path.name for path in Path(load).glob("iter_*"))
        raise UltraMemError(
            f"--load {load}: {Path(folder).name} is not a torch_dist checkpoint; found: "
            f"{', '.join(found) or 'none'}. Choose one with --ckpt-step."
        )
    return folder


def stored_args(folder: str) -> Namespace:
    """The flags of the run that wrote a checkpoint."""
    from megatron.core import dist_checkpointing

    args: Namespace = dist_checkpointing.load_common_state_dict(folder)["args"]
    return args


def _saved_args(args: Namespace) -> Namespace | None:
    """Flags stored under --load; None where Megatron would start afresh or read another format."""
    if not args.load:
        return None
    try:
        return stored_args(checkpoint_folder(args.load, args.ckpt_step))
    except (UltraMemError, KeyError):
        return None
