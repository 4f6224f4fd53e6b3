"""Under Megatron-FSDP fp16's loss scale is undone in the shards that a rank has.

Upstream asks for the gradient of every parameter, of which an empty shard has none, and hands over
DTensors, which the kernel that undoes the scale does not know.
"""

import functools
from collections.abc import Callable
from typing import Any

from ultramem_megatron.patches.patch import Editor, Patch

_METHOD = (
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
    "._collect_main_grad_data_for_unscaling"
)


def _of_shards(collect: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collect)
    def _collect_main_grad_data_for_unscaling(self: Any) -> Any:
        if not self.ddp_config.use_megatron_fsdp:
            return collect(self)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        return [getattr(gradient, "_local_tensor", gradient).data for gradient in gradients]

    return _collect_main_grad_data_for_unscaling


def _install(editor: Editor) -> None:
    editor.wrap(_METHOD, _of_shards, ("self",))


PATCH = Patch(
    name="defects.megatron_fsdp_loss_scale",
    symbols=(_METHOD,),
    reason="The list is made within the method, of all parameters.",
    delete_when="A GPT trains with --fp16 under --use-megatron-fsdp.",
    install=_install,
    versions=">=0.19",
)
