"""After loading, every parameter has a step count of its own (torch's Adam only).

Upstream puts one tensor into the state of all parameters. torch's Adam adds 1 to it for each of
them, so one iteration counts as many, and training goes on with a wrong bias correction.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ultramem_megatron.patches.defects.distopt_initial_state import uses_torch_adam
from ultramem_megatron.patches.patch import Editor, Patch

_METHOD = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.load_state_dict"


def _own_steps(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: Any) -> Any:
        result = original(self, state_dict)
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
        return result

    return load_state_dict


def _install(editor: Editor) -> None:
    editor.wrap(_METHOD, _own_steps, ("self", "state_dict"))


PATCH = Patch(
    name="defects.distopt_shared_step",
    symbols=(_METHOD,),
    reason="The shared tensor is made and handed to torch inside the method.",
    delete_when="load_state_dict() gives each parameter its own tensor, as when offloading.",
    install=_install,
    active=uses_torch_adam,
)
