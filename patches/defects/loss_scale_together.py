"""Under fp16 the loss scales of dense parameters and of tables or experts change together.

Upstream gives each of the chained optimizers a dynamic loss scale of its own, which follows the
overflows of its own gradients. The loss is multiplied by the first one's: after an overflow in one
of them alone the others divide by another number, and their gradients are wrong by a power of two.
"""

import functools
from collections.abc import Callable
from typing import Any

from ultramem_megatron.patches.patch import Editor, Patch

_METHOD = "megatron.core.optimizer.optimizer.ChainedOptimizer.prepare_grads"


def _later(found_inf: bool) -> None:
    """Takes the place of a scaler's `update` until all gradients are checked."""


def _together(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def prepare_grads(self: Any) -> bool:
        optimizers = [one for one in self.chained_optimizers if getattr(one, "grad_scaler", None)]
        scalers = list({id(one.grad_scaler): one.grad_scaler for one in optimizers}.values())
        for scaler in scalers:
            scaler.update = _later
        try:
            found_inf: bool = original(self)
        finally:
            for scaler in scalers:
                del scaler.update
        for scaler in scalers:
            scaler.update(found_inf)
        return found_inf

    return prepare_grads


def _install(editor: Editor) -> None:
    editor.wrap(_METHOD, _together, ("self",))


PATCH = Patch(
    name="defects.loss_scale_together",
    symbols=(_METHOD,),
    reason="Each optimizer updates its scale inside its own prepare_grads().",
    delete_when="ChainedOptimizer updates the scales of all from one flag.",
    install=_install,
)
