"""The check of a checkpoint's sums that all ranks make together, just before they read it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ultramem_megatron.faults.integrity import DamagedCheckpointError, has_sums, verify, way_out
from ultramem_megatron.faults.shares import Share


def check_by_all(folder: Path) -> None:
    """Each rank checks its share of an iteration's files. Collective.

    One without sums is loaded; a line says that it was not checked. Raises DamagedCheckpointError
    on every rank, whichever found the damage, with the newest older iteration that is whole.
    """
    share, gather = _world()
    if not any(gather(has_sums(folder))):
        if share.rank == 0:
            print(f"{folder} has no sums: its files are read unchecked.", flush=True)
        return

    def check(one: Path) -> None:
        faults = [fault for fault in gather(_fault(one, share)) if fault is not None]
        if faults:
            raise DamagedCheckpointError(" ".join(dict.fromkeys(faults)))

    try:
        check(folder)
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"{error} {way_out(folder, check)}") from None


def _fault(folder: Path, share: Share) -> str | None:
    try:
        verify(folder, share)
    except DamagedCheckpointError as error:
        return str(error)
    return None


def _world() -> tuple[Share, Callable[[Any], list[Any]]]:
    """This rank's share, and a function that returns what each rank has given it."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return Share(), lambda mine: [mine]
    ranks = dist.get_world_size()

    def gather(mine: Any) -> list[Any]:
        everyone: list[Any] = [None] * ranks
        dist.all_gather_object(everyone, mine)
        return everyone

    return Share(dist.get_rank(), ranks), gather
