"""AdamW on rows by native.cpp: each row is read and written once, whatever it has missed."""

import torch
from torch import Tensor

from ultramem_megatron.kernels.adam_rows.contract import Behind, Moments
from ultramem_megatron.kernels.adam_rows.history import SLOTS
from ultramem_megatron.kernels.native.library import call_native


def serves(moments: Moments) -> bool:
    """Whether native.cpp knows these dtypes."""
    copy = moments.copy
    return moments.values.dtype == torch.float32 and (copy is None or copy.dtype == torch.bfloat16)


def update(moments: Moments, rows: Tensor, behind: Behind, grad: Tensor | None = None) -> None:
    """As `torch_path.update`; rows must be there."""
    current, history = behind
    tensors = (*moments[:3], grad, moments.copy)
    assert all(part is None or part.is_contiguous() for part in tensors)
    sizes = (SLOTS, history.count, rows.numel(), moments.values.shape[1])
    call_native("adam_rows", *tensors, rows.contiguous(), current, history.numbers, *sizes)
