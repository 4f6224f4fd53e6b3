"""A table in a host's memory, once for all ranks that torchrun starts there; pinned for their GPUs.

The memory is a file without a name (memfd_create(2)), which its maker's neighbours open through
/proc: unlike /dev/shm, which containers keep small, it may be as large as memory is. Each rank
fills a share, so that on hosts of several NUMA nodes the table is spread over them.

N rows of a table, V value dim, B scales of a row.
"""

import mmap
import os
from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.kernels.quantized import FORMATS, QuantizedRows, quantized
from ultramem_megatron.memory.tables.stored import DiskTable, HostTable, QuantizedHostTable

if TYPE_CHECKING:
    from ultramem_megatron.memory.tables.value_table import ValueTable

_FILLED_AT_ONCE = 2**26  # bytes


def in_host_memory(table: DiskTable, module: "ValueTable") -> HostTable:
    """Read a table from disk, in the dtype of the module's weight; all ranks call it.

    Raises UltraMemError where the system has no such memory, or a GPU cannot pin it.
    """
    shape = (module.layout.num_values, module.layout.value_dim)
    values = _shared(shape, module.weight.dtype)
    for rows in _own_share(shape):
        values[rows[0] : rows[-1] + 1] = table.fetch(rows, shape[1])
    _filled(module, values)
    return HostTable(values)


def in_eight_bits(
    table: DiskTable, module: "ValueTable", kind: str, block: int | None
) -> QuantizedHostTable:
    """As `in_host_memory`, in 8 bits; kind and block as `quantized` takes them.

    Raises UltraMemError for values that are not finite, too.
    """
    shape = (module.layout.num_values, module.layout.value_dim)
    codes = _shared(shape, FORMATS[kind])
    scales = _shared((shape[0], shape[1] // (block or shape[1])), torch.float32)
    for rows in _own_share(shape):
        here = slice(int(rows[0]), int(rows[-1]) + 1)
        codes[here], scales[here] = quantized(table.fetch(rows, shape[1]), kind, block)
    _filled(module, codes, scales)
    return QuantizedHostTable(QuantizedRows(codes, scales))


def _own_share(shape: tuple[int, int]) -> Iterator[Tensor]:
    """The rows of a table that this rank fills, some at a time."""
    rank, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    end = shape[0] * (rank + 1) // ranks
    step = max(1, _FILLED_AT_ONCE // (4 * max(1, shape[1])))
    for begin in range(shape[0] * rank // ranks, end, step):
        yield torch.arange(begin, min(begin + step, end))


def _filled(module: "ValueTable", *parts: Tensor) -> None:
    dist.barrier()  # the others' shares are there, too
    for part in parts:
        if module.weight.is_cuda:
            _pin(part)


def _shared(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """(N, V) of zeros, the same memory for all ranks of this host."""
    if not hasattr(os, "memfd_create"):
        raise UltraMemError("--table-memory host needs Linux. Use device.")
    size = prod(shape) * dtype.itemsize  # bytes
    first = dist.get_rank() - int(os.environ["LOCAL_RANK"])
    own = os.memfd_create("ultramem_table") if dist.get_rank() == first else -1
    if own >= 0:
        os.ftruncate(own, size)
    every: list[tuple[int, int]] = [(0, 0)] * dist.get_world_size()
    dist.all_gather_object(every, (os.getpid(), own))
    process, number = every[first]
    file = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR)
    mapped = mmap.mmap(file, size)
    dist.barrier()  # all have opened it
    for descriptor in {file, own} - {-1}:
        os.close(descriptor)
    return torch.frombuffer(mapped, dtype=dtype).view(shape)


def _pin(values: Tensor) -> None:
    """Lock it in memory and give it an address on the GPU; until the process ends."""
    register = torch.cuda.cudart().cudaHostRegister
    try:
        torch.cuda.check_error(register(values.data_ptr(), values.nbytes, 0))
    except torch.cuda.CudaError as error:
        raise UltraMemError(
            f"--table-memory host: CUDA cannot pin a table of {values.nbytes / 1e9:.1f} GB: "
            f"{error}. Use --table-memory disk, or a host with more memory."
        ) from None
