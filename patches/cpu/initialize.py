"""`pretrain()` may initialise Megatron without CUDA."""

import functools
from collections.abc import Callable
from typing import Any

from ultramem_megatron.patches.cpu.devices import without_cuda
from ultramem_megatron.patches.patch import Editor, Patch

_PARAMETERS = (
    "allow_no_cuda",
    "skip_mpu_initialization",
    "get_embedding_ranks",
    "get_position_embedding_ranks",
    "store",
    "skip_model_parallel_init",
    "seed_pp_group",
    "seed_dp_group",
    "seed_tp_group",
    "seed_ep_group",
    "seed_etp_group",
    "skip_random_seed",
)


def _allow_no_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        if args:
            return original(True, *args[1:], **kwargs)
        return original(**{**kwargs, "allow_no_cuda": True})

    return initialize_megatron


def _install(editor: Editor) -> None:
    # pretrain() reads the name from its own module, scripts from either of the others.
    for module in ("training.initialize", "training.training", "training"):
        editor.wrap(f"megatron.{module}.initialize_megatron", _allow_no_cuda, _PARAMETERS)


PATCH = Patch(
    name="cpu.initialize",
    symbols=("megatron.training.training.initialize_megatron",),
    reason="pretrain() calls initialize_megatron() without passing on its allow_no_cuda parameter.",
    delete_when="pretrain() accepts allow_no_cuda.",
    install=_install,
    active=without_cuda,
    versions=">=0.19",
)
