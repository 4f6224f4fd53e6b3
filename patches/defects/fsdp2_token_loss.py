"""Under FSDP2 a loss per token divides gradients by the tokens of all ranks.

FSDP2 gives the mean of the ranks' gradients. With --calculate-per-token-loss each is a sum over
tokens, and Megatron then asks its wrapper to divide by their number; the one of FSDP2 inherits a
method that does nothing. Gradients are as many times too large as a rank has tokens, and clipped.
"""

from collections.abc import Callable
from typing import Any

from ultramem_megatron.patches.patch import Editor, Patch

_METHOD = (
    "megatron.core.distributed.torch_fully_sharded_data_parallel"
    ".TorchFullyShardedDataParallel.scale_gradients"
)


def _scaled(_original: Callable[..., None]) -> Callable[..., None]:
    def scale_gradients(self: Any, scaling_factor: Any) -> None:
        """scaling_factor: of the sum over ranks, a number or a tensor."""
        factor = scaling_factor * self.process_group.size()
        for parameter in self.parameters():
            if parameter.grad is not None:
                getattr(parameter.grad, "_local_tensor", parameter.grad).mul_(factor)

    return scale_gradients


def _install(editor: Editor) -> None:
    editor.wrap(_METHOD, _scaled, ("self", "scaling_factor"))


PATCH = Patch(
    name="defects.fsdp2_token_loss",
    symbols=(_METHOD,),
    reason="_BaseDataParallel.scale_gradients() is empty, and only DDP has one of its own.",
    delete_when="TorchFullyShardedDataParallel scales its gradients.",
    install=_install,
    versions=">=0.19",
)
