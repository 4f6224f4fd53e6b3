"""The .metadata of a distributed checkpoint may name only what such a file consists of.

PyTorch unpickles it, and a pickle can call any function: a checkpoint from elsewhere could run what
it likes. Names are compared with a list before anything is imported. Tensors and objects in shards
are read with `weights_only=True` (`safe_objects`), everything else in a checkpoint is JSON.
"""

import functools
import importlib
import os
import pickle
from collections.abc import Callable
from dataclasses import is_dataclass
from enum import Enum
from typing import Any

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.patches.patch import Editor, Patch

_METHOD = "torch.distributed.checkpoint.filesystem.FileSystemReader.read_metadata"
_PACKAGE = "torch.distributed.checkpoint"
_MODULES = {f"{_PACKAGE}.{name}" for name in ("metadata", "planner", "filesystem")}
_SINGLE = {
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


class _Checker(pickle.Unpickler):
    """Builds records of torch.distributed.checkpoint, sizes, dtypes, paths; refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if is_dtype or (module, name) in _SINGLE or _is_record(module, name):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _is_record(module: str, name: str) -> bool:
    """Whether it names a data class or an enumeration that the module itself defines."""
    if module not in _MODULES:
        return False
    found = vars(importlib.import_module(module)).get(name)
    return (
        isinstance(found, type)
        and found.__module__ == module
        and (is_dataclass(found) or issubclass(found, Enum))
    )


def _files_outside(metadata: Any) -> list[str]:
    """What it names as its shards and is no file of its own folder."""
    named = {str(info.relative_path) for info in (metadata.storage_data or {}).values()}
    return sorted(path for path in named if os.path.basename(path) != path)


def _checked(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def read_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        path = self._get_metadata_path(kwargs.get("rank"))
        try:
            with self.fs.create_stream(path, "rb") as file:
                outside = _files_outside(_Checker(file).load())
        except FileNotFoundError:
            raise  # DCP asks for other names, too
        except Exception as error:  # a flipped bit ends in any of them
            outside = [f"{error}"]
        if outside:
            raise UltraMemError(
                f"{os.fspath(path)} is damaged, or more than the metadata of a checkpoint: "
                f"{outside[0]}. Nothing of it was run. Load checkpoints of a known origin."
            )
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
