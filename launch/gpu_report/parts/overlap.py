"""How much of a memory's exchanges is exposed, with and without --ultramem-overlap."""

from collections.abc import Iterator

import torch

from launch.gpu_report.parts.benchmarks import written
from launch.gpu_report.row import Row, attempted


def rows(large: bool) -> Iterator[Row]:
    """Each number of the benchmark's CSV; with fewer than two GPUs a word instead."""
    if large and torch.cuda.device_count() < 2:
        yield Row(what="overlap", value="left out: exchanges want two GPUs, here is one")
        return
    flags = (
        "--steps 4"
        if large
        else "--steps 1 --layers 4 --span 2:3 --tokens 32 --num-keys 32 --delay-ms 0"
    )
    yield from attempted("overlap", lambda: _numbers(flags))


def _numbers(flags: str) -> Iterator[Row]:
    for row in written("overlap", flags):
        where = f"{row['partition']}-wise, overlap {row['overlap']}, delay {row['delay_ms']} ms"
        for name in ("step", "exposed"):
            yield Row(what=f"{name}, {where}", value=float(row[f"{name}_ms"]), unit="ms")
