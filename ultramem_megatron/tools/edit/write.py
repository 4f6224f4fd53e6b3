"""A folder as another, but for some rows of its value tables; no table is read whole.

N values of a table, W bytes of one.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.faults.results_folder import results_folder, written_whole
from ultramem_megatron.tools.edit.edits import Edit, shared_edits
from ultramem_megatron.tools.export.hf_folder import SUMS, finish, read_config, refuse_full

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
}
"""What a file's header calls those that tables are kept in."""


class _Row(NamedTuple):
    """What is to stand in one row of a tensor in a file."""

    file: str
    tensor: str
    row: int
    content: np.ndarray
    """(W,) bytes."""


def write_edited(folder: Path, out: Path, edits: Sequence[Edit]) -> None:
    """Write `out`, a folder as `folder` with its tables edited. Raises UltraMemError.

    All files are copied, none linked: whoever saves over one folder must not change the other.
    """
    refuse_full(out)
    holders = read_config(folder, quantized=True)[1].table_holders
    files = sorted(folder.glob("*.safetensors"))
    changed = [row for file in files for row in _changed(file, edits, holders)]
    results_folder(out)
    with written_whole(out):
        for file in sorted(folder.iterdir()):
            if file.is_file() and file.name != SUMS:
                shutil.copyfile(file, out / file.name)
        for name, tensor, row, content in changed:
            _rows(out / name, tensor, "r+")[row] = content
        _say_so(out / "README.md", [*map(str, edits), *shared_edits(edits, holders)])
        finish(out)


def _changed(file: Path, edits: Sequence[Edit], holders: dict[int, str]) -> Iterator[_Row]:
    """Every row of a file that the edits change, made of what the file holds now."""
    for name, entry in _header(file)[1].items():
        stem, _, last = name.rpartition(".")
        for edit in edits:
            table = f"{holders[edit.layer]}.values"
            both = (table, f"{holders[edit.layer]}.pre_values")
            if stem not in both:
                continue
            rows = _rows(file, name, "r")
            if edit.source is not None:
                yield _Row(file.name, name, edit.value, np.array(rows[edit.source]))
            elif stem == table and last != "codes":  # what is in 8 bits changes by its scales
                row = np.array(rows[edit.value])
                yield _Row(file.name, name, edit.value, _times(row, entry["dtype"], edit))


def _times(row_W: np.ndarray, kind: str, edit: Edit) -> np.ndarray:
    dtype = _DTYPES[kind]
    changed = torch.from_numpy(row_W).view(dtype) * edit.factor
    if not changed.isfinite().all():
        raise UltraMemError(
            f"{edit.layer}:{edit.value} times {edit.factor:g} is beyond {dtype}. Give a smaller "
            f"factor."
        )
    return changed.view(torch.uint8).numpy()


def _rows(file: Path, tensor: str, mode: Literal["r", "r+"]) -> np.memmap:
    """(N, W) bytes of a tensor, in the file."""
    start, entries = _header(file)
    begin, end = entries[tensor]["data_offsets"]
    number = entries[tensor]["shape"][0]
    shape = (number, (end - begin) // number)
    return np.memmap(file, dtype=np.uint8, mode=mode, offset=start + begin, shape=shape)


def _header(file: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Of a file of safetensors: where the tensors begin, and what stands before, by their names.

    Eight bytes tell the length of the JSON after them (huggingface.co/docs/safetensors, Format).
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        entries: dict[str, dict[str, Any]] = json.loads(opened.read(length))
    entries.pop("__metadata__", None)
    return 8 + length, entries


def _say_so(card: Path, words: Sequence[str]) -> None:
    if card.is_file():
        lines = "".join(f"- {line}\n" for line in words)
        text = card.read_text(encoding="utf-8")
        card.write_text(
            f"{text}\n## Edited\n\nValues changed by hand:\n\n{lines}", encoding="utf-8"
        )
