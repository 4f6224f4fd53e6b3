"""A folder for results, or one line that says why there can be none."""

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
