"""The cache of data sets (--data-cache-path) holds arrays of numbers, and nothing is unpickled.

Megatron unpickles there what its list of names allows, which no cache of its own needs. A file that
is cut short, as by a kill while it was written, ended a run without the file's name.
"""

from typing import Any

import numpy

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.patches.patch import Editor, Patch

_READERS = ("gpt_dataset", "blended_dataset", "masked_dataset")
_SYMBOLS = tuple(f"megatron.core.datasets.{name}.safe_numpy_load" for name in _READERS)


def safe_numpy_load(path: Any, **kwargs: Any) -> numpy.ndarray:
    """An array of numbers. Raises UltraMemError for a file that is anything else."""
    try:
        array = numpy.load(path, **{**kwargs, "allow_pickle": False})
    except (ValueError, EOFError) as error:
        raise _refusal(path, str(error)) from None
    if not isinstance(array, numpy.ndarray):
        array.close()
        raise _refusal(path, "an archive")
    return array


def _refusal(path: Any, why: str) -> UltraMemError:
    return UltraMemError(
        f"{path} of the data sets' cache is damaged, or no array of numbers: {why}. Nothing of it "
        "was run. Remove the files of the cache (--data-cache-path): they are made again."
    )


def _install(editor: Editor) -> None:
    for symbol in _SYMBOLS:
        editor.replace(symbol, safe_numpy_load, parameters=("path", "kwargs"))


PATCH = Patch(
    name="defects.dataset_cache",
    symbols=_SYMBOLS,
    reason="Megatron passes allow_pickle=True, and no flag or class attribute says otherwise.",
    delete_when="Megatron reads its caches with allow_pickle=False.",
    install=_install,
    versions=">=0.19",
)
