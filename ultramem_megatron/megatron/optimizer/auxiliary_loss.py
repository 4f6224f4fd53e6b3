"""The auxiliary loss of memories (paper eq. 11-12: of the Tucker cores), exactly once per step.

It depends on parameters only, so it needs no forward pass. Its gradient is added after Megatron has
finished the gradients of a step (reduced them over ranks, averaged them, divided them by tokens)
and before they are clipped: neither micro-batches, nor data-parallel ranks, nor per-token loss
change its weight, and the loss scale of fp16 is applied to it as to all others.
"""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.utils import get_model_config

from ultramem_megatron.kernels.precision import at_least_float32
from ultramem_megatron.megatron.fsdp2 import Unit, gathered, like, units
from ultramem_megatron.megatron.megatron_fsdp import cut_layers
from ultramem_megatron.megatron.optimizer.host_gradients import complete_gradients
from ultramem_megatron.memory.layer import UltraMemLayer, memory_layers


def finalize_with_auxiliary_loss(model: list[Any], *args: Any, **kwargs: Any) -> None:
    """Megatron's finalize_model_grads, then what every memory layer of `model` does once a step.

    That is the gradient of its auxiliary loss, and its running mean (UltraMemLayer.end_batch).

    Set as `finalize_model_grads_func` of the model config by UltraMemGPTModelBuilder; a recipe
    with a training loop of its own sets it itself.
    """
    finalize_then_auxiliary_loss(finalize_model_grads, model, *args, **kwargs)


def finalize_then_auxiliary_loss(
    finalize: Callable[..., None], model: list[Any], *args: Any, **kwargs: Any
) -> None:
    """The same after a `finalize` of the caller's own."""
    finalize(model, *args, **kwargs)
    complete_gradients(model)
    loss_scale = _loss_scale(get_model_config(model[0]))
    for chunk in model:
        add_auxiliary_gradients(memory_layers(chunk), loss_scale, units(chunk) | cut_layers(chunk))
        for layer in memory_layers(chunk):
            layer.end_batch()


def add_auxiliary_gradients(
    layers: Iterable[UltraMemLayer],
    loss_scale: float,
    units: Mapping[UltraMemLayer, Unit] = MappingProxyType({}),
) -> None:
    """Add loss_scale * d(auxiliary loss)/d(parameter) to each main_grad (or grad).

    units: of those layers whose weights are in shards.
    """
    for layer in layers:
        with gathered(units.get(layer)):
            gradients = _gradients(layer)
        for name, gradient in gradients.items():
            _add(layer.retrieval.get_parameter(name), at_least_float32(gradient) * loss_scale)


def _gradients(layer: UltraMemLayer) -> dict[str, torch.Tensor]:
    """Of the auxiliary loss, by the names of the retrieval's parameters that it moves."""
    with torch.enable_grad():
        loss = layer.auxiliary_loss()
    if loss is None or not loss.requires_grad:
        return {}
    trained = {n: p for n, p in layer.retrieval.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {n: g for n, g in zip(trained, gradients, strict=True) if g is not None}


def _add(parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
    target = getattr(parameter, "main_grad", None)
    if target is None:
        target = parameter if parameter.grad is None else parameter.grad
    # Scaled before the cast: too large a loss scale must show as infinity, and skip the step.
    share = like(parameter, gradient.to(target.dtype))
    if not getattr(share, "_local_tensor", share).numel():
        return  # more ranks than rows: no gradient here
    if target is parameter:
        parameter.grad = torch.zeros_like(parameter)
        target = parameter.grad
    target.add_(share)


def _loss_scale(config: Any) -> float:
    if config.grad_scale_func is None:
        return 1.0
    return float(config.grad_scale_func(torch.ones(())))
