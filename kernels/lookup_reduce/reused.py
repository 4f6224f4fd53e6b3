"""Dense gradients on a CPU, without `main_grad`: a buffer for each table, used again and again.

A new buffer of zeros costs a page fault for each of its pages, three times what clearing it does.
So a step's buffer is kept beside its table, and where nobody holds it any more (`zero_grad()` lets
go of it), the next backward clears the rows that the last one touched and adds to it again.

Others may have written to it meanwhile: where torch says so (its version: clipping, DDP, a second
backward that was added), or where some of the rows that should be zero are not (writes through
`.data`, of which torch says nothing: weight decay, noise), all of it is cleared, and always where
there are other ranks: of a reduction over them torch says nothing either. While somebody
holds it (a second backward of a step, a gradient that was put aside), there is a new one as ever.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ultramem_megatron.kernels.lookup_reduce import native_path
from ultramem_megatron.kernels.native.large_pages import ask_for_large_pages
from ultramem_megatron.kernels.native.library import native_library

_LOOKED_AT = 256  # rows
_buffers = WeakIdKeyDictionary()
"""By table. No attribute of it: those are saved and pickled with it."""
_use_count = getattr(torch._C, "_storage_Use_Count", None)
"""Private to torch: where it is gone, every backward has a new buffer."""


@dataclass
class _Buffer:
    tensor: Tensor
    holders: int
    """Of its storage, while nobody else has it."""
    rows: Tensor
    """Those that were added to, of any shape."""
    version: int = -1
    """After they were; -1: a backward that did not end."""

    def clear(self) -> None:
        """All zeros again."""
        untouched = self.version == self.tensor._version and not _there_are_other_ranks()
        few = self.rows.numel() < len(self.tensor)
        if untouched and few:
            _clear_rows(self.tensor, self.rows)
            some = self.tensor[:: max(1, len(self.tensor) // _LOOKED_AT)]
            untouched = not bool(some.any())
        if not (untouched and few):
            self.tensor.zero_()


def zeros_for(table: Tensor, rows: Tensor) -> Tensor:
    """Zeros of the table's shape and dtype, to which gradients of `rows` will be added.

    To be told of with `added` when they have been.
    """
    if table.device.type != "cpu" or not table.is_leaf or _use_count is None:
        return torch.zeros_like(table)
    buffer = _buffers.get(table)
    if buffer is None or _is_other(buffer.tensor, table):
        tensor = torch.empty_like(table)
        ask_for_large_pages(tensor)
        tensor.zero_()
        buffer = _buffers[table] = _Buffer(tensor, _holders(tensor), rows)
    elif _holders(buffer.tensor) > buffer.holders:
        return torch.zeros_like(table)
    else:
        buffer.clear()
    buffer.rows, buffer.version = rows, -1
    # Autograd takes over what nobody else has: another tensor, of the same storage and version.
    return buffer.tensor.detach()


def added(table: Tensor, gradient: Tensor) -> None:
    """What `zeros_for` gave has its gradient now."""
    buffer = _buffers.get(table)
    if buffer is not None and buffer.tensor.data_ptr() == gradient.data_ptr():
        buffer.version = buffer.tensor._version


def _clear_rows(tensor: Tensor, rows: Tensor) -> None:
    if native_library() is not None and tensor.is_contiguous():
        native_path.clear(tensor, rows)
    else:
        tensor.index_fill_(0, rows.flatten(), 0)


def _is_other(tensor: Tensor, table: Tensor) -> bool:
    """A table can be given other contents: `.to(...)`, `.data = ...`."""
    alike = (tensor.shape, tensor.dtype, tensor.stride(), tensor.device)
    return alike != (table.shape, table.dtype, table.stride(), table.device)


def _there_are_other_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _holders(tensor: Tensor) -> int:
    assert _use_count is not None
    count: int = _use_count(tensor.untyped_storage()._cdata)
    return count
