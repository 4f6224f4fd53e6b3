"""Value tables of a `torch_dist` checkpoint read where they lie in its files, by mapping them.

Each shard that a rank wrote is a file of torch.save within a larger file, its numbers uncompressed
in one piece. Where they begin is read without reading them, by torch's restricted unpickler.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.faults.trust import fault_of
from ultramem_megatron.memory.tables.stored import DiskTable, Piece

_NO_FLAG = -1
_MADV_RANDOM: int = getattr(mmap, "MADV_RANDOM", _NO_FLAG)


class TableFiles:
    """The tables of one iteration of a checkpoint."""

    def __init__(self, folder: str, readahead: bool) -> None:
        """readahead: tables are read from beginning to end, not row by row.

        Raises UltraMemError where the system cannot map files so.
        """
        from torch.distributed.checkpoint import FileSystemReader

        if not readahead and _MADV_RANDOM == _NO_FLAG:
            raise UltraMemError("--table-memory disk needs Linux. Use device.")
        self._folder, self._readahead = Path(folder), readahead
        self._metadata = FileSystemReader(folder).read_metadata()
        self._mapped: dict[str, mmap.mmap] = {}

    def table(self, key: str, first: int, rows: int) -> DiskTable:
        """Rows first.. of the tensor stored as `key`; the table's row 0 is its row `first`.

        Raises UltraMemError where the checkpoint does not have all of them.
        """
        stored: Any = self._metadata.state_dict_metadata.get(key)
        if stored is None or not hasattr(stored, "chunks"):  # of an object, no tensor
            raise UltraMemError(f"{self._folder} has no table {key}.")
        pieces = tuple(self._pieces(key, stored, range(first, first + rows)))
        covered = sum(len(piece.rows) * len(piece.columns) for piece in pieces)
        if covered != rows * stored.size[1]:
            raise UltraMemError(
                f"{self._folder} is damaged: of {rows} x {stored.size[1]} numbers of {key} its "
                f"files hold {covered}. Load another iteration (--ckpt-step)."
            )
        return DiskTable(pieces, stored.properties.dtype)

    def _pieces(self, key: str, stored: Any, wanted: range) -> Iterator[Piece]:
        chunks = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in stored.chunks}
        for index, place in self._metadata.storage_data.items():
            if index.fqn != key:
                continue
            (first, column), (rows, columns) = index.offset, chunks[tuple(index.offset)]
            begin, end = max(first, wanted.start), min(first + rows, wanted.stop)
            if begin >= end:
                continue
            content = self._content(place, stored.properties.dtype, (rows, columns), key)
            here = range(begin - wanted.start, end - wanted.start)
            inside = content[begin - first : end - first]
            yield Piece(here, range(column, column + columns), inside)

    def _content(self, place: Any, dtype: torch.dtype, shape: tuple[int, int], key: str) -> Tensor:
        """The mapped numbers of a shard as bytes (rows, bytes of a row)."""
        if place.transform_descriptors:
            raise self._damaged(place, key, "is compressed, or changed in another way")
        start = place.offset + self._start(place, dtype, shape, key)  # bytes
        row = shape[1] * dtype.itemsize  # bytes
        file = self._map(place.relative_path)
        if start + shape[0] * row > len(file):
            raise self._damaged(place, key, "is cut short")
        flat = torch.frombuffer(file, dtype=torch.uint8, offset=start, count=shape[0] * row)
        return flat.view(shape[0], row)

    def _start(self, place: Any, dtype: torch.dtype, shape: tuple[int, int], key: str) -> int:
        """Bytes from the beginning of a shard to its first number."""
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.distributed.checkpoint.utils import _create_file_view

        with (self._folder / place.relative_path).open("rb") as file, FakeTensorMode():
            shard: Any = _create_file_view(file, place.offset, place.length)
            try:
                tensor = torch.load(shard, map_location="cpu", weights_only=True)
            except Exception as error:  # bytes that were no tensor raise any of them
                raise self._damaged(place, key, fault_of(error)) from None
        is_plain = isinstance(tensor, Tensor) and tensor.is_contiguous()
        if not is_plain or tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise self._damaged(place, key, "is no table of the size that the metadata names")
        # Where torch.load finds storages without reading them, it says so in this attribute.
        offset: int = tensor.untyped_storage()._checkpoint_offset
        return offset + tensor.storage_offset() * dtype.itemsize

    def _map(self, name: str) -> mmap.mmap:
        if name not in self._mapped:
            with (self._folder / name).open("rb") as file:
                # torch wants memory that could be written; what is written would stay in memory.
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            if not self._readahead:  # rows lie anywhere: what the system reads ahead is for nothing
                mapped.madvise(_MADV_RANDOM)
            self._mapped[name] = mapped
        return self._mapped[name]

    def _damaged(self, place: Any, key: str, how: str) -> UltraMemError:
        return UltraMemError(
            f"{self._folder / place.relative_path}: the part of {key} at byte {place.offset} {how}."
            f" Load another iteration (--ckpt-step)."
        )
