"""Which implementation of a kernel runs: chosen once per process and device, logged, forceable."""

import functools
import logging
import os
from importlib.util import find_spec
from typing import Literal, cast, get_args

import torch

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.kernels.native.library import native_library

Implementation = Literal["triton", "native", "torch", "reference", "shapes"]

VARIABLE = "ULTRAMEM_KERNELS"

logger = logging.getLogger(__name__)


def implementation(device: torch.device) -> Implementation:
    """The implementation for tensors on `device`.

    Triton on NVIDIA GPUs; on CPUs compiled C++ where there is a compiler, PyTorch's own kernels
    elsewhere; shapes alone on the meta device. The environment variable ULTRAMEM_KERNELS (triton,
    native, torch or reference) forces one of the others; on a CPU `triton` needs Triton's
    interpreter (TRITON_INTERPRET=1). Raises UltraMemError for another value of the variable, and
    where what is chosen cannot be had.
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
    if forced == "native" and (device != "cpu" or native_library() is None):
        raise UltraMemError(
            f"{VARIABLE}=native was given, but the tensors are on {device}, or the kernels could "
            f"not be compiled (the log says why; CXX names the compiler). Unset {VARIABLE}."
        )
    chosen = cast(Implementation, forced) if forced else _default(device)
    if chosen == "triton" and find_spec("triton") is None:
        raise UltraMemError(
            f"Memory kernels on {device} need Triton, which is not installed here. Install it (the "
            f"PyTorch of Linux brings it), or set {VARIABLE}=torch, which is slow."
        )
    reason = f"{VARIABLE} is set" if forced else "the default there"
    logger.info("memory kernels on %s: %s (%s)", device, chosen, reason)
    return chosen


def _default(device: str) -> Implementation:
    if device == "cuda":
        return "triton"
    return "native" if device == "cpu" and native_library() is not None else "torch"
