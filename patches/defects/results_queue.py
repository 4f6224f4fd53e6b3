"""The process through which a save hands on its results ends with the rank that started it."""

import multiprocessing
from multiprocessing.managers import SyncManager
from typing import Any

from ultramem_megatron.faults.orphans import end_with_parent
from ultramem_megatron.patches.patch import Editor, Patch

_FUNCTION = "megatron.core.dist_checkpointing.strategies.filesystem_async.get_write_results_queue"


def _get_write_results_queue(mp_mode: str = "spawn") -> Any:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context(mp_mode))
        manager.start(initializer=end_with_parent)
        filesystem_async._results_queue = manager.Queue()
    return filesystem_async._results_queue


def _install(editor: Editor) -> None:
    editor.replace(_FUNCTION, _get_write_results_queue, ("mp_mode",))


PATCH = Patch(
    name="defects.results_queue",
    symbols=(_FUNCTION,),
    reason="Upstream's `ctx.Manager()` starts a process without an initializer: of a rank that is "
    "killed it stays behind, with 0.6 GB, after every restart.",
    delete_when="Megatron's manager ends with its rank, or a save needs none.",
    install=_install,
    versions=">=0.19,<0.20",
)
