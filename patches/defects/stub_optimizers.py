"""A run that trains value tables alone can save, and loses no loss scale to what is frozen.

Dense parameters and tables (or experts) have an optimizer each. Where all of the dense ones are
frozen theirs is a stub around None, which upstream asks for its parameter groups when it saves
(AttributeError). Parameter groups are agreed on by all ranks, so a stub is one on every rank.
"""

import functools
from collections.abc import Callable
from typing import Any

from ultramem_megatron.patches.patch import Editor, Patch

_METHOD = "megatron.core.optimizer.optimizer.ChainedOptimizer.__init__"


def _without_stubs(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __init__(self: Any, chained_optimizers: list[Any]) -> None:  # noqa: N807 - it is patched
        trained = [
            one for one in chained_optimizers if not getattr(one, "is_stub_optimizer", False)
        ]
        original(self, trained or chained_optimizers)

    return __init__


def _install(editor: Editor) -> None:
    editor.wrap(_METHOD, _without_stubs, ("self", "chained_optimizers"))


PATCH = Patch(
    name="defects.stub_optimizers",
    symbols=(_METHOD,),
    reason="get_megatron_optimizer() chains the optimizers itself and takes no others.",
    delete_when="ChainedOptimizer saves and loads with stubs among its optimizers.",
    install=_install,
)
