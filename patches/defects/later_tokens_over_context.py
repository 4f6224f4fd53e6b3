"""Losses of later tokens (--mtp-num-layers) under context parallelism, weighted as on one rank.

The last positions of a sequence have no later token. Upstream divides each context-parallel rank's
sum by that rank's own count, so that the tokens of the rank with the end of the sequence weigh
more. Here the count that a roll returns is the mean over these ranks, whose gradients are averaged.
"""

import functools
from collections.abc import Callable
from typing import Any

from ultramem_megatron.patches.patch import Editor, Patch

_FUNCTION = "megatron.core.transformer.multi_token_prediction.roll_tensor"


def _counted_together(roll: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(roll)
    def roll_tensor(
        tensor: Any,
        shifts: int = -1,
        dims: int = -1,
        cp_group: Any = None,
        packed_seq_params: Any = None,
    ) -> Any:
        import torch.distributed as dist

        rolled, count = roll(tensor, shifts, dims, cp_group, packed_seq_params)
        is_mask = rolled is not None and rolled.is_floating_point()
        if is_mask and cp_group is not None and cp_group.size() > 1:
            count = count / cp_group.size()
            dist.all_reduce(count, group=cp_group)
        return rolled, count

    return roll_tensor


def _install(editor: Editor) -> None:
    given = ("tensor", "shifts", "dims", "cp_group", "packed_seq_params")
    editor.wrap(_FUNCTION, _counted_together, given)


PATCH = Patch(
    name="defects.later_tokens_over_context",
    symbols=(_FUNCTION,),
    reason="process_mtp_loss() takes the number of tokens from there.",
    delete_when="A model with --mtp-num-layers has one rank's gradients with two of context.",
    install=_install,
    versions=">=0.19",
)
