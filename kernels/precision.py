"""In which dtype scores are computed, whatever dtype the model computes in."""

import functools

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is already: what scores are combined and compared in."""
    return x if x.dtype == torch.float64 else x.float()


def as_multiplied(x: Tensor) -> Tensor:
    """x in the dtype in which its device multiplies matrices: its own, where that is fast.

    Half precision without instructions for it takes a CPU longer than float32.
    """
    if x.device.type != "cpu" or (x.dtype == torch.bfloat16 and _cpu_multiplies_bfloat16()):
        return x
    return at_least_float32(x)


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    if not hasattr(torch.cpu, "get_capabilities"):  # an older PyTorch cannot say
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
