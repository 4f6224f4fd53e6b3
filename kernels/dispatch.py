"""Which implementation of a kernel runs: chosen once per process and device, logged, forceable."""

import functools
import logging
import os
from typing import Literal, cast, get_args

import torch

from ultramem_megatron.errors import UltraMemError

Implementation = Literal["triton", "torch", "reference", "shapes"]

VARIABLE = "ULTRAMEM_KERNELS"

logger = logging.getLogger(__name__)


def implementation(device: torch.device) -> Implementation:
    """The implementation for tensors on `device`.

    Triton on NVIDIA GPUs, PyTorch's own kernels elsewhere, shapes alone on the meta device. The
    environment variable ULTRAMEM_KERNELS (triton, torch or reference) forces one of the others; on
    a CPU `triton` needs Triton's interpreter (TRITON_INTERPRET=1). Raises UltraMemError for another
    value of the variable.
    """
    return _choose(device.type, os.environ.get(VARIABLE, ""))


@functools.cache
def _choose(device: str, forced: str) -> Implementation:
    if device == "meta":
        return "shapes"
    known = [name for name in get_args(Implementation) if name != "shapes"]
    if forced and forced not in known:
        raise UltraMemError(
            f"{VARIABLE}={forced} names no implementation of the kernels. Allowed: "
            f"{', '.join(known)}; unset it to choose by device."
        )
    if forced == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UltraMemError(
            f"{VARIABLE}=triton was given, but the tensors are on a CPU. Set TRITON_INTERPRET=1 as "
            f"well to run the kernels in Triton's interpreter (slow), or unset {VARIABLE}."
        )
    chosen = cast(Implementation, forced) if forced else ("triton" if device == "cuda" else "torch")
    reason = f"{VARIABLE} is set" if forced else "the default there"
    logger.info("memory kernels on %s: %s (%s)", device, chosen, reason)
    return chosen
