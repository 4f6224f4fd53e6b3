"""The distributed optimizer can be asked for its state before it holds any (torch's Adam only).

`state_dict()` reads the number of steps from the state of some parameter. Before the first step,
when a checkpoint is loaded, no parameter has one, and on a rank whose shard is empty none ever
will: upstream fails on an assertion. Here the steps are counted and stand in where the state is
empty. The count matters on such a rank too: the one number in a checkpoint is written by rank 0.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ultramem_megatron.patches.patch import Editor, Patch

_CLASS = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
_STEPS = "_ultramem_num_steps"
_STAND_IN = "ultramem step count"


def uses_torch_adam() -> bool:
    """Whether Megatron found neither Transformer Engine nor Apex and falls back to torch's Adam."""
    from megatron.core.optimizer import distrib_optimizer

    return not distrib_optimizer.HAVE_APEX_OR_TE


def _state_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def state_dict(self: Any) -> Any:
        state = self.optimizer.state
        if state:
            return original(self)
        # Keys that are no tensors pass through torch's optimizers; upstream drops the state itself.
        state[_STAND_IN] = {"step": torch.tensor(float(getattr(self, _STEPS, 0)))}
        try:
            return original(self)
        finally:
            del state[_STAND_IN]

    return state_dict


def _load_state_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: Any) -> Any:
        for group in state_dict.get("optimizer", {}).get("param_groups", ()):
            setattr(self, _STEPS, int(group["step"]))
        return original(self, state_dict)

    return load_state_dict


def _step_with_ready_grads(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def step_with_ready_grads(self: Any) -> Any:
        setattr(self, _STEPS, getattr(self, _STEPS, 0) + 1)
        return original(self)

    return step_with_ready_grads


def _install(editor: Editor) -> None:
    editor.wrap(f"{_CLASS}.state_dict", _state_dict, ("self",))
    editor.wrap(f"{_CLASS}.load_state_dict", _load_state_dict, ("self", "state_dict"))
    editor.wrap(f"{_CLASS}.step_with_ready_grads", _step_with_ready_grads, ("self",))


PATCH = Patch(
    name="defects.distopt_initial_state",
    symbols=(f"{_CLASS}.state_dict",),
    reason="The assertion `len(steps) == 1` sits in the middle of the method.",
    delete_when="state_dict() works for an optimizer without state and HAVE_APEX_OR_TE false.",
    install=_install,
    active=uses_torch_adam,
)
