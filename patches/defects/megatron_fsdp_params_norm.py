"""Under Megatron-FSDP --log-params-norm counts what other ranks have of experts and value tables.

Upstream sums up over the ranks that share a parameter in shards: each rank logs a norm with its own
experts (or parts of tables) alone.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from ultramem_megatron.patches.patch import Editor, Patch

_FUNCTION = "megatron.training.utils.common_utils.calc_dtensor_params_l2_norm"


def _over_all_parts(norm: Callable[..., float]) -> Callable[..., float]:
    @functools.wraps(norm)
    def calc_dtensor_params_l2_norm(params: Sequence[Any]) -> float:
        import torch
        import torch.distributed as dist
        from megatron.core import parallel_state

        parts = [p for p in params if not getattr(p, "allreduce", True)]
        others = [p for p in params if getattr(p, "allreduce", True)]
        of_parts = torch.tensor([norm(parts) ** 2], dtype=torch.float32, device="cuda")
        dist.all_reduce(of_parts, group=parallel_state.get_expert_model_parallel_group())
        total: float = (norm(others) ** 2 + of_parts.item()) ** 0.5
        return total

    return calc_dtensor_params_l2_norm


def _install(editor: Editor) -> None:
    editor.wrap(_FUNCTION, _over_all_parts, ("params",))


PATCH = Patch(
    name="defects.megatron_fsdp_params_norm",
    symbols=(_FUNCTION,),
    reason="The norm is summed up over the meshes of shards, which have no expert-parallel ranks.",
    delete_when="--log-params-norm is the same with --expert-model-parallel-size 1 and 2.",
    install=_install,
    versions=">=0.19",
)
