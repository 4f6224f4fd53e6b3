"""Computations in steps: they pause where something they need is still on its way.

Such a computation is a generator that yields at each pause and returns its result. Whoever runs it
decides what else is done in a pause: nothing (`run`), or the layers beside it (`branch.py`).
"""

from collections.abc import Generator

from torch import Tensor

Pausing = Generator[None, None, Tensor]


def run(steps: Pausing) -> Tensor:
    """The result, without doing anything else in the pauses."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Tensor = end.value
            return result
