"""Megatron's dynamic batching where there is no CUDA: its cache is written by PyTorch.

A Triton kernel writes keys and values into their blocks; without it upstream's own fallback does.
"""

from ultramem_megatron.patches.cpu.devices import without_cuda
from ultramem_megatron.patches.patch import Editor, Patch

_APPEND = "megatron.core.inference.contexts.dynamic_context.triton_append_key_value_cache"


def _install(editor: Editor) -> None:
    editor.replace(_APPEND, None)


PATCH = Patch(
    name="cpu.dynamic_batching",
    symbols=(_APPEND,),
    reason="Dynamic batching writes its cache by a Triton kernel, which a CPU cannot run.",
    delete_when="Megatron's dynamic batching asks whether its tensors are on a GPU.",
    install=_install,
    active=without_cuda,
    versions=">=0.19",
)
