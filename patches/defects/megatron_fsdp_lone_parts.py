"""Under Megatron-FSDP what one rank alone has is divided by the data-parallel ranks once a step.

With `optim_grads` and `optim_grads_params` a gradient is divided and reduced with each micro-batch.
Where a group has one rank (experts over all data-parallel ranks, parts of value tables), it is
added up in place: what earlier micro-batches have left is divided once more with each one.
"""

import functools
from collections.abc import Callable
from typing import Any

from ultramem_megatron.patches.patch import Editor, Patch

_FSDP = "megatron.core.distributed.fsdp.src.megatron_fsdp"
_BUFFERS = f"{_FSDP}.param_and_grad_buffer.ParamAndGradBuffer._init_each_parameter_group_buffers"
_ATTACH = f"{_FSDP}.megatron_fsdp.MegatronFSDP.attach_grad_to_optimizer_state"


def _not_yet_divided(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def _init_each_parameter_group_buffers(self: Any, meta_device_init_fp8_params: Any) -> None:
        init(self, meta_device_init_fp8_params)
        self.divided_at_last = []
        if self.ddp_config.data_parallel_sharding_strategy not in (
            "optim_grads",
            "optim_grads_params",
        ):
            return
        for group in self.parameter_groups:
            buffer = group.main_grad_buffer
            if buffer is not None and not buffer.is_data_distributed:
                self.divided_at_last.append((buffer, buffer.gradient_scaling_factor))
                buffer.gradient_scaling_factor = None

    return _init_each_parameter_group_buffers


def _divided(attach: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(attach)
    def attach_grad_to_optimizer_state(self: Any) -> None:
        for buffer, factor in self.param_and_grad_buffer.divided_at_last:
            if factor is not None:
                buffer.data.mul_(factor)
        attach(self)

    return attach_grad_to_optimizer_state


def _install(editor: Editor) -> None:
    editor.wrap(_BUFFERS, _not_yet_divided, ("self", "meta_device_init_fp8_params"))
    editor.wrap(_ATTACH, _divided, ("self",))


PATCH = Patch(
    name="defects.megatron_fsdp_lone_parts",
    symbols=(_BUFFERS, _ATTACH),
    reason="A buffer that is not sharded is scaled in place with each micro-batch.",
    delete_when="Such a buffer is scaled once a step.",
    install=_install,
    versions=">=0.19",
)
