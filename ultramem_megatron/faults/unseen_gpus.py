"""A machine with NVIDIA devices on which torch sees none: it would train on the CPU, slowly."""

import os
import sys
import warnings
from pathlib import Path

from ultramem_megatron.errors import UltraMemError

_FRAME = "*" * 100
_REMEDY = (
    "Put that right (ultramem needs a driver as new as torch's CUDA), or set "
    "CUDA_VISIBLE_DEVICES= (to nothing) where the CPU is meant."
)


def warn_of_unseen_gpus(devices: Path = Path("/dev")) -> None:
    """Say it on the first rank of a node, with torch's reason; nothing where GPUs are hidden.

    devices: the folder where the NVIDIA driver puts its device files. To be called before anything
    else asks torch for GPUs, which gives its reason once.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    found, reason = _unseen(devices)
    if reason is None:
        return
    lines = (
        f"WARNING: {found} in {devices}, but torch sees no GPU: this is going to run on the CPU.",
        f"  {reason}",
        f"  {_REMEDY}",
    )
    print("\n".join((_FRAME, *lines, _FRAME)), file=sys.stderr, flush=True)


def refuse_unseen_gpus(devices: Path = Path("/dev")) -> None:
    """For what is about GPUs alone. Raises UltraMemError where `warn_of_unseen_gpus` would warn."""
    found, reason = _unseen(devices)
    if reason is not None:
        raise UltraMemError(f"{found} in {devices}, but torch sees no GPU: {reason} {_REMEDY}")


def _unseen(devices: Path) -> tuple[str, str | None]:
    """Device files that are there, and why torch sees no GPU; None where nothing is amiss."""
    found = sorted(path.name for path in devices.glob("nvidia[0-9]*"))
    unseen = found and not _hidden_on_purpose()
    return ", ".join(found), _why_unseen() if unseen else None


def _hidden_on_purpose() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles")


def _why_unseen() -> str | None:
    """In torch's words; None where it sees a GPU."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA."
    words = [" ".join(str(warning.message).split()) for warning in said]
    return words[0] if words else f"torch {torch.__version__}, for CUDA {torch.version.cuda}."
