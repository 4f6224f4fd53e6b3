"""Tensors of a parallel run without the cuts of FSDP: whole, but for what other ranks have anyway.

Parts of value tables and tensor-parallel shards stay what they are; see whole_model.py.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def whole_tensors(model: Iterable[Any], of: Callable[[Any], Tensor | None]) -> dict[str, Tensor]:
    """`of` each parameter of this rank's model chunks, copied, by its local name; a collective.

    A second chunk's names start with "1.". What is None is left out.
    """
    found: dict[str, Tensor] = {}
    for index, chunk in enumerate(model):
        if hasattr(chunk, "stop_communication"):  # Megatron-FSDP's wrapper
            chunk.module._replace_param_with_distributed_if_needed()
        for name, parameter in chunk.named_parameters():
            whole = _whole(parameter, of(parameter))
            if whole is not None:
                found[f"{index}.{name}" if index else name] = whole.detach().clone()
    return found


def _whole(parameter: Any, value: Any) -> Tensor | None:
    if hasattr(parameter, "orig_param"):
        return _whole_of_flat(parameter, value)
    return value.full_tensor() if isinstance(value, DTensor) else value


def _whole_of_flat(parameter: Any, value: Any) -> Tensor | None:
    """Of Megatron-FSDP, which cuts flat buffers: a rank without a number of it has None."""
    if value is None and not parameter.requires_grad:
        return None
    flat = getattr(parameter, "megatron_fsdp_slice", None)
    if flat is None:  # no_shard
        local: Tensor = value._local_tensor
        return local
    whole = torch.zeros(parameter.orig_param.numel(), device=parameter.device)
    if value is not None:
        whole[flat] = value._local_tensor.detach().flatten().float()
    dist.all_reduce(whole, group=parameter.device_mesh.get_group(0))
    return whole.view(parameter.orig_param.shape)
