"""Under Megatron-FSDP a model with gated MLPs is saved and loaded in float32, too.

Such an MLP's first weight is stored in two halves. Upstream looks it up by a name with one wrapper
more than a float32 model has, that of half precision, and finds nothing.
"""

import functools
from collections.abc import Callable
from typing import Any

from ultramem_megatron.patches.patch import Editor, Patch

_FUNCTION = "megatron.training.checkpointing.handle_swiglu_in_state_dict"


class _WithOrWithout:
    """A model whose parameters are found under a name with a wrapper too many as well."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Any:
        try:
            return self._model.get_parameter(name)
        except AttributeError:
            return self._model.get_parameter(name.removeprefix("module."))


def _found(split: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(split)
    def handle_swiglu_in_state_dict(
        model: Any, model_state_dict: Any, optimizer_state_dict: Any
    ) -> Any:
        return split(_WithOrWithout(model), model_state_dict, optimizer_state_dict)

    return handle_swiglu_in_state_dict


def _install(editor: Editor) -> None:
    editor.wrap(_FUNCTION, _found, ("model", "model_state_dict", "optimizer_state_dict"))


PATCH = Patch(
    name="defects.megatron_fsdp_gated_names",
    symbols=(_FUNCTION,),
    reason="The name is put together within the function.",
    delete_when="A GPT with --swiglu saves in float32 under --use-megatron-fsdp.",
    install=_install,
    versions=">=0.19",
)
