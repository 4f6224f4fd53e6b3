"""Sums of a checkpoint are made by the ranks that write, and checked by all ranks, not on one."""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ultramem_megatron.patches.patch import Editor, Patch

_MODULE = "megatron.core.dist_checkpointing"
_SAVE = f"{_MODULE}.save"
_VERIFY = f"{_MODULE}.serialization.verify_integrity_manifest"
_MANIFEST = f"{_MODULE}.serialization.save_integrity_manifest"
_WRITER = f"{_MODULE}.strategies.filesystem_async.FileSystemWriterAsync"
_FUNCTION, _FINISH = f"{_WRITER}.get_save_function_and_args", f"{_WRITER}.finish"

_wanted: ContextVar[bool] = ContextVar("sums are wanted of the save going on", default=False)
_gathered: dict[Path, dict[str, str]] = {}
"""On rank 0, sums of what was written to a folder, until its manifest is."""


def _verify(checkpoint_dir: str) -> None:
    from ultramem_megatron.faults.checked_by_all import check_by_all

    check_by_all(Path(checkpoint_dir))


def _write_manifest(checkpoint_dir: str) -> None:
    from ultramem_megatron.faults.manifest import write_sums

    folder = Path(checkpoint_dir)
    write_sums(folder, _gathered.pop(folder, {}))


def _knowing_whether_sums_are_wanted(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save(*args: Any, verify_integrity: bool = False, **kwargs: Any) -> Any:
        before = _wanted.set(verify_integrity)
        try:
            return original(*args, verify_integrity=verify_integrity, **kwargs)
        finally:
            _wanted.reset(before)

    return save


def _summing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_save_function_and_args(self: Any) -> Any:
        if not _wanted.get() or self.use_msc or not hasattr(self, "transforms"):
            return original(self)
        from ultramem_megatron.faults.written_sums import SummingTransforms, write_and_sum

        self.transforms = SummingTransforms(self.transforms)
        write, preload, arguments = original(self)
        # By name and with plain arguments: another process may call it, without patches.
        summing = functools.partial(write_and_sum, write, self.transforms)
        return (None if write is None else summing), preload, arguments

    return get_save_function_and_args


def _gathering(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def finish(self: Any, metadata: Any, results: Any) -> Any:
        from ultramem_megatron.faults.written_sums import sums_of

        _gathered.clear()  # of a save that failed after this
        _gathered[Path(self.checkpoint_dir)] = sums_of(results)
        return original(self, metadata, results)

    return finish


def _install(editor: Editor) -> None:
    editor.replace(_VERIFY, _verify, ("checkpoint_dir",))
    editor.replace(_MANIFEST, _write_manifest, ("checkpoint_dir",))
    editor.wrap(_SAVE, _knowing_whether_sums_are_wanted)
    editor.wrap(_FUNCTION, _summing, ("self",))
    editor.wrap(_FINISH, _gathering, ("self", "metadata", "results"))


PATCH = Patch(
    name="defects.checkpoint_sums",
    symbols=(_VERIFY, _MANIFEST, _SAVE, _FUNCTION, _FINISH),
    reason="Upstream reads and hashes the whole checkpoint on one thread of rank 0, in each save "
    "and in each load, there after it has read parts of the files.",
    delete_when="each rank of Megatron's sums what it writes, and checks a share before reading.",
    install=_install,
)
