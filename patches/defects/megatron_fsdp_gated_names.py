"""Under Megatron-FSDP a model with gated MLPs is saved and loaded in float32, too.

Such an MLP's first weight is stored in two halves. Upstream looks it up by a name with one wrapper
more than a float32 model has, that of half precision, and finds nothing. With `no_shard` it asks
weights that are whole on every rank where their shards lie.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

from ultramem_megatron.patches.patch import Editor, Patch

_FUNCTION = "megatron.training.checkpointing.handle_swiglu_in_state_dict"


_GATED = re.compile(
    r"\.mlp\.(shared_experts\.|experts\.|experts\.local_experts\.\d+\.)?linear_fc1\.(weight|bias)\d*$"
)


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
        named = _WithOrWithout(model)
        gated = [name for name in model_state_dict if _GATED.search(name)]
        if any(hasattr(named.get_parameter(f"module.{n}"), "megatron_fsdp_slice") for n in gated):
            return split(named, model_state_dict, optimizer_state_dict)
        if optimizer_state_dict is not None:
            state = _halved(optimizer_state_dict["state"])
            optimizer_state_dict = {**optimizer_state_dict, "state": state}
        return _halved(model_state_dict), optimizer_state_dict

    return handle_swiglu_in_state_dict


def _halved(state: dict[str, Any]) -> dict[str, Any]:
    """With two entries for each gated one; what is read into them lands in it."""
    made: dict[str, Any] = {}
    for name, entry in state.items():
        if not _GATED.search(name):
            made[name] = entry
            continue
        for number, half in enumerate(("_w", "_v")):
            made[name + half] = _half(entry, number)
    return made


def _half(entry: Any, number: int) -> Any:
    """Of a weight, or of those of an optimizer's state that are of its size."""
    from torch.distributed.tensor import DTensor

    if isinstance(entry, dict):
        return {key: _half(value, number) for key, value in entry.items()}
    if not isinstance(entry, DTensor):
        return entry
    return DTensor.from_local(
        entry._local_tensor.chunk(2)[number],
        entry.device_mesh,
        entry.placements,
        shape=(entry.shape[0] // 2, *entry.shape[1:]),  # type: ignore[arg-type]  # a tuple is taken
        stride=entry.stride(),
    )


def _install(editor: Editor) -> None:
    editor.wrap(_FUNCTION, _found, ("model", "model_state_dict", "optimizer_state_dict"))


PATCH = Patch(
    name="defects.megatron_fsdp_gated_names",
    symbols=(_FUNCTION,),
    reason="The name is put together within the function.",
    delete_when="A GPT with --swiglu saves in float32 under --use-megatron-fsdp, also no_shard.",
    install=_install,
    versions=">=0.19",
)
