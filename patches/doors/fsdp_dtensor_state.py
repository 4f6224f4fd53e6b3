"""Door: what a checkpoint in fsdp_dtensor holds, changed before it is written or read."""

import functools
from collections.abc import Callable
from typing import Any

from ultramem_megatron.patches.patch import Editor, Patch

changes: list[Callable[[dict[str, Any], Any], dict[str, Any]]] = []
"""Called with the state and the first model chunk; what they return is written, or read into."""

_FUNCTION = "megatron.training.checkpointing.preprocess_fsdp_dtensor_state_dict"


def _changed(preprocess: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(preprocess)
    def preprocess_fsdp_dtensor_state_dict(args: Any, raw_state_dict: Any, model: Any) -> Any:
        state = preprocess(args, raw_state_dict, model)
        for change in changes:
            state = change(state, model)
        return state

    return preprocess_fsdp_dtensor_state_dict


def _install(editor: Editor) -> None:
    editor.wrap(_FUNCTION, _changed, ("args", "raw_state_dict", "model"))


PATCH = Patch(
    name="doors.fsdp_dtensor_state",
    symbols=(_FUNCTION,),
    reason="A parameter cannot say where it lies in a larger tensor.",
    delete_when="Modules are asked for a sharded_state_dict() in this format as well.",
    install=_install,
    versions=">=0.19",
)
