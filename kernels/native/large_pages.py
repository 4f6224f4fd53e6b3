"""Pages of 2 MiB instead of 4 KiB under memory that is read at random, on Linux.

A row of a table that is larger than the TLB reaches (some MiB) waits for a walk through tables of
pages besides, which takes as long as reading the row.
"""

import ctypes
import functools
import sys
from typing import Any

from torch import Tensor

LEAST = 2**25
"""Bytes below which small pages do."""

_HUGEPAGE, _COLLAPSE = 14, 25  # MADV_HUGEPAGE, MADV_COLLAPSE of mman.h
_LARGE = 2**21


def ask_for_large_pages(tensor: Tensor, *, filled: bool = False) -> None:
    """Ask for large pages under a contiguous tensor of any shape and dtype; only time changes.

    filled: it lies in small pages already, which are moved now as far as free memory allows (Linux
    6.1 and later; about a second for a GiB); else it is asked before it is filled. Does nothing for
    less than `LEAST`, on other devices and systems. Not for tensors over files.
    """
    if tensor.device.type != "cpu" or tensor.nbytes < LEAST or not tensor.is_contiguous():
        return
    advise = _madvise()
    if advise is None:
        return
    first = -(-tensor.data_ptr() // _LARGE) * _LARGE
    length = (tensor.data_ptr() + tensor.nbytes) // _LARGE * _LARGE - first
    advise(first, length, _HUGEPAGE)
    if filled:
        advise(first, length, _COLLAPSE)


@functools.cache
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
