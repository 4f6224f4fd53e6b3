"""A folder for results, or one line that says why there can be none."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ultramem_megatron.errors import UltraMemError


def results_folder(folder: Path) -> Path:
    """`folder`, made where it is not there. Raises UltraMemError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UltraMemError(
            f"{folder}: {error.strerror}. Results go to a folder that is there or can be made."
        ) from None
    return folder


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[None]:
    """What leaves the block because a file in `folder` could not be written: an UltraMemError."""
    try:
        yield
    except Exception as error:
        # safetensors has an exception of its own for every failure; which, its words say.
        if not isinstance(error, OSError) and "I/O error" not in str(error):
            raise
        raise UltraMemError(
            f"{folder} could not be written: {str(error).splitlines()[0]:.200}. What is there is "
            f"not whole: remove it, and choose a folder with room."
        ) from error
