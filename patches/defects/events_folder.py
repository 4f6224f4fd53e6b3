"""A TensorBoard folder that vanishes is made again: a log must not end a training."""

import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ultramem_megatron.patches.patch import Editor, Patch

_FUNCTION = "tensorboard.compat.tensorflow_stub.io.gfile.LocalFileSystem._write"


def _made_again(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def _write(self: Any, filename: Any, file_content: Any, mode: str) -> None:
        try:
            original(self, filename, file_content, mode)
        except FileNotFoundError:
            folder = Path(os.fsdecode(filename)).parent
            folder.mkdir(parents=True, exist_ok=True)
            print(f"{folder} was gone and is made again; older events are lost.", flush=True)
            original(self, filename, file_content, mode)

    return _write


def _install(editor: Editor) -> None:
    editor.wrap(_FUNCTION, _made_again, ("self", "filename", "file_content", "mode"))


PATCH = Patch(
    name="defects.events_folder",
    symbols=(_FUNCTION,),
    reason="A folder of events that was moved or deleted ends the run at the next flush.",
    delete_when="Megatron's writer, or TensorBoard's, goes on without its file.",
    install=_install,
    active=lambda: importlib.util.find_spec("tensorboard") is not None,
)
