"""The .metadata of a distributed checkpoint may name only what such a file consists of.

PyTorch unpickles it, and a pickle can call any function: a checkpoint from elsewhere could run what
it likes. Everything else in a checkpoint is read with `weights_only=True` or is JSON.
"""

import functools
import os
import pickle
from collections.abc import Callable
from typing import Any

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.patches.patch import Editor, Patch

_METHOD = "torch.distributed.checkpoint.filesystem.FileSystemReader.read_metadata"
_PACKAGE = "torch.distributed.checkpoint."
_SINGLE = {
    ("torch.serialization", "_get_layout"), ("torch", "Size"), ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"),
}  # fmt: skip


class _Checker(pickle.Unpickler):
    """Builds records of torch.distributed.checkpoint, sizes, dtypes, paths; refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if (module, name) in _SINGLE:
            return super().find_class(module, name)
        if module.startswith("torch") and "." not in name:  # a dot reaches into what was imported
            found = super().find_class(module, name)
            is_record = isinstance(found, type) and found.__module__.startswith(_PACKAGE)
            if is_record or isinstance(found, torch.dtype):
                return found
        raise pickle.UnpicklingError(f"{module}.{name}")


def _checked(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def read_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        path = self._get_metadata_path(kwargs.get("rank"))
        with self.fs.create_stream(path, "rb") as file:
            try:
                _Checker(file).load()
            except pickle.UnpicklingError as error:
                raise UltraMemError(
                    f"{os.fspath(path)} is damaged, or more than the metadata of a checkpoint: "
                    f"{error}. Nothing of it was run. Load checkpoints of a known origin."
                ) from None
        return original(self, *args, **kwargs)

    return read_metadata


def _install(editor: Editor) -> None:
    editor.wrap(_METHOD, _checked, ("self", "args", "kwargs"))


PATCH = Patch(
    name="defects.safe_metadata",
    symbols=(_METHOD,),
    reason="PyTorch has no hook for the unpickler of this file.",
    delete_when="PyTorch reads .metadata with a restricted unpickler, or not as a pickle.",
    install=_install,
)
