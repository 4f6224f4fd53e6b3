"""A save writes beside a complete iteration, not over it; and not into another run's folder."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ultramem_megatron.faults import rewriting, run_lock
from ultramem_megatron.patches.patch import Editor, Patch

_FUNCTION = "megatron.core.dist_checkpointing.save"


def _beside(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save(sharded_state_dict: Any, checkpoint_dir: str, *rest: Any, **kw: Any) -> Any:
        iteration = Path(checkpoint_dir)
        target = _target(iteration)
        request = original(sharded_state_dict, target, *rest, **kw)
        if target != str(iteration):
            put_in_place = functools.partial(_swap, iteration)
            if request is None:
                put_in_place()
            else:
                request.finalize_fns.append(put_in_place)
        return request

    return save


def _target(iteration: Path) -> str:
    """Where all ranks write; rank 0 alone looks, as others may see an older state of the disk."""
    found = [str(iteration)]
    if dist.get_rank() == 0:
        run_lock.require_own_folders()
        if rewriting.is_complete(iteration):
            found = [str(rewriting.beside(iteration))]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _swap(iteration: Path) -> None:
    if dist.get_rank() == 0:
        rewriting.swap(iteration)
    dist.barrier()


def _install(editor: Editor) -> None:
    editor.wrap(
        _FUNCTION,
        _beside,
        (
            "sharded_state_dict",
            "checkpoint_dir",
            "sharded_strategy",
            "validate_access_integrity",
            "async_sharded_save",
            "preprocess_common_before_consistancy_check",
            "content_metadata",
            "async_strategy",
            "verify_integrity",
        ),
    )


PATCH = Patch(
    name="defects.whole_iterations",
    symbols=(_FUNCTION,),
    reason="Upstream writes into the folder of a complete iteration; killed meanwhile, neither the "
    "old nor the new one is left.",
    delete_when="save() writes beside and renames.",
    install=_install,
    versions=">=0.19",
)
