"""A decode step of dense, MoE and UltraMem, as `ultramem bench decode --quick` has it."""

from collections.abc import Iterator

from launch.gpu_report.parts.benchmarks import quotients, written
from launch.gpu_report.row import Row, attempted

_LARGE = "--scale 1.6b --cuda-graphs --group-query-attention --num-query-groups 2"
_PAIRS = {
    "decode, grouped MoE over UltraMem{}": ("moe-grouped", "ultramem"),
    "decode, MoE over UltraMem{}": ("moe", "ultramem"),
    "decode, UltraMem over dense{}": ("ultramem", "dense"),
}


def rows(large: bool) -> Iterator[Row]:
    """Milliseconds of a step, their quotients, and microseconds of the memories in it."""
    found: dict[tuple[str, str], float] = {}
    yield from attempted("decode", lambda: _steps(large, found))
    yield from quotients(found, _PAIRS, ", batch {}")
    for (kind, batch), milliseconds in found.items():
        if large and kind == "ultramem" and ("dense", batch) in found:
            extra = 1e3 * (milliseconds - found["dense", batch])
            what = f"decode, six memories, batch {batch}"
            yield Row(what=what, value=round(extra, 1), unit="us")


def _steps(large: bool, found: dict[tuple[str, str], float]) -> Iterator[Row]:
    for row in written("decode", f"--quick {_LARGE if large else '--scale small'}"):
        found[row["kind"], row["batch"]] = milliseconds = float(row["median_ms"])
        yield Row(
            what=f"decode, {row['kind']}, batch {row['batch']}", value=milliseconds, unit="ms"
        )
