"""--async-save without CUDA: a save is written by a fork of the rank, as it was at that moment."""

from ultramem_megatron.patches.cpu.devices import without_cuda
from ultramem_megatron.patches.patch import Editor, Patch

_FUNCTION = "megatron.training.initialize.init_persistent_async_worker"


def _fork_at_each_save(rank: int, mp_mode: str = "spawn") -> None:
    """In the place of a worker that stays: the next step leaves a fork's memory alone."""
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
    from megatron.training import async_utils

    async_utils._async_calls_queue = AsyncCallsQueue(persistent=False)


def _install(editor: Editor) -> None:
    editor.replace(_FUNCTION, _fork_at_each_save, ("rank", "mp_mode"))


PATCH = Patch(
    name="cpu.background_saves",
    symbols=(_FUNCTION,),
    reason="The persistent worker asks for a GPU's number, and is given a CPU's tensors in shared "
    "memory: it would write what the next step makes of them.",
    delete_when="Megatron's worker copies tensors of a CPU before training goes on.",
    install=_install,
    active=without_cuda,
    versions=">=0.19",
)
