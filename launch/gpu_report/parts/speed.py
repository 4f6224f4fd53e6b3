"""Tokens per second in training: dense, MoE, product keys, UltraMem."""

from collections.abc import Iterator

from launch.gpu_report.parts.benchmarks import quotients, written
from launch.gpu_report.row import Row, attempted

_PAIRS = {
    f"training, {name} over dense, tokens per second{{}}": (name, "dense")
    for name in ("ultramem", "pkm", "moe")
}


def rows(large: bool) -> Iterator[Row]:
    """Each model's rate, and over the dense one's."""
    found: dict[tuple[str, str], float] = {}
    yield from attempted("training speed", lambda: _rates(large, found))
    yield from quotients(found, _PAIRS, "{}")


def _rates(large: bool, found: dict[tuple[str, str], float]) -> Iterator[Row]:
    scale, steps = ("151m", 6) if large else ("tiny", 2)
    for row in written("training", f"--scale {scale} --rounds 1 --steps {steps}"):
        found[row["model"], ""] = float(row["tokens_per_second"])
        what = f"training, {row['model']}"
        yield Row(what=what, value=float(row["tokens_per_second"]), unit="tokens/s")
