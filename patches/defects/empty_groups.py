"""A half-precision optimizer loads where a rank trains nothing of one of its groups.

Of lists of tensors a distributed checkpoint brings back those that hold some. A pipeline stage
without a memory has an optimizer of tables with nothing in it: upstream then misses the list of its
float32 weights (KeyError), and takes a list that lacks an empty group for that of the groups before
it. Here what came back is set against the groups that hold parameters.
"""

import functools
from collections.abc import Callable
from typing import Any

from ultramem_megatron.patches.patch import Editor, Patch

_METHOD = "megatron.core.optimizer.optimizer.Float16OptimizerWithFloat16Params.load_state_dict"
_KEY = "fp32_from_fp16_params"


def _with_empty_groups(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> Any:
        groups = self.fp32_from_float16_groups
        found = state_dict.get(_KEY, [])
        if len(found) < len(groups):
            filled = (
                iter(found[i] for i in sorted(found)) if isinstance(found, dict) else iter(found)
            )
            state_dict = {**state_dict, _KEY: [next(filled) if group else [] for group in groups]}
        return original(self, state_dict)

    return load_state_dict


def _install(editor: Editor) -> None:
    editor.wrap(_METHOD, _with_empty_groups, ("self", "state_dict"))


PATCH = Patch(
    name="defects.empty_groups",
    symbols=(_METHOD,),
    reason="What was loaded is handed to the method by load_checkpoint(), which takes no setting.",
    delete_when="load_state_dict() fits lists of float32 weights to groups without parameters.",
    install=_install,
)
