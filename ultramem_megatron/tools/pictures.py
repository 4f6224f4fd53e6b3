"""Pictures without a display: one way to open and save a figure, one colour for each model."""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.faults.results_folder import results_folder

_COLOURS = {"dense": "tab:grey", "moe": "tab:orange", "pkm": "tab:green", "ultramem": "tab:blue"}
_OTHERS = ("tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan")


@contextmanager
def picture(file: Path, size: tuple[float, float], dpi: int = 120) -> Iterator[Any]:
    """Gives an empty matplotlib Figure to draw on; saves it when the block has ended.

    size: width and height in inches. Raises UltraMemError for a kind of file that matplotlib
    does not write.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, no figures left open

    figure = Figure(figsize=size, layout="constrained")
    known = figure.canvas.get_supported_filetypes()
    if file.suffix.removeprefix(".") not in known:
        raise UltraMemError(f"{file}: the name of a picture must end in .{', .'.join(known)}.")
    yield figure
    results_folder(file.parent)
    figure.savefig(file, dpi=dpi)


def colours(models: Iterable[str]) -> dict[str, str]:
    """Colours by name: of dense, MoE, pkm and UltraMem (in any case) the same in all pictures."""
    others = itertools.cycle(_OTHERS)
    return {name: _COLOURS.get(name.lower()) or next(others) for name in models}
