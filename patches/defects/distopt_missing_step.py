"""Loading a parameter's state leaves its step count alone (torch's Adam only).

torch's Adam keeps "step" beside the moments of every parameter, so upstream looks for it among
the loaded tensors. The fully reshardable format has none there (KeyError); the default format has
the count from before loading, which then overwrites the loaded one and restarts Adam's bias
correction without a word. `load_state_dict` has set the right count already.
"""

import functools
from collections.abc import Callable
from typing import Any

from ultramem_megatron.patches.defects.distopt_initial_state import uses_torch_adam
from ultramem_megatron.patches.patch import Editor, Patch

_METHOD = (
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
    "._set_main_param_and_optimizer_states"
)


def _without_step(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def set_main_param_and_optimizer_states(self: Any, model_param: Any, tensors: Any) -> Any:
        # Upstream skips what is not a tensor.
        return original(self, model_param, {**tensors, "step": None})

    return set_main_param_and_optimizer_states


def _install(editor: Editor) -> None:
    editor.wrap(_METHOD, _without_step, ("self", "model_param", "tensors"))


PATCH = Patch(
    name="defects.distopt_missing_step",
    symbols=(_METHOD,),
    reason="The method copies every entry of the optimizer's state; nothing can exclude one.",
    delete_when='The method skips "step", as the functions that call it do.',
    install=_install,
    active=uses_torch_adam,
)
