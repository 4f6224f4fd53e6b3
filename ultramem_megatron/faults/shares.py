"""Which files of a checkpoint each rank checks, so that no host has to read all of them."""

import os
import re
from collections.abc import Iterable
from typing import NamedTuple

_SHARD = re.compile(r"__([0-9]{1,9})_[0-9]+\.distcp$")


class Share(NamedTuple):
    """A rank's part of a work that `ranks` do; by default all of it."""

    rank: int = 0
    ranks: int = 1

    def of(self, names: Iterable[str]) -> list[str]:
        """Its files: those that every rank reads, and the shards that some of the writers wrote.

        Where as many ranks have written, a rank has its own shards: what it is about to read.
        """
        writers = {name: _writer(name) for name in names}
        count = 1 + max((number for number in writers.values() if number is not None), default=0)
        return [
            name
            for name, number in writers.items()
            if number is None or number * self.ranks // count == self.rank
        ]


def launched_share() -> Share:
    """This process's part, by its launcher's environment; all of it where there is none."""
    return Share(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def _writer(name: str) -> int | None:
    """The rank that wrote a file; None for what is no shard."""
    found = _SHARD.search(name)
    return int(found[1]) if found else None
