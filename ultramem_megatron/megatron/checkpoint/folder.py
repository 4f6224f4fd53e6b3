"""Checkpoints on disk: the folder of an iteration, and the flags of the run that wrote it."""

import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

from ultramem_megatron.errors import UltraMemError, user_error
from ultramem_megatron.faults.integrity import (
    RELEASE,
    TRACKER,
    check_before_reading,
    is_number,
    iteration_folder,
    read_tracker,
)
from ultramem_megatron.faults.manifest import ManifestError, refuse_odd_files
from ultramem_megatron.faults.trust import ADVICE, fault_of
from ultramem_megatron.megatron.checkpoint.stored_flags import believed, believed_layout


class NoCheckpointError(UltraMemError):
    """Nothing was saved in a folder yet."""


class NoFlagsError(UltraMemError):
    """A checkpoint does not say what model it holds."""


def loaded_iteration(load: str, ckpt_step: int | None = None, flag: str = "--load") -> Path:
    """Folder of the iteration under `load` that Megatron would load, whatever its format.

    ckpt_step: its number; None takes the latest. flag: the one that gave `load`.

    Raises:
        NoCheckpointError: nothing names an iteration.
        UltraMemError: the iteration that is named is not there.
    """
    checkpoints = Path(load)
    if checkpoints.exists() and not checkpoints.is_dir():
        raise UltraMemError(f"{flag} {load}: a file. Give the folder that training had as --save.")
    if ckpt_step is not None and ckpt_step < 1:
        raise UltraMemError(f"--ckpt-step {ckpt_step}: the first iteration is 1.")
    named = _latest(checkpoints, flag) if ckpt_step is None else ckpt_step
    folder = iteration_folder(checkpoints, named)
    if not folder.is_dir():
        what = "a file, no folder" if folder.exists() else "not there"
        raise UltraMemError(f"{flag} {load}: {folder.name} is {what}; {_choice(checkpoints)}")
    try:
        refuse_odd_files(folder)
    except ManifestError as error:
        raise UltraMemError(f"{folder} is damaged: {error}. Give another {flag}.") from None
    return folder


def checkpoint_folder(load: str, ckpt_step: int | None = None, flag: str = "--load") -> str:
    """As `loaded_iteration`, checked against its sums; of other formats than ours it raises, too.

    Ours are `torch_dist` and `fsdp_dtensor`.
    """
    folder = loaded_iteration(load, ckpt_step, flag)
    check_before_reading(folder, flag)
    if not is_torch_dist(folder) and not is_fsdp_dtensor(folder):
        raise UltraMemError(
            f"{flag} {load}: {folder.name} is not a torch_dist checkpoint, nor one in "
            f"fsdp_dtensor; {_choice(Path(load))}"
        )
    return str(folder)


def is_torch_dist(folder: Path) -> bool:
    """Whether an iteration was saved as --ckpt-format torch_dist says. Raises UltraMemError."""
    from megatron.core.dist_checkpointing.core import maybe_load_config

    try:
        config = maybe_load_config(str(folder))
    except (ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise UltraMemError(f"{folder}/metadata.json is damaged: {error}.") from None
    # Other backends are asked for by name, and versions are compared as numbers.
    wanted = ("torch_dist", 1)
    return config is not None and wanted == (config.sharded_backend, config.sharded_backend_version)


def is_fsdp_dtensor(folder: Path) -> bool:
    """Whether an iteration was saved as --ckpt-format fsdp_dtensor says (or torch_dcp)."""
    return (folder / ".metadata").is_file() and not (folder / "metadata.json").exists()


def stored_args(folder: str) -> Namespace:
    """The flags that describe the model of a checkpoint, as `believed` takes them.

    It is in torch_dist or fsdp_dtensor.

    Raises UltraMemError where it has none, or something in it is not what Megatron stores, which is
    then not run.
    """
    return believed(_stored(folder), folder)


def stored_layout(folder: str) -> Namespace:
    """Of the same flags those of `believed_layout`. Raises as `stored_args`."""
    return believed_layout(_stored(folder), folder)


def _stored(folder: str) -> Any:
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint import CheckpointException, FileSystemReader

    try:
        FileSystemReader(folder).read_metadata()  # read below, too, but refusals are lost there
        common = (
            dist_checkpointing.load_common_state_dict(folder)
            if is_torch_dist(Path(folder))
            else _flags_alone(folder)
        )
    except UltraMemError:
        raise
    except pickle.UnpicklingError as error:  # common.pt, of older checkpoints
        raise UltraMemError(f"{folder}/common.pt {fault_of(error)}. {ADVICE}") from None
    except (CheckpointException, Exception) as error:  # damaged files end in errors of any kind
        lines = str(error).strip().splitlines()
        what = f"{type(error).__name__} {lines[-1] if lines else ''}"
        raise user_error(error) or UltraMemError(
            f"{folder} is damaged: its flags cannot be read ({what:.200}). Give another --load."
        ) from error
    if not isinstance(common, dict):
        raise UltraMemError(f"{folder}: its common state is no dict, but {common!r:.200}.")
    if "args" not in common:
        raise NoFlagsError(
            f"{folder}: no flags are stored in it, so what model it holds is not known. Save with "
            f"ultramem train, or with a loop that puts its flags into the checkpoint as args."
        )
    return common["args"]


def _flags_alone(folder: str) -> dict[str, Any]:
    """Of a checkpoint in fsdp_dtensor, where they stand beside the weights."""
    from torch.distributed import checkpoint

    state: dict[str, Any] = {"args": None}
    checkpoint.load(state, checkpoint_id=folder, no_dist=True)
    return state


def _latest(checkpoints: Path, flag: str) -> str:
    tracker = checkpoints / TRACKER
    if not tracker.is_file():
        raise NoCheckpointError(
            f"{flag} {checkpoints}: no checkpoint there ({TRACKER} is missing). Give the folder "
            f"that training had as --save."
        )
    text = read_tracker(tracker)
    if text != RELEASE and not is_number(text):
        raise UltraMemError(
            f"{flag} {checkpoints}: {TRACKER} says {text!r:.80}, which is no iteration; "
            f"{_choice(checkpoints)}"
        )
    return text


def _choice(checkpoints: Path) -> str:
    found = sorted(path.name for path in checkpoints.glob("iter_*"))
    return f"found: {', '.join(found) or 'none'}. Choose one with --ckpt-step."
