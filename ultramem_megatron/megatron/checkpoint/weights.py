"""Weights without a run: read from a checkpoint in either format, written in `torch_dist`."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.faults.integrity import RELEASE, TRACKER, iteration_folder
from ultramem_megatron.megatron.checkpoint.folder import is_fsdp_dtensor


def content_metadata(folder: str) -> dict[str, Any]:
    """What a checkpoint says of how it was stored, for `sharded_state_dict`."""
    from megatron.core import dist_checkpointing

    if is_fsdp_dtensor(Path(folder)):
        return {}
    return dist_checkpointing.load_content_metadata(folder) or {}


def load_weights(sharded: dict[str, Any], folder: str, num_experts: int | None) -> dict[str, Any]:
    """What a module's `sharded_state_dict` asks for, as its `load_state_dict` takes it.

    num_experts: of all ranks; None without experts. Collective where the checkpoint is in
    torch_dist. Raises UltraMemError.
    """
    from megatron.core import dist_checkpointing

    if is_fsdp_dtensor(Path(folder)):
        from ultramem_megatron.megatron.checkpoint.fsdp_dtensor import load_state

        return load_state(sharded, folder, num_experts)
    loaded = dist_checkpointing.load({"model": sharded}, folder, verify_integrity=True)
    weights: dict[str, Any] = loaded["model"]
    return weights


def save_weights(model: Any, args: Namespace, folder: str | Path) -> None:
    """Save the model and the flags that describe it under `folder`; all ranks call it.

    Raises UltraMemError if the folder has a checkpoint already.
    """
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state

    refuse_checkpoint(folder)
    tracker, weights = _places(folder)
    weights.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    data_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "model": model.sharded_state_dict(metadata={"dp_cp_group": data_group}),
    }
    dist_checkpointing.save(state, str(weights), verify_integrity=True)
    if dist.get_rank() == 0:
        tracker.write_text(RELEASE)
    dist.barrier()


def refuse_checkpoint(folder: str | Path) -> None:
    """Raise UltraMemError if the folder has a checkpoint already."""
    tracker, weights = _places(folder)
    if tracker.exists() or (weights.exists() and any(weights.iterdir())):
        raise UltraMemError(f"{folder} holds a checkpoint already. Choose another folder.")


def _places(folder: str | Path) -> tuple[Path, Path]:
    """The tracker's file and the weights' folder."""
    return Path(folder) / TRACKER, iteration_folder(Path(folder), RELEASE)
