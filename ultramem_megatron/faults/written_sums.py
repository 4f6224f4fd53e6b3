"""Sums of a checkpoint's shards, made by the process that writes them, while it writes them.

A writer's transforms see every byte on its way into a file. The sums travel with what Megatron
gathers on rank 0 after a save anyway, so they cost no message, no file and no second reading.
"""

import hashlib
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms
from torch.distributed.checkpoint.storage import WriteResult


@dataclass(frozen=True)
class SummedResult(WriteResult):
    """What was written of one tensor or object, with the SHA-256 of the whole file it is in."""

    sum_of_file: str


class _Summed(io.IOBase):
    """A stream that adds to a sum what it passes on."""

    def __init__(self, stream: Any, digest: Any) -> None:
        self._stream, self._digest = stream, digest

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return int(self._stream.write(data))

    def flush(self) -> None:
        self._stream.flush()


class SummingTransforms(_StorageWriterTransforms):
    """A writer's transforms that also sum each file they write to, by its name."""

    def __init__(self, before: _StorageWriterTransforms) -> None:
        super().__init__(before.extensions)
        self.digests: dict[str, Any] = {}

    def transform_save_stream(
        self, write_item: Any, raw_stream: Any
    ) -> tuple[IO[bytes], list[str]]:
        """As torch's, around a stream that is summed. Each file has one thread that writes it."""
        digest = self.digests.setdefault(Path(raw_stream.name).name, hashlib.sha256())
        return super().transform_save_stream(write_item, _Summed(raw_stream, digest))


class _WithSums:
    """A writer's queue of results, on which each file's last result also has its sum."""

    def __init__(self, queue: Any, digests: dict[str, Any]) -> None:
        self._queue, self._digests = queue, digests

    def put(self, found: Any) -> None:
        """found: lists of results, one for each file, by number; or the error of a writer."""
        for results in found.values() if isinstance(found, dict) else ():
            *_, last = results
            digest = self._digests[last.storage_data.relative_path].hexdigest()
            results[-1] = SummedResult(last.index, last.size_in_bytes, last.storage_data, digest)
        self._queue.put(found)


def write_and_sum(
    write: Callable[..., None], transforms: SummingTransforms, rank: int, buckets: Any, queue: Any
) -> None:
    """Megatron's `write`, in whatever process it runs: its results get sums."""
    write(rank, buckets, _WithSums(queue, transforms.digests))


def sums_of(results: Iterable[Iterable[WriteResult]]) -> dict[str, str]:
    """SHA-256 by file name, of what all ranks have written."""
    return {
        result.storage_data.relative_path: result.sum_of_file
        for of_rank in results
        for result in of_rank
        if isinstance(result, SummedResult)
    }
