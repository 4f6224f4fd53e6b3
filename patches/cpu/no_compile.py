"""torch.compile runs functions as they are written where there is no CUDA.

Megatron compiles its small fused functions at import. On a CPU that would start a C++ compiler in
every process for no gain. `torch.compiler.set_stance` also reaches what is compiled already.
"""

import torch

from ultramem_megatron.patches.cpu.devices import without_cuda
from ultramem_megatron.patches.patch import Editor, Patch


def _install(editor: Editor) -> None:
    stance = torch.compiler.set_stance("force_eager")
    editor.on_revert(lambda: stance.__exit__(None, None, None))


PATCH = Patch(
    name="cpu.no_compile",
    symbols=("torch.compile, through torch.compiler.set_stance",),
    reason="megatron.core.jit decides at import and offers no setting that comes early enough.",
    delete_when="megatron.core.jit leaves functions alone where there is no CUDA.",
    install=_install,
    active=without_cuda,
)
