"""A process in which Megatron runs on the CPU: patches applied, NCCL read as gloo."""

import functools
import importlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed
from torch.distributed import ProcessGroupGloo

from ultramem_megatron.patches import registry

_PRELOADED = (
    "megatron.core.dist_checkpointing",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.tokenizers.text",
    "megatron.training.argument_utils",
    "megatron.training.checkpointing",
    "ultramem_megatron.training.pretrain",
)
"""What ranks find imported, each of them being a fork of one process."""


def prepare() -> None:
    """Apply what `ultramem train` applies, and what its flag --distributed-backend gloo does."""
    registry.apply_all()
    c10d: Any = torch.distributed.distributed_c10d
    c10d.ProcessGroupGloo = OneDeviceGloo
    for name in ("init_process_group", "new_group"):
        over_gloo = _over_gloo(getattr(torch.distributed, name))
        for module in (torch.distributed, c10d):
            setattr(module, name, over_gloo)
    for name in _PRELOADED:
        importlib.import_module(name)


class OneDeviceGloo(ProcessGroupGloo):
    """Groups of gloo that share one device, which is made in the process that first needs it.

    Else each has its own, whose thread wakes a hundred times a second. Upstream's tests forget
    groups by the hundred and destroy none, so that ranks would soon do nothing else.
    """

    def __init__(
        self,
        store: torch.distributed.Store,
        rank: int,
        size: int,
        timeout: timedelta = torch.distributed.constants.default_pg_timeout,
        **more: Any,
    ) -> None:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # no stub has it
        options._devices = [_device()]
        options._timeout = timeout
        for name, value in more.items():
            setattr(options, name, value)
        super().__init__(store, rank, size, options)


@functools.cache
def _device() -> Any:
    return ProcessGroupGloo.create_device(interface="lo")


def _over_gloo(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def start(*args: Any, **kwargs: Any) -> Any:
        args = tuple("gloo" if arg == "nccl" else arg for arg in args)
        if "nccl" in str(kwargs.get("backend")):
            kwargs["backend"] = kwargs["backend"].replace("nccl", "gloo")
        kwargs.pop("pg_options", None)  # NCCL's
        kwargs.pop("device_id", None)  # a GPU
        return original(*args, **kwargs)

    return start
