"""Recomputation of norms and other modules without Transformer Engine."""

import importlib.util
from typing import Any

from ultramem_megatron.patches.patch import Editor, Patch

_INIT = "megatron.core.tensor_parallel.random.CheckpointWithoutOutput.__init__"


def _without_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is None


def _init(original: Any) -> Any:
    def init(self: Any, fp8: Any = None) -> None:
        original(self, fp8 or None)  # it takes False for yes

    return init


def _install(editor: Editor) -> None:
    editor.wrap(_INIT, _init, ("self", "fp8"))


PATCH = Patch(
    name="defects.recompute_without_engine",
    symbols=(_INIT,),
    reason="Its default fp8=False counts as fp8 (`fp8 is not None`), which names what only "
    "Transformer Engine has: NameError: FP8GlobalStateManager.",
    delete_when="fp8=False means no fp8.",
    install=_install,
    active=_without_engine,
    versions=">=0.17,<0.20",
)
