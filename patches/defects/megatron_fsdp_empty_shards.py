"""Under Megatron-FSDP all ranks have states of all parameters, in one order (torch's Adam only).

Where more ranks than rows cut a parameter, some have nothing of it, and Adam no state for it.
Saving and loading ask all ranks about each state, one by one, and wait for ever for those ranks.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ultramem_megatron.patches.defects.distopt_initial_state import uses_torch_adam
from ultramem_megatron.patches.patch import Editor, Patch

_METHOD = (
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
    ".sharded_param_state_fsdp_dtensor"
)


def _complete(optimizer: torch.optim.Optimizer) -> None:
    steps = [state["step"] for state in optimizer.state.values() if "step" in state]
    step = steps[0] if steps else torch.tensor(0.0)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad and not optimizer.state.get(parameter):
                optimizer.state[parameter] = {
                    "step": step.clone(),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _of_all(make_state: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make_state)
    def sharded_param_state_fsdp_dtensor(self: Any, is_loading: bool = False) -> Any:
        if is_loading:
            self._init_optimizer_states_with_dummy_values()
        if isinstance(self.optimizer, torch.optim.Adam):
            _complete(self.optimizer)
        made = make_state(self)
        made["state"] = {name: made["state"][name] for name in sorted(made["state"])}
        return made

    return sharded_param_state_fsdp_dtensor


def _install(editor: Editor) -> None:
    editor.wrap(_METHOD, _of_all, ("self", "is_loading"))


PATCH = Patch(
    name="defects.megatron_fsdp_empty_shards",
    symbols=(_METHOD,),
    reason="Adam has states of what had a gradient, in the order of the first gradients.",
    delete_when="A plain GPT saves with optim_grads_params and without Transformer Engine.",
    install=_install,
    active=uses_torch_adam,
    versions=">=0.19",
)
