"""A checkpoint of FSDP2 is saved with its optimizer, and goes on where it was saved.

Upstream finds the state of a parameter by its local tensor, of which `to_local()` of newer torch
makes another object each time: nothing is found, and saving fails. To load, it has tensors filled
in place and leaves out both load_state_dict(): whatever is no tensor, Adam's count of steps above
all, starts anew, and nobody looks at what was loaded. Here both are called, with shards.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ultramem_megatron.patches.patch import Editor, Patch

_LOCAL = "megatron.core.dist_checkpointing.optimizer.to_local_if_dtensor"
_LOAD = "megatron.training.training.load_checkpoint"
_MODEL = (
    "megatron.core.distributed.torch_fully_sharded_data_parallel"
    ".TorchFullyShardedDataParallel.load_state_dict"
)
_OPTIMIZERS = tuple(
    f"megatron.core.optimizer.optimizer.{name}.load_state_dict"
    for name in ("Float16OptimizerWithFloat16Params", "FP32Optimizer")
)


def _kept_local(_original: Callable[..., Any]) -> Callable[..., Any]:
    def to_local_if_dtensor(tensor: Any) -> Any:
        return getattr(tensor, "_local_tensor", tensor)

    return to_local_if_dtensor


def _leaving_nothing_out(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_checkpoint(*args: Any, **settings: Any) -> Any:
        return load(*args, **{**settings, "skip_load_to_model_and_opt": False})

    return load_checkpoint


def _as_shard(loaded: Any, own: Any) -> Any:
    """`loaded` as this rank's shard of what `own` is, a DTensor; anything else as it is."""
    from torch.distributed.tensor import DTensor

    if not isinstance(own, DTensor) or not isinstance(loaded, torch.Tensor):
        return loaded
    if isinstance(loaded, DTensor) or loaded.shape != own._local_tensor.shape:
        return loaded
    return DTensor.from_local(
        loaded.detach(), own.device_mesh, own.placements, shape=own.shape, stride=own.stride()
    )


def _of_model(_original: Callable[..., Any]) -> Callable[..., Any]:
    def load_state_dict(self: Any, state_dict: Any, strict: bool = True) -> Any:
        own = self.module.state_dict()
        shards = {name: _as_shard(loaded, own.get(name)) for name, loaded in state_dict.items()}
        return self.module.load_state_dict(shards, strict=strict)

    return load_state_dict


def _of_optimizer(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_state_dict(self: Any, state_dict: Any) -> Any:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for number, state in state_dict.get("optimizer", state_dict)["state"].items():
            if isinstance(state, dict):  # beside them stands the count that all have in common
                state.update({k: _as_shard(v, parameters[number]) for k, v in state.items()})
        copies = state_dict.get("fp32_from_fp16_params", ())
        for own, saved in zip(getattr(self, "fp32_from_float16_groups", ()), copies, strict=False):
            saved[:] = [_as_shard(*both) for both in zip(saved, own, strict=True)]
        return load(self, state_dict)

    return load_state_dict


def _install(editor: Editor) -> None:
    editor.wrap(_LOCAL, _kept_local, ("tensor",))
    editor.wrap(_LOAD, _leaving_nothing_out)
    editor.wrap(_MODEL, _of_model, ("self", "state_dict", "strict"))
    for name in _OPTIMIZERS:
        editor.wrap(name, _of_optimizer, ("self", "state_dict"))


PATCH = Patch(
    name="defects.fsdp2_checkpoints",
    symbols=(_LOCAL, _LOAD, _MODEL, *_OPTIMIZERS),
    reason="The first compares by id(), the second is told to load neither model nor optimizer.",
    delete_when="A run with --use-torch-fsdp2 saves, and goes on with the same losses.",
    install=_install,
    versions=">=0.19",
)
