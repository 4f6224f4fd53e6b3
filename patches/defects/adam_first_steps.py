"""The initial state of Adam has a count of steps (torch's Adam only).

To load a checkpoint, Megatron gives every parameter a state of zeros. It has the two moments and
not the count, which torch's Adam keeps beside them, and a count of 0 is not written: what has never
stepped neither saves nor loads then (KeyError: 'step').
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ultramem_megatron.patches.defects.distopt_initial_state import uses_torch_adam
from ultramem_megatron.patches.patch import Editor, Patch

_LOADS = tuple(
    f"megatron.core.optimizer.optimizer.{name}.load_state_dict"
    for name in ("Float16OptimizerWithFloat16Params", "FP32Optimizer")
)
_BUILD = "megatron.core.optimizer._get_megatron_optimizer_based_on_param_groups"


def _with_count(initialise: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(initialise)
    def init_state_fn(opt: Any, config: Any = None) -> None:
        initialise(opt, config)
        if isinstance(opt, torch.optim.Adam):
            for state in opt.state.values():
                state.setdefault("step", torch.tensor(0.0))

    return init_state_fn


def _built(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def build_optimizer(*args: Any, **kwargs: Any) -> Any:
        built = build(*args, **kwargs)
        if isinstance(built, tuple):  # not wrapped by Megatron's optimizers
            optimizer, initialise = built
            return optimizer, initialise and _with_count(initialise)
        if built.init_state_fn is not None:
            built.init_state_fn = _with_count(built.init_state_fn)
        return built

    return build_optimizer


def _loaded(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_state_dict(self: Any, state_dict: Any) -> Any:
        if isinstance(self.optimizer, torch.optim.Adam):
            # A count of 0 is not written. Upstream puts any other into all states after this.
            for state in state_dict.get("optimizer", state_dict)["state"].values():
                if isinstance(state, dict):
                    state.setdefault("step", torch.tensor(0.0))
        return load(self, state_dict)

    return load_state_dict


def _install(editor: Editor) -> None:
    for name in _LOADS:
        editor.wrap(name, _loaded, ("self", "state_dict"))
    editor.wrap(_BUILD, _built)


PATCH = Patch(
    name="defects.adam_first_steps",
    symbols=(_BUILD, *_LOADS),
    reason="init_state_fn is made within the first, and the others copy what they are given.",
    delete_when='init_state_fn sets "step" where Adam is torch\'s, and a step of 0 is saved.',
    install=_install,
    active=uses_torch_adam,
)
