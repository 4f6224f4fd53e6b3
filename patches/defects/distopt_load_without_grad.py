"""The default checkpoint of the distributed optimizer loads into float32 parameters too.

A float32 parameter's main copy is a view of the parameter itself. Upstream copies the loaded
values into it with autograd on, which torch refuses; only bf16 and fp16 have main copies of their
own. The loaders of the other formats do turn autograd off.
"""

from collections.abc import Callable
from typing import Any

import torch

from ultramem_megatron.patches.patch import Editor, Patch

_METHOD = (
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
    ".load_parameter_state_from_dp_reshardable"
)


def _without_grad(original: Callable[..., Any]) -> Callable[..., Any]:
    return torch.no_grad()(original)


def _install(editor: Editor) -> None:
    editor.wrap(_METHOD, _without_grad, ("self", "state_dict"))


PATCH = Patch(
    name="defects.distopt_load_without_grad",
    symbols=(_METHOD,),
    reason="load_checkpoint() calls it with autograd on, and it takes no setting.",
    delete_when="The method bears @torch.no_grad(), as load_parameter_state_from_fs_model_space.",
    install=_install,
)
