"""How often each row of the value tables is read in ordinary text, in a file of plain numbers.

What few batches of it read can be changed with little harm: `memory/row_choice.py`. The file is
NumPy's npz, without pickled objects. N rows of a table.
"""

import os
import secrets
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, from_numpy

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.layer import UltraMemLayer
from ultramem_megatron.memory.placement import placements

_TOTAL, _KINDS, _KEYS = "batches", ("reads", "batches"), "keys"
_HEADER = 1024  # bytes; more than NumPy writes before an array
_NUMBER = np.dtype("<i8")
FLAG = "--ultramem-background-reads"
_ADVICE = "Give one that `ultramem count` wrote."


@dataclass(frozen=True)
class TableReads:
    """Of one table: reads (N,) and batches (N,), int64, by how many batches a row was read.

    keys: `sum_of_keys` of the memories that read it; None where it was not taken.
    """

    reads: Tensor
    batches: Tensor
    keys: int | None = None


@dataclass(frozen=True)
class BackgroundReads:
    """batches: B, of the text. tables: by the layer after which a table is named."""

    batches: int
    tables: Mapping[int, TableReads]

    def write(self, file: Path) -> None:
        """Whole or not at all. Raises UltraMemError where the file cannot be written."""
        arrays = {_TOTAL: np.array(self.batches, _NUMBER)}
        for number, table in self.tables.items():
            arrays[f"{number}.reads"] = table.reads.cpu().numpy().astype(_NUMBER)
            arrays[f"{number}.batches"] = table.batches.cpu().numpy().astype(_NUMBER)
            if table.keys is not None:
                arrays[f"{number}.{_KEYS}"] = np.array(table.keys, _NUMBER)
        partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")
        try:
            with partial.open("xb") as opened:
                np.savez(opened, **arrays)  # type: ignore[arg-type]  # its stubs take no mapping
            os.replace(partial, file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise UltraMemError(
                f"{file}: {error.strerror}. Give a file in a folder that can be written to."
            ) from None


def sum_of_keys(layers: Iterable[UltraMemLayer]) -> int:
    """CRC-32 of the weights by which memories choose rows: whose reads were counted.

    In bfloat16, so that it is the same in either precision; of whole weights, so on every layout.
    Training of values alone leaves it as it is.
    """
    found = 0
    for layer in layers:
        for weight in layer.retrieval.parameters():
            rounded = weight.detach().to("cpu", torch.bfloat16).contiguous()
            found = zlib.crc32(rounded.view(torch.uint8).numpy(), found)
    return found


def refuse_other_keys(number: int, table: TableReads, layers: Iterable[UltraMemLayer]) -> None:
    """Raise UltraMemError if `table`, of layer `number`, counts the reads of other memories."""
    if table.keys is not None and table.keys != sum_of_keys(layers):
        raise UltraMemError(
            f"{FLAG} counts the reads of another model: the keys of the table of layer {number} "
            f"are others. Give what `ultramem count` wrote for the checkpoint that is trained here."
        )


def tables_of(config: UltraMemConfig) -> list[int]:
    """The layers after which a model's tables are named."""
    return sorted({place.table for place in placements(config)})


def read_background(file: str, config: UltraMemConfig) -> BackgroundReads:
    """What `ultramem count` wrote for a model of this design.

    Raises UltraMemError for a file that cannot be read, or of other tables.
    """
    try:
        with zipfile.ZipFile(file) as members:
            sizes = {member.filename: member.file_size for member in members.infolist()}
        found = _unpacked(file) if _fits(sizes, config) else {}
    except OSError as error:
        raise UltraMemError(f"{FLAG} {file}: {error.strerror or error}. {_ADVICE}") from None
    # The last is zipfile's, of a compression or a version that it does not know.
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError):
        raise UltraMemError(f"{FLAG} {file}: it is damaged, or no such file. {_ADVICE}") from None
    return _checked(file, found, config)


def _fits(sizes: Mapping[str, int], config: UltraMemConfig) -> bool:
    """Whether names and sizes are those of the design's tables; asked before anything is unpacked.

    sizes: bytes of each member of the file.
    """
    counted = {f"{number}.{kind}.npy" for number in tables_of(config) for kind in _KINDS}
    keys = {f"{number}.{_KEYS}.npy" for number in tables_of(config)} & sizes.keys()
    single = keys | {f"{_TOTAL}.npy"}
    if sizes.keys() != counted | single or any(sizes[name] > _HEADER for name in single):
        return False
    bytes_ = config.num_values * _NUMBER.itemsize
    return all(bytes_ <= sizes[name] <= bytes_ + _HEADER for name in counted)


def _unpacked(file: str) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _checked(file: str, found: Mapping[str, np.ndarray], config: UltraMemConfig) -> BackgroundReads:
    shapes = {
        name: () if name == _TOTAL or name.endswith(_KEYS) else (config.num_values,)
        for name in found
    }
    if not found or any(
        (array.dtype, array.shape) != (_NUMBER, shapes[name]) for name, array in found.items()
    ):
        numbers = ", ".join(map(str, tables_of(config)))
        raise UltraMemError(
            f"{FLAG} {file}: it does not count {config.num_values} rows of each table of this "
            f"model (those of layers {numbers}). Give what `ultramem count` wrote for this model."
        )
    total, tables = found[_TOTAL], {}
    for number in tables_of(config):
        reads, batches = (found[f"{number}.{kind}"] for kind in _KINDS)
        if batches.min() < 0 or batches.max() > total or (reads < batches).any() or total < 1:
            raise UltraMemError(
                f"{FLAG} {file}: rows are read in more batches than there are, or less often than "
                f"in batches. {_ADVICE}"
            )
        keys = found.get(f"{number}.{_KEYS}")
        tables[number] = TableReads(
            from_numpy(reads), from_numpy(batches), None if keys is None else int(keys)
        )
    return BackgroundReads(int(total), tables)
