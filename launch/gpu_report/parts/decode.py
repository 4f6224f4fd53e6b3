"""A decode step of dense, MoE and UltraMem, as `ultramem bench decode` has it.

On a GPU the paper's 1.6B models with two heads of keys, in CUDA graphs; the MoE also with a grouped
product of its experts, which is what UltraMem has to be compared with.
"""

from collections.abc import Iterator

from launch.gpu_report.parts.benchmarks import quotients, written
from launch.gpu_report.row import Row, attempted

_LARGE = "--quick --scale 1.6b --cuda-graphs --group-query-attention --num-query-groups 2"
_SMALL = "--quick --scale small"
_PAIRS = {
    "decode, MoE (loop) over UltraMem{}": ("moe", "ultramem"),
    "decode, MoE (grouped) over UltraMem{}": ("moe-grouped", "ultramem"),
    "decode, UltraMem over dense{}": ("ultramem", "dense"),
}


def rows(large: bool) -> Iterator[Row]:
    """Milliseconds of a step, their quotients, and what all memories add to a step."""
    found: dict[tuple[str, str], float] = {}
    yield from attempted("decode", lambda: _steps(large, found))
    yield from quotients(found, _PAIRS, ", batch {}")
    for kind, batch in found:
        if kind == "ultramem" and ("dense", batch) in found:
            added = round(found[kind, batch] - found["dense", batch], 3)
            yield Row(what=f"decode, all memories, batch {batch}", value=added, unit="ms")


def _steps(large: bool, found: dict[tuple[str, str], float]) -> Iterator[Row]:
    for row in written("decode", _LARGE if large else _SMALL):
        found[row["kind"], row["batch"]] = milliseconds = float(row["median_ms"])
        graph = " in a CUDA graph" if row["cuda_graph"] == "1" else ""
        what = f"decode, {row['kind']}{graph}, batch {row['batch']}"
        yield Row(what=what, value=milliseconds, unit="ms")
