"""Value tables left on disk: of a mapped file only the pages come into memory that hold read rows.

The system reads ahead around each page that is missing, megabytes on some disks, and rows of a
table lie anywhere: MADV_RANDOM (madvise(2), Linux) makes it read the page alone. A row that is
missing then stops who reads it until it is there; MADV_WILLNEED has the disk fetch many at once.

Folders for transformers hold this file, too: it imports torch alone.
"""

import ctypes
import mmap
from functools import cache
from pathlib import Path

from torch import Tensor

_NO_FLAG = -1
_MADV_RANDOM: int = getattr(mmap, "MADV_RANDOM", _NO_FLAG)
_MADV_WILLNEED: int = getattr(mmap, "MADV_WILLNEED", _NO_FLAG)
_MAPS = Path("/proc/self/maps")


def leave_on_disk(name: str, table: Tensor) -> None:
    """Turn readahead off for a tensor of a mapped file. Raises ValueError where it is none."""
    if _MADV_RANDOM == _NO_FLAG or not _MAPS.exists():
        raise ValueError("table_memory is 'disk', which needs Linux. Leave it out.")
    if table.device.type != "cpu" or not _mapped_from_file(table):
        raise ValueError(
            f"table_memory is 'disk', but {name} is not mapped from its file: it is on "
            f"{table.device}, in {table.dtype}. Load on a CPU, in the dtype of the file, or leave "
            f"table_memory out."
        )
    first, length = _pages(table)
    if _libc().madvise(first, length, _MADV_RANDOM):
        raise ValueError(f"madvise of {name}: errno {ctypes.get_errno()}. Leave table_memory out.")


def bring(table: Tensor, rows: Tensor) -> None:
    """Have the pages of these rows fetched, and wait for none; rows: int64 of any shape.

    table: (N, ...) on a CPU, contiguous.
    """
    rows = rows.unique()
    if not len(rows):
        return
    offset, of_row = table.data_ptr() % mmap.PAGESIZE, table[0].nbytes
    first = (offset + rows * of_row) // mmap.PAGESIZE
    last = (offset + (rows + 1) * of_row - 1) // mmap.PAGESIZE
    apart = first[1:] > last[:-1] + 1
    runs = zip(first[1:][apart].tolist(), last[:-1][apart].tolist(), strict=True)
    madvise, base, start = _libc().madvise, table.data_ptr() - offset, first[0].item()
    for following, end in [*runs, (0, last[-1].item())]:
        at, pages = base + start * mmap.PAGESIZE, end + 1 - start
        madvise(at, pages * mmap.PAGESIZE, _MADV_WILLNEED)  # advice: if it fails, reading waits
        start = following


def pages_in_memory(table: Tensor) -> tuple[int, int]:
    """How many pages of a mapped tensor are in memory, whoever read them, and all of them."""
    first, length = _pages(table)
    found = (ctypes.c_ubyte * (length // mmap.PAGESIZE))()
    if _libc().mincore(first, length, found):
        raise ValueError(f"mincore: errno {ctypes.get_errno()}.")
    return sum(page & 1 for page in found), len(found)


def _pages(table: Tensor) -> tuple[int, int]:
    """Address and bytes of the pages that the tensor lies on."""
    start = table.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    end = -(-(table.data_ptr() + table.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    return start, end - start


def _mapped_from_file(table: Tensor) -> bool:
    address = table.data_ptr()
    for line in _MAPS.read_text().splitlines():
        where, _, _, _, _, *path = line.split(maxsplit=5)
        first, last = (int(number, 16) for number in where.split("-"))
        if first <= address < last:
            return bool(path) and path[0].startswith("/")
    return False


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    return libc
