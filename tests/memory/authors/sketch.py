"""A few numbers that stand for a large tensor in a golden file.

python -m tests.memory.authors.sketch FULL.npz SMALL.npz     makes a golden file small
"""

import sys

import numpy as np

_NUMBERS = 32
_EXACT = ("sd.", "cfg.", "input", "grad_output")


def sketch(tensor: np.ndarray) -> np.ndarray:
    """Weighted sums of all entries, (32,), each with weights of its own around 0."""
    place = np.arange(tensor.size, dtype=np.float64)
    frequency = np.sqrt(np.arange(2, _NUMBERS + 2, dtype=np.float64))
    return np.cos(np.outer(frequency, place + 1)) @ tensor.ravel()


def make_small(full: str, small: str) -> None:
    """Keep what goes in, and sketches of outputs and gradients."""
    loaded = np.load(full)
    kept = {name: loaded[name] for name in loaded.files if name.startswith(_EXACT)}
    for name in loaded.files:
        if name not in kept and name.startswith(("grad", "output")):
            kept[name] = sketch(loaded[name])
    np.savez_compressed(small, **kept)


if __name__ == "__main__":
    make_small(*sys.argv[1:])
