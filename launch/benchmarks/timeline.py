"""A picture of two steps, without and with overlap: layers, exchanges on their way, waits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.benchmarks import trace
from launch.benchmarks.trace import Interval
from ultramem_megatron.tools.pictures import picture

_LANES = ("layers", "on its way", "waiting")
_SHORT = 0.025
"""Share of the axis below which a bar has no room for its name."""


def plot(traces: Mapping[str, Any], path: Path, title: str) -> None:
    """traces: the trace of one step with `marked_layers`, by kind ("off", "on")."""
    longest = max(_span(found)[1] - _span(found)[0] for found in traces.values())
    with picture(path, (12, 2.1 * len(traces) + 0.6), dpi=90) as figure:
        panels = figure.subplots(len(traces), 1, sharex=True)
        for panel, (name, found) in zip(panels, traces.items(), strict=True):
            start, _ = _span(found)
            for lane, bars in enumerate(_bars(found)):
                for bar in bars:
                    _draw(panel, bar, start, lane, longest)
            panel.set_yticks(range(len(_LANES)), _LANES)
            panel.invert_yaxis()
            exposed = trace.exposed(found) / 1000
            panel.set_title(f"overlap {name}: {exposed:.0f} ms waiting", loc="left", fontsize=10)
        panels[-1].set_xlabel("milliseconds; layers: forward blue, backward orange")
        figure.suptitle(title, fontsize=11)


def _span(found: Any) -> tuple[float, float]:
    layers = trace.layer_intervals(found)
    return min(layer.start for layer in layers), max(layer.end for layer in layers)


def _bars(found: Any) -> list[list[Interval]]:
    """Of each lane."""
    return [
        trace.layer_intervals(found),
        _joined(trace.transfers(found)),
        trace.events(found, trace.WAIT),
    ]


def _joined(moving: list[Interval]) -> list[Interval]:
    """Exchanges that are on their way together as one bar."""
    bars: list[Interval] = []
    for each in moving:
        if bars and each.start < bars[-1].end:
            before = bars.pop()
            each = Interval(f"{before.name}, {each.name}", before.start, max(before.end, each.end))
        bars.append(each)
    return bars


def _draw(panel: Any, bar: Interval, start: float, lane: int, longest: float) -> None:
    left, width = (bar.start - start) / 1000, bar.length / 1000
    panel.barh(
        lane,
        width,
        left=left,
        height=0.7,
        color=_colour(bar.name),
        alpha=0.6,
        edgecolor="white",
        linewidth=0.5,
    )
    if bar.length > _SHORT * longest:
        panel.text(left + width / 2, lane, _label(bar.name), ha="center", va="center", fontsize=6)


def _colour(name: str) -> str:
    if name.startswith(trace.WAIT):
        return "tab:red"
    if not name.startswith(trace.LAYER):
        return "tab:green"
    return "tab:blue" if "forward" in name else "tab:orange"


def _label(name: str) -> str:
    """Layers by their number, exchanges word by word, waits without."""
    if name.startswith(trace.LAYER):
        return name.split()[1]
    return "" if name.startswith(trace.WAIT) else name.replace(" ", "\n")
