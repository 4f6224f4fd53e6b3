"""A machine with NVIDIA devices on which torch sees none: it would train on the CPU, slowly."""

import os
import sys
import warnings
from pathlib import Path

_FRAME = "*" * 100


def warn_of_unseen_gpus(devices: Path = Path("/dev")) -> None:
    """Say it on the first rank of a node, with torch's reason; nothing where GPUs are hidden.

    devices: the folder where the NVIDIA driver puts its device files. To be called before anything
    else asks torch for GPUs, which gives its reason once.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0" or _hidden_on_purpose():
        return
    found = sorted(path.name for path in devices.glob("nvidia[0-9]*"))
    reason = _why_unseen() if found else None
    if reason is None:
        return
    lines = (
        f"WARNING: {', '.join(found)} in {devices}, but torch sees no GPU: this is going to run on "
        f"the CPU.",
        f"  {reason}",
        "  Put that right (ultramem needs a driver as new as torch's CUDA), or set "
        "CUDA_VISIBLE_DEVICES= (to nothing) where the CPU is meant.",
    )
    print("\n".join((_FRAME, *lines, _FRAME)), file=sys.stderr, flush=True)


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
