"""A decode step of dense, MoE and UltraMem, as `ultramem bench decode --quick` has it."""

from collections.abc import Iterator

from launch.gpu_report.parts.benchmarks import quotients, written
from launch.gpu_report.row import Row, attempted

_PAIRS = {
    "decode, MoE over UltraMem{}": ("moe", "ultramem"),
    "decode, UltraMem over dense{}": ("ultramem", "dense"),
}


def rows(large: bool) -> Iterator[Row]:
    """Milliseconds of a step, and their quotients."""
    found: dict[tuple[str, str], float] = {}
    yield from attempted("decode", lambda: _steps(large, found))
    yield from quotients(found, _PAIRS, ", batch {}")


def _steps(large: bool, found: dict[tuple[str, str], float]) -> Iterator[Row]:
    for row in written("decode", f"--quick --scale {'151m' if large else 'small'}"):
        found[row["kind"], row["batch"]] = milliseconds = float(row["median_ms"])
        yield Row(
            what=f"decode, {row['kind']}, batch {row['batch']}", value=milliseconds, unit="ms"
        )
