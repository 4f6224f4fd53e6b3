"""Room for a shard of a checkpoint that another rank reads is made on the CPU.

`ShardedTensor.init_data` keeps `torch.empty` as a default from when Megatron was imported, which
may be before the constructors were replaced (devices.py).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ultramem_megatron.patches.cpu.devices import host_device, without_cuda
from ultramem_megatron.patches.patch import Editor, Patch

_INIT = "megatron.core.dist_checkpointing.mapping.ShardedTensor.init_data"


def _on_host(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init_data(self: Any, device: Any, init_fn: Callable[..., Any] = torch.empty) -> None:
        original(self, host_device(device), init_fn)

    return init_data


def _install(editor: Editor) -> None:
    editor.wrap(_INIT, _on_host, ("self", "device", "init_fn"))


PATCH = Patch(
    name="cpu.loaded_shards",
    symbols=(_INIT,),
    reason='A fully parallel load makes room for what other ranks read by init_data("cuda").',
    delete_when="Megatron takes its device from one place that can be set to the CPU.",
    install=_install,
    active=without_cuda,
)
