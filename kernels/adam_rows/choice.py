"""Which implementation brings rows up to date: the fastest that PyTorch's AdamW equals in each bit.

Which operations PyTorch's kernel rounds as one is for its compiler to decide, another one on other
processors. So ours are tried beside it, once in a process, before they are taken.
"""

import functools
import logging
import types

import torch
from torch import Tensor

from ultramem_megatron.kernels.adam_rows import native_path, torch_path
from ultramem_megatron.kernels.adam_rows.contract import Behind, Moments
from ultramem_megatron.kernels.adam_rows.history import AdamStep, History
from ultramem_megatron.kernels.dispatch import implementation

logger = logging.getLogger(__name__)

_BETAS = ((0.9, 0.95), (0.4, 0.999))
"""Tried in turn: PyTorch means moments in another way where half or more is new."""


def update(moments: Moments, rows: Tensor, behind: Behind, grad: Tensor | None = None) -> None:
    """As `torch_path.update`, by the implementation for these tensors."""
    _path(moments).update(moments, rows, behind, grad)


def _path(moments: Moments) -> types.ModuleType:
    device = moments.values.device
    chosen = implementation(device)
    if chosen == "native" and native_path.serves(moments) and agrees(native_path, device):
        return native_path
    if chosen == "triton" and moments.values.dtype == torch.float32:
        from ultramem_megatron.kernels.adam_rows import triton_path  # needs Triton installed

        if agrees(triton_path, device):
            return triton_path
    return torch_path


@functools.cache
def agrees(path: types.ModuleType, device: torch.device) -> bool:
    """Whether its bits are those of PyTorch's AdamW on this device, in a run of some steps."""
    found = [
        [tensor for betas in _BETAS for tensor in _tried(which, device, *betas)]
        for which in (path, torch_path)
    ]
    same = all(map(torch.equal, *found))
    if not same:
        logger.info("%s rounds otherwise than PyTorch's AdamW here, which serves", path.__name__)
    return same


def _tried(
    path: types.ModuleType, device: torch.device, beta1: float, beta2: float
) -> list[Tensor]:
    """A table and its moments after steps of changing rate in which rows have a gradient or not."""
    generator = torch.Generator().manual_seed(1)
    shape = (256, 64)
    values = torch.randn(shape, generator=generator).to(device)
    moments = Moments(values, torch.zeros_like(values), torch.zeros_like(values))
    current = torch.zeros(len(values), dtype=torch.int32, device=device)
    behind = Behind(current, History(device))
    for number in range(1, 13):
        behind.history.append(AdamStep(1e-3 * number, 0.1, beta1, beta2, 1e-8, number))
        rows = (torch.rand(len(values), generator=generator) < 0.3).nonzero().flatten().to(device)
        grad = torch.randn(shape, generator=generator).to(device)
        path.update(moments, rows, behind, grad)
    path.update(moments, torch.arange(len(values), device=device), behind)
    return list(moments[:3])
