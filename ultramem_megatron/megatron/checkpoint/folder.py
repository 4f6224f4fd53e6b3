"""Checkpoints on disk: the folder of an iteration, and the flags of the run that wrote it."""

from argparse import Namespace
from pathlib import Path

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.faults.integrity import RELEASE, TRACKER, iteration_folder


class NoCheckpointError(UltraMemError):
    """Nothing was saved in a folder yet: with it as --load, Megatron starts afresh."""


def loaded_iteration(load: str, ckpt_step: int | None = None) -> Path:
    """Folder of the iteration under `load` that Megatron would load, whatever its format.

    ckpt_step: its number; None takes the latest.

    Raises:
        NoCheckpointError: nothing names an iteration.
        UltraMemError: the iteration that is named is not there.
    """
    checkpoints = Path(load)
    folder = iteration_folder(checkpoints, _latest(checkpoints) if ckpt_step is None else ckpt_step)
    if not folder.is_dir():
        raise UltraMemError(f"--load {load}: {folder.name} is not there; {_choice(checkpoints)}")
    return folder


def checkpoint_folder(load: str, ckpt_step: int | None = None) -> str:
    """As `loaded_iteration`, which must be a `torch_dist` checkpoint: others raise, too."""
    folder = loaded_iteration(load, ckpt_step)
    if not is_torch_dist(folder):
        raise UltraMemError(
            f"--load {load}: {folder.name} is not a torch_dist checkpoint; {_choice(Path(load))}"
        )
    return str(folder)


def is_torch_dist(folder: Path) -> bool:
    """Whether an iteration was saved as --ckpt-format torch_dist says."""
    from megatron.core import dist_checkpointing

    return bool(dist_checkpointing.check_is_distributed_checkpoint(str(folder)))


def stored_args(folder: str) -> Namespace:
    """The flags of the run that wrote a `torch_dist` checkpoint."""
    from megatron.core import dist_checkpointing

    args: Namespace = dist_checkpointing.load_common_state_dict(folder)["args"]
    return args


def _latest(checkpoints: Path) -> str:
    tracker = checkpoints / TRACKER
    if not tracker.is_file():
        raise NoCheckpointError(
            f"--load {checkpoints}: no checkpoint there ({TRACKER} is missing). Give the folder "
            f"that training had as --save."
        )
    text = tracker.read_text().strip()
    if text != RELEASE and not text.isdecimal():
        raise UltraMemError(
            f"--load {checkpoints}: {TRACKER} says {text!r}, which is no iteration; "
            f"{_choice(checkpoints)}"
        )
    return text


def _choice(checkpoints: Path) -> str:
    found = sorted(path.name for path in checkpoints.glob("iter_*"))
    return f"found: {', '.join(found) or 'none'}. Choose one with --ckpt-step."
