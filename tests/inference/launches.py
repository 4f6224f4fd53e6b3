"""What a GPU would be given to do: operations of PyTorch's and Triton kernels, counted on a CPU.

Views and allocations launch nothing. An operation counts once, as nearly all are one kernel; of
Triton's interpreter only the kernels themselves count. Needs TRITON_INTERPRET=1.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

_NOTHING = ("aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::lift_fresh")


@contextmanager
def count_launches() -> Iterator[list[str]]:
    """The names of what was launched inside, in order."""
    from triton.runtime.interpreter import GridExecutor

    names: list[str] = []
    run = GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        names.append(f"triton::{self.fn.__name__}")
        with _disable_current_modes():
            run(self, *args, **kwargs)

    with patch.object(GridExecutor, "__call__", launch), _Operations(names):
        yield names


class _Operations(TorchDispatchMode):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.name().startswith(_NOTHING) and not _is_view(func, out, args):
            self._names.append(func.name())
        return out


def _is_view(func: Any, out: Any, args: Any) -> bool:
    """Whether nothing was written: what may be a view, as `contiguous`, is of one of its inputs."""
    if any(r.alias_info is None or r.alias_info.is_write for r in func._schema.returns):
        return False
    given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
    return all(one.untyped_storage().data_ptr() in given for one in tree_flatten(out)[0])
