"""Adam takes one pass over parameters, gradients and moments; clipping makes no copies.

As built, torch's Adam on a CPU makes seven passes, on a GPU several and a copy as large as all
second moments, and clipping copies every gradient: for a model with tables that is a fifth of a
step on a CPU and, on one H200, half of what the memories took. Results are the same to rounding.

The kernel for GPUs reads the number of steps on the GPU. It is made on the CPU, and comes there
from checkpoints, where Adam was not fused; so it is moved, for torch does not.
"""

from collections.abc import Callable
from typing import Any

import torch

from ultramem_megatron.patches.defects.distopt_initial_state import uses_torch_adam
from ultramem_megatron.patches.patch import Editor, Patch

_BUILD = "megatron.core.optimizer._get_megatron_optimizer_based_on_param_groups"
_SCALE = "megatron.core.optimizer.clip_grads.multi_tensor_scale_impl"
_DEVICES = ("cpu", "cuda")


def _fused(build: Callable[..., Any]) -> Callable[..., Any]:
    def get_optimizer(*args: Any, **kwargs: Any) -> Any:
        built = build(*args, **kwargs)
        inner = built[0] if isinstance(built, tuple) else getattr(built, "optimizer", None)
        if isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
            inner.register_step_pre_hook(ask_for_one_pass)
        return built

    return get_optimizer


def ask_for_one_pass(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Before each step, as a group that was loaded has what was saved."""
    for group in optimizer.param_groups:
        if group.get("fused") is None:
            group["fused"] = all(map(_has_a_kernel, group["params"]))
        if group["fused"]:
            for parameter in group["params"]:
                _count_where_it_is(parameter, optimizer.state.get(parameter, {}))


def _has_a_kernel(parameter: torch.Tensor) -> bool:
    return parameter.device.type in _DEVICES and parameter.is_floating_point()


def _count_where_it_is(parameter: torch.Tensor, state: dict[str, Any]) -> None:
    steps = state.get("step")
    if isinstance(steps, torch.Tensor) and steps.device != parameter.device:
        state["step"] = steps.to(parameter.device, torch.float32)


def _scale_in_place(
    chunk_size: int, noop_flag: Any, tensor_lists: list[list[torch.Tensor]], scale: float
) -> None:
    for source, target in zip(*tensor_lists, strict=True):
        torch.mul(source, scale, out=target)


def _install(editor: Editor) -> None:
    editor.wrap(_BUILD, _fused)
    parameters = ("chunk_size", "noop_flag", "tensor_lists", "scale")
    editor.replace(_SCALE, _scale_in_place, parameters)


PATCH = Patch(
    name="defects.fused_adam",
    symbols=(_BUILD, _SCALE),
    reason="`adam_cls(**kwargs)` in megatron/core/optimizer/__init__.py passes no `fused`, and "
    "`local_multi_tensor_scale` in megatron/core/utils.py writes `dst.copy_(src * scale)`.",
    delete_when="Megatron asks PyTorch's Adam to be fused, and scales in place.",
    install=_install,
    active=uses_torch_adam,
)
