"""What a user can do about errors that come from the machine: notes below their tracebacks."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import traceback
from argparse import Namespace
from collections.abc import Iterator, Sequence

import torch
from torch.distributed.checkpoint.api import CheckpointException

from ultramem_megatron.errors import UltraMemError

_PLAN_SECONDS = 120
_SHARED = "/dev/shm"
_NO_MEMORY = ("can't allocate memory", "out of memory", os.strerror(errno.ENOMEM))


@contextlib.contextmanager
def explained(args: Namespace, flags: Sequence[str]) -> Iterator[None]:
    """Add a note to an error about memory or a file to be written that leaves the block.

    An optimizer's state that was saved for another layout becomes an UltraMemError.

    Args:
        args: Megatron's arguments.
        flags: the command line they come from, for the plan of its memory.
    """
    try:
        yield
    except BaseException as error:  # CheckpointException is no Exception
        if args.load and args.use_distributed_optimizer and any(map(_is_layout, _chain(error))):
            raise UltraMemError(_about_layout(args)) from error
        if any(map(_is_out_of_memory, _chain(error))):
            error.add_note(_about_memory(args, flags))
        elif any(map(_is_shared_memory, _chain(error))):
            error.add_note(_about_shared_memory(args))
        elif any(map(_is_lost_writer, _chain(error))):
            error.add_note(_about_writer(args))
        elif any(map(_is_failed_write, _chain(error))):
            error.add_note(_about_space(args))
        raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_layout(error: BaseException) -> bool:
    """What Megatron says of a distributed optimizer's state that was cut for other ranks."""
    words = str(error)
    state = "optimizer.distributed." in words
    return "(TP, PP) mismatch after resume" in words or (
        state and ("Global shape mismatch" in words or "not in state dict" in words)
    )


def _about_layout(args: Namespace) -> str:
    return (
        f"--load {args.load}: the state of the distributed optimizer was saved for ranks laid out "
        f"otherwise. Go on with the same layout, or once with --no-load-optim (weights alone); "
        f"saved with --dist-ckpt-optim-fully-reshardable it loads into any."
    )


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(n in str(error) for n in _NO_MEMORY)


def _about_memory(args: Namespace, flags: Sequence[str]) -> str:
    return (
        f"ultramem_megatron: rank {args.rank} ran out of memory. {_plan(args.world_size, flags)}\n"
        "To need less on a rank: a larger --ultramem-parallel-size, --use-distributed-optimizer, "
        "more tensor or pipeline stages, a smaller --micro-batch-size, recomputation."
    )


def _plan(world_size: int, flags: Sequence[str]) -> str:
    """The plan's own lines for this layout, from a process of its own: this one has no memory."""
    command = [
        sys.executable,
        "-m",
        "ultramem_megatron.tools.plan",
        "--gpus",
        str(world_size),
        *flags,
    ]
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    try:
        made = subprocess.run(
            command, env=alone, capture_output=True, text=True, timeout=_PLAN_SECONDS
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"No estimate could be made ({error}); ultramem plan makes one."
    if made.returncode != 0:
        return f"No estimate could be made: {made.stderr.strip().splitlines()[-1:]}"
    start = made.stdout.find(f"{world_size} GPUs:")
    return f"The estimate of ultramem plan:\n{made.stdout[start:].rstrip()}"


def _is_shared_memory(error: BaseException) -> bool:
    """Whether memory shared with workers is meant: their queues and locks, or a batch of theirs."""
    if any(word in str(error) for word in ("shared memory", "(shm)", _SHARED)):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    from_queues = bool(frames) and frames[-1].filename.endswith("multiprocessing/synchronize.py")
    return from_queues and os.strerror(errno.ENOSPC) in str(error)


def _about_shared_memory(args: Namespace) -> str:
    return (
        f"ultramem_megatron: no room in {_with_free_space('shared memory,', _SHARED)}, through "
        f"which the {args.num_workers} data workers of a rank hand on batches. Give it more "
        f"(docker: --shm-size or --ipc=host), or use a smaller --num-workers; 0 needs none."
    )


def _is_failed_write(error: BaseException) -> bool:
    # Processes that write shards print their errors; what arrives is this class, and empty.
    return isinstance(error, CheckpointException) or os.strerror(errno.ENOSPC) in str(error)


def _is_lost_writer(error: BaseException) -> bool:
    """What Megatron says of a process that wrote in the background and left nothing behind."""
    return "results_queue should not be empty" in str(error)


def _about_writer(args: Namespace) -> str:
    return (
        f"ultramem_megatron: the process that wrote a checkpoint to {args.save} (--async-save) was "
        f"killed, most often by the system, for the memory that it needs besides.\n"
        f"The newest complete checkpoint is untouched: start the same command again, if need be "
        f"without --async-save."
    )


def _about_space(args: Namespace) -> str:
    folders = {"--save": args.save, "--tensorboard-dir": args.tensorboard_dir}
    named = ", ".join(_with_free_space(flag, f) for flag, f in folders.items() if f)
    return (
        f"ultramem_megatron: a file could not be written; this run writes to {named}.\n"
        "The newest complete checkpoint is untouched: make room, or find the cause above, and "
        "start the same command again."
    )


def _with_free_space(flag: str, folder: str) -> str:
    with contextlib.suppress(OSError):
        return f"{flag} {folder} ({shutil.disk_usage(folder).free / 1e9:.3f} GB free)"
    return f"{flag} {folder}"
