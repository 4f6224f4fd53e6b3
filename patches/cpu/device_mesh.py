"""Device meshes of "cuda" are of the CPU: FSDP2 asks its mesh where parameters belong."""

import functools
from collections.abc import Callable
from typing import Any

from ultramem_megatron.patches.cpu.devices import host_device, without_cuda
from ultramem_megatron.patches.patch import Editor, Patch

_INIT = "torch.distributed.device_mesh.DeviceMesh.__init__"


def _on_the_host(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def init(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        original(self, str(host_device(device_type)), *args, **kwargs)

    return init


def _install(editor: Editor) -> None:
    editor.wrap(_INIT, _on_the_host)


PATCH = Patch(
    name="cpu.device_mesh",
    symbols=(_INIT,),
    reason='Megatron makes its meshes of "cuda"; FSDP2 then expects parameters on cuda:0.',
    delete_when="Megatron takes its device from one place that can be set to the CPU.",
    install=_install,
    active=without_cuda,
)
